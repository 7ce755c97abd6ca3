// A product of gathered rows with the basis of their head, and the rotation of what comes out while it lies in shared memory.
//
// A block takes kTokens tokens of one sequence and head at a time, 16 a warp, and all channels of them, because a rotation pairs
// distant ones. Factors and basis come through shared memory, kStepBytes of the rank at a time, the next step on its way during the
// products: tensor cores for bfloat16 and float16, multiply-adds for float32. How many tokens a list names is known to the device
// alone, so a fixed number of blocks per list walks through them. Per token of rank 160 and 128 channels in bfloat16: 320 bytes
// read, 256 written and 41 kFLOP, so memory sets the pace where tensor cores do the products. It has never run on a GPU.
#include <initializer_list>

#include "pages.h"
#include "warp.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kTokens = 16 * kWarps;
constexpr int kStepBytes = 64;
constexpr int64_t kBlocks = 1024;  // of all lists together, about: some for every multiprocessor

// The arguments, and what the kernel makes of them.
struct Call {
  LowrankKeys a;
  PageTable table;
  int64_t blocks;                              // per list
  bool whole_factors, whole_basis, whole_rows;  // can be read or written 16 bytes at a time

  SA_HOST_DEVICE bool knows(int64_t position) const { return a.pairs == 0 || (position >= 0 && position < a.n_far * a.n_near); }
};

template <class Element_, int kWidth_>
struct Shape {
  using Element = Element_;
  static constexpr int kWidth = kWidth_;  // a key has no more channels
  static constexpr int kPerVector = 16 / int(sizeof(Element)), kStep = kStepBytes / int(sizeof(Element));
  // elements between rows in shared memory: an odd number of vectors, so that eight rows meet all banks
  static constexpr int kFactorPitch = kStep + kPerVector, kBasisPitch = kWidth + kPerVector;
  static constexpr int kStage = kTokens * kFactorPitch + kStep * kBasisPitch;  // elements of one step
  static constexpr int kKeyPitch = kWidth + 1, kHalf = kTokens / 2;
  static constexpr int64_t kStages = 2 * kStage * sizeof(Element), kKeys = kHalf * kKeyPitch * sizeof(float);
  static constexpr int64_t kShared = (kStages > kKeys ? kStages : kKeys) + kTokens * sizeof(PageTable::Place);
};

// a vector from `from`: the first `have` elements of it, and zeros for the rest
template <class Element>
SA_DEVICE void fetch(Element* to, const Element* from, int64_t stride, int64_t have, bool whole) {
  constexpr int kPerVector = 16 / int(sizeof(Element));
  if (have <= 0) return store16(to, Vec16{});
  if (whole) return copy16_async(to, from);
#pragma unroll
  for (int e = 0; e < kPerVector; ++e) to[e] = e < have ? from[e * stride] : from_float<Element>(0.0f);
}

template <class S>
class Block {
  using Element = typename S::Element;

 public:
  SA_DEVICE Block(const Call& call, int64_t list)
      : call_(call), list_(list), stages_(reinterpret_cast<Element*>(shared_memory())),
        keys_(reinterpret_cast<float*>(shared_memory())),
        places_(reinterpret_cast<PageTable::Place*>(shared_memory() + S::kShared) - kTokens) {
    const View& basis = call.a.basis;
    const int64_t b = list / basis.size[1], h = list % basis.size[1];
    basis_ = static_cast<const Element*>(basis.data) + b * basis.stride[0] + h * basis.stride[1];
  }

  // the tokens of the list from `first` on
  SA_DEVICE void run(int64_t first, int64_t length) {
    for (int i = thread(); i < kTokens; i += kThreads)
      places_[i] = first + i < length ? call_.table.place(list_, first + i) : PageTable::Place{-1, -1};
    barrier();
    const int64_t rank = call_.a.factors.width;
#pragma unroll
    for (int i = 0; i < S::kWidth / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums_[i][e] = 0.0f;
    stage(0, 0);
    copy_commit();
    int64_t r = 0, buffer = 0;
    do {
      if (r + S::kStep < rank) stage(r + S::kStep, buffer ^ 1);
      copy_commit();
      copy_wait<1>();
      barrier();
      multiply(stages_ + buffer * S::kStage);
      barrier();
      buffer ^= 1;
    } while ((r += S::kStep) < rank);
    for (int half = 0; half < kTokens; half += S::kHalf) {
      if (warp() * 16 / S::kHalf * S::kHalf == half) put(keys_ + (warp() * 16 - half) * S::kKeyPitch);
      barrier();
      turn(half);
      barrier();
      write(half);
      barrier();
    }
  }

 private:
  SA_DEVICE void stage(int64_t r, int64_t buffer) {
    const Rows& factors = call_.a.factors;
    const View& basis = call_.a.basis;
    Element* const tokens = stages_ + buffer * S::kStage;
    Element* const ranks = tokens + kTokens * S::kFactorPitch;
    constexpr int kVectors = S::kStep / S::kPerVector, kWide = S::kWidth / S::kPerVector;
#pragma unroll
    for (int i = thread(); i < kTokens * kVectors; i += kThreads) {
      const int token = i / kVectors, at = i % kVectors * S::kPerVector;
      const int64_t source = places_[token].source;
      fetch(tokens + token * S::kFactorPitch + at, static_cast<const Element*>(factors.data) + source * factors.stride + r + at, 1,
            source < 0 ? 0 : factors.width - r - at, call_.whole_factors);
    }
#pragma unroll
    for (int i = thread(); i < S::kStep * kWide; i += kThreads) {
      const int row = i / kWide, at = i % kWide * S::kPerVector;
      fetch(ranks + row * S::kBasisPitch + at, basis_ + (r + row) * basis.stride[2] + at * basis.stride[3], basis.stride[3],
            r + row < factors.width ? basis.size[3] - at : 0, call_.whole_basis);
    }
  }

  // sums_ of matrix units: tile i of 8 channels as fragment_c has it; else [channel / 32][token], channel % 32 being the lane
  SA_DEVICE void multiply(const Element* stage) {
    const Element* const tokens = stage + warp() * 16 * S::kFactorPitch;
    const Element* const ranks = stage + kTokens * S::kFactorPitch;
    if constexpr (sizeof(Element) == 2) {
#pragma unroll
      for (int k = 0; k < S::kStep; k += 16) {
        uint32_t a[4];
        load_matrices<false>(a, tokens + lane() % 16 * S::kFactorPitch + k + lane() / 16 * 8);
#pragma unroll
        for (int i = 0; i < S::kWidth / 8; i += 2) {
          uint32_t b[4];
          load_matrices<true>(b, ranks + (k + lane() % 16) * S::kBasisPitch + i * 8 + lane() / 16 * 8);
          multiply_add<Element>(sums_[i], a, {b[0], b[1]});
          multiply_add<Element>(sums_[i + 1], a, {b[2], b[3]});
        }
      }
    } else {
#pragma unroll 2
      for (int k = 0; k < S::kStep; ++k)
#pragma unroll
        for (int token = 0; token < 16; ++token) {
          const float factor = tokens[token * S::kFactorPitch + k];
#pragma unroll
          for (int c = 0; c < S::kWidth / 32; ++c)
            sums_[c * 4 + token / 4][token % 4] += factor * ranks[k * S::kBasisPitch + c * 32 + lane()];
        }
    }
  }

  // this warp's keys, [16][kKeyPitch]
  SA_DEVICE void put(float* keys) const {
#pragma unroll
    for (int i = 0; i < S::kWidth / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (sizeof(Element) == 2) {
          const Fragment at = fragment_c(lane(), e);
          keys[at.row * S::kKeyPitch + i * 8 + at.column] = sums_[i][e];
        } else {
          keys[(i % 4 * 4 + e) * S::kKeyPitch + i / 4 * 32 + lane()] = sums_[i][e];
        }
      }
  }

  // the angle of a position is the sum of two
  SA_DEVICE void turn(int half) {
    const LowrankKeys& a = call_.a;
    const int pairs = int(a.pairs);
    for (int i = thread(); i < S::kHalf * pairs; i += kThreads) {
      const int token = i / pairs, pair = i % pairs;
      const int64_t source = places_[half + token].source;
      if (source < 0 || !call_.knows(a.positions[source])) continue;
      const uint32_t position = a.positions[source], n_near = uint32_t(a.n_near);
      const float* const far = a.far + int64_t(position / n_near) * 2 * pairs + pair;
      const float* const near = a.near + int64_t(position % n_near) * 2 * pairs + pair;
      const float cosine = far[0] * near[0] - far[pairs] * near[pairs];
      const float sine = far[pairs] * near[0] + far[0] * near[pairs];
      float* const one = keys_ + token * S::kKeyPitch + (a.interleaved ? 2 * pair : pair);
      float* const other = one + (a.interleaved ? 1 : pairs);
      const float x = *one, y = *other;
      *one = x * cosine - y * sine;
      *other = y * cosine + x * sine;
    }
  }

  SA_DEVICE void write(int half) const {
    const LowrankKeys& a = call_.a;
    const int width = int(a.basis.size[3]), vectors = (width + S::kPerVector - 1) / S::kPerVector;
    for (int i = thread(); i < S::kHalf * vectors; i += kThreads) {
      const int token = i / vectors, at = i % vectors * S::kPerVector;
      const PageTable::Place place = places_[half + token];
      if (place.source < 0 || !call_.knows(a.positions[place.source])) continue;
      const float* const key = keys_ + token * S::kKeyPitch + at;
      Element* const to = static_cast<Element*>(a.rows) + place.target * width + at;
      if (call_.whole_rows) store16(to, pack<Element>(key));
      else
        for (int e = 0; e < S::kPerVector && at + e < width; ++e) to[e] = from_float<Element>(key[e]);
    }
  }

  const Call& call_;
  const int64_t list_;
  Element* const stages_;            // [2]: factors [kTokens][kFactorPitch], basis [kStep][kBasisPitch]
  float* const keys_;                // [kHalf][kKeyPitch], where the stages were
  PageTable::Place* const places_;   // [kTokens], source -1 for none
  const Element* basis_;             // of the list
  float sums_[S::kWidth / 8][4];
};

template <class S>
SA_GLOBAL(kThreads) void rebuild(const Call call) {
  const int64_t list = block_x() / call.blocks, length = call.table.length(list);
  Block<S> block(call, list);
  for (int64_t first = block_x() % call.blocks * kTokens; first < length; first += call.blocks * kTokens) block.run(first, length);
}

template <class Element>
void run(Call call, const Stream& stream) {
  const LowrankKeys& a = call.a;
  const auto fits = [](const void* data, std::initializer_list<int64_t> steps) {
    bool all = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (int64_t step : steps) all &= step * int64_t(sizeof(Element)) % 16 == 0;
    return all;
  };
  const View& basis = a.basis;
  call.whole_factors = fits(a.factors.data, {a.factors.stride, a.factors.width});
  call.whole_basis = basis.stride[3] == 1 && fits(basis.data, {basis.stride[0], basis.stride[1], basis.stride[2], basis.size[3]});
  call.whole_rows = fits(a.rows, {basis.size[3]});
  const auto go = [&]<int kWidth>(std::integral_constant<int, kWidth>) {
    using S = Shape<Element, kWidth>;
    launch<rebuild<S>>({call.table.lists * call.blocks}, kThreads, S::kShared, stream, call);
  };
  if (basis.size[3] <= 64) go(std::integral_constant<int, 64>());
  else if (basis.size[3] <= 128) go(std::integral_constant<int, 128>());
  else go(std::integral_constant<int, 256>());
}

}  // namespace

// stream.work: the ends of PageTable
void lowrank_keys(const LowrankKeys& args, const Stream& stream) {
  const int64_t lists = args.basis.size[0] * args.basis.size[1], most = (args.n_rows + kTokens - 1) / kTokens;
  if (lists == 0 || args.pages == 0 || args.n_rows == 0) return;
  Call call{args,
            {args.starts, args.targets, args.counts, lists, args.pages, args.factors.count, args.n_rows,
             static_cast<int64_t*>(stream.work[0].data)},
            std::clamp<int64_t>(kBlocks / lists, 1, most),
            false,
            false,
            false};
  launch_list_pages(call.table, stream);
  switch (args.basis.dtype) {
    case DType::bf16: return run<bf16>(call, stream);
    case DType::fp16: return run<fp16>(call, stream);
    case DType::fp32: return run<float>(call, stream);
  }
}

}  // namespace SA_NAMESPACE
