// XAttention block scores: folded q times folded k, softmax over key groups, block sums, in one pass and without a logits buffer.
//
// Lanes are query groups. A key group is stride * D consecutive numbers of a contiguous k; a query group is the same length
// with its rows in the order of the antidiagonal, packed transposed, so every logit of a key group is one register lane.
// Each key block keeps its own running maximum, and its mass relative to that; blocks meet only at the end. A lane's result
// depends on its own row of logits alone, so neither threads nor neighbours nor the future change a bit of it.
//
// A Product computes the logits of a tile of key groups against packed queries: SimdProduct in float32 from any dtype,
// TileProduct with AMX from bfloat16. The softmax and the sums behind it are the Worker's, the same for both.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <memory>

#include "../checks.h"
#include "../ops.h"
#include "../spans.h"
#include "simd.h"
#if defined(SA_AMX)
#include "amx.h"
#endif

namespace SA_NAMESPACE {
namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// What the tasks of one batch row share.
struct Row {
  Span span;
  int64_t b, groups_q, groups_k;
};

// query row of a group that key row r meets
int64_t partner(const AntidiagonalScore& args, int64_t group, int64_t r) {
  const int64_t turned = args.stride - 1 - r - (args.alternate ? group % 2 : 0);
  return turned < 0 ? turned + args.stride : turned;
}

// Which key groups one lane may see, and what its logits are multiplied with.
template <int kPanel>
struct Panel {
  int64_t group0;         // first query group
  int lanes;              // groups in use
  int64_t low, high;      // key groups that any lane sees: low <= w < high
  int64_t all_low, all_high;  // key groups that every lane in use sees
  int32_t lane_low[kPanel], lane_high[kPanel];
  float factor[kPanel], last_factor[kPanel];  // of logits in base 2, for a whole and for the last key group

  int end_unit() const { return static_cast<int>(ceil_div(lanes, kLanes)); }
  // first register of lanes that sees key group w or an earlier one: later lanes see further
  int first_unit(int64_t w) const {
    int v = 0;
    while ((v + 1) * kLanes < lanes && lane_high[v * kLanes + kLanes - 1] <= w) ++v;
    return v;
  }
};

template <class Storage>
const Storage* at(const View& x, int64_t b, int64_t head, int64_t token) {
  return static_cast<const Storage*>(x.data) + b * x.stride[0] + head * x.stride[1] + token * x.stride[2];
}

typedef float F32x4 __attribute__((vector_size(16)));

// to[j][i] = from[i][j], 4 x 4
SA_INLINE void transpose4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  F32x4 a, b, c, d;
  std::memcpy(&a, from, 16), std::memcpy(&b, from + from_stride, 16);
  std::memcpy(&c, from + 2 * from_stride, 16), std::memcpy(&d, from + 3 * from_stride, 16);
  const F32x4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const F32x4 ef = __builtin_shufflevector(a, b, 2, 6, 3, 7), gh = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const F32x4 columns[4] = {
      __builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
      __builtin_shufflevector(ef, gh, 0, 1, 4, 5), __builtin_shufflevector(ef, gh, 2, 3, 6, 7)};
  for (int j = 0; j < 4; ++j) std::memcpy(to + j * to_stride, columns + j, 16);
}

// float32 products of any dtype: each key of the tile is a broadcast, the lanes of the queries are vectors.
template <class Element>
class SimdProduct {
 public:
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr int kColumns = 4;  // of 32 registers, 24 accumulate
#else
  static constexpr int kColumns = 2;  // of 16 registers, 12 accumulate
#endif
  static constexpr int kRows = 6;     // key groups per register tile: kRows x kColumns accumulators
  static constexpr int kPanel = 64;   // query groups in a panel
  static constexpr int kLines = 16;   // queries transposed at a time
  static constexpr int kTile = 48;    // key groups per pass over a panel
  static constexpr int kAlign = 1;    // key groups that a tile may start at
  static constexpr int kDepth = 128;  // of the stride * D products, how many at a time, between stores of the logits
  static constexpr int kHeads = 2;    // heads of a KV head that share converted keys
  struct Guard {};
  struct Prepared {
    Prepared(const AntidiagonalScore&, int64_t, const Parallel&) {}
  };

  SimdProduct(const AntidiagonalScore& args, const Prepared&)
      : a_(args),
        depth_(args.stride * args.q.size[3]),
        // transposes write whole groups of 4 rows
        queries_size_((kHeads * depth_ + 3) * kPanel),
        keys_size_(ceil_div(depth_, kDepth) * kDepth * kTile),
        lines_size_(kLines * ceil_div(args.q.size[3], 4) * 4) {}

  size_t bytes() const {
    const auto bytes = Scratch::bytes_for<float>;
    return bytes(queries_size_) + bytes(keys_size_) + bytes(lines_size_);
  }
  void take(Scratch& scratch) {
    queries_ = scratch.take<float>(queries_size_), keys_ = scratch.take<float>(keys_size_);
    lines_ = scratch.take<float>(lines_size_);
  }

  // to[(r * D + d) * kPanel + lane]; padding is 0
  void pack_queries(const Row& row, int64_t head, int h, const Panel<kPanel>& panel) {
    const View& q = a_.q;
    float* to = queries_ + h * depth_ * kPanel;
    const int64_t dim = q.size[3], padded = ceil_div(dim, 4) * 4;
    for (int l0 = 0; l0 < kPanel; l0 += kLines) {
      for (int64_t r = 0; r < a_.stride; ++r) {
        // whole rows first: they lie stride * D apart, so going across them would evict them from L1 before they are used up
        for (int l = 0; l < kLines; ++l) {
          const int64_t group = panel.group0 + l0 + l, token = group * a_.stride + partner(a_, group, r);
          float* line = lines_ + l * padded;
          if (l0 + l >= panel.lanes || token >= row.span.n_q) std::fill(line, line + dim, 0.f);
          else read_row<Element>(at<Storage>(q, row.b, head, row.span.row0 + token), q.stride[3], dim, line);
        }
        for (int64_t d = 0; d < padded; d += 4)
          for (int l = 0; l < kLines; l += 4)
            transpose4(lines_ + l * padded + d, padded, to + (r * dim + d) * kPanel + l0 + l, kPanel);
      }
    }
  }

  // element c of the folded axis of key group w0 + w goes to chunk(c / kDepth)[w][c % kDepth]; padding is 0
  void load_keys(const Row& row, int64_t kv_head, int64_t w0, int64_t end) {
    const int rows = static_cast<int>(std::min<int64_t>(kTile, end - w0));
    const View& k = a_.k;
    const int64_t dim = k.size[3];
    for (int w = 0; w < ceil_div(rows, kRows) * kRows; ++w) {
      int64_t c = 0;
      for (int64_t r = 0; r < a_.stride; ++r) {
        const int64_t token = (w0 + w) * a_.stride + r;
        const bool real = w < rows && token < row.span.n_k;
        const Storage* from = at<Storage>(k, row.b, kv_head, row.span.key0 + token);
        for (int64_t d = 0; d < dim;) {
          const int64_t n = std::min(dim - d, kDepth - c % kDepth);
          float* to = chunk(c) + w * kDepth + c % kDepth;
          if (real) read_row<Element>(from + d * k.stride[3], k.stride[3], n, to);
          else std::fill(to, to + n, 0.f);
          d += n, c += n;
        }
      }
    }
  }

  // logits[head][w][lane] of the loaded keys
  void multiply(int heads, int64_t w0, int rows, const Panel<kPanel>& panel, float* logits) const {
    for (int64_t c = 0; c < depth_; c += kDepth) {
      const int64_t n = std::min<int64_t>(kDepth, depth_ - c);
      for (int h = 0; h < heads; ++h) {
        const float* q = queries_ + (h * depth_ + c) * kPanel;
        float* to = logits + h * kTile * kPanel;
        for (int w = 0; w < rows; w += kRows)
          product(panel.first_unit(w0 + w), panel.end_unit(), chunk(c) + w * kDepth, q, n, to + w * kPanel, c == 0);
      }
    }
  }

 private:
  using Storage = typename Element::Storage;
  float* chunk(int64_t c) const { return keys_ + c / kDepth * (kTile * kDepth); }

  // logits[i][lane] += keys[i] . queries[lane], for kRows key groups and V registers of lanes
  template <int V>
  static void product(const float* keys, const float* q, int64_t n, float* logits, bool fresh) {
    F32 sum[kRows][V];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        if (fresh) sum[i][v] = F32{};
        else std::memcpy(&sum[i][v], logits + i * kPanel + v * kLanes, sizeof(F32));
      }
    for (int64_t c = 0; c < n; ++c) {
      F32 x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) std::memcpy(&x[v], q + c * kPanel + v * kLanes, sizeof(F32));
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[i][v] += keys[i * kDepth + c] * x[v];
    }
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) std::memcpy(logits + i * kPanel + v * kLanes, &sum[i][v], sizeof(F32));
  }

  static void product(int unit0, int unit1, const float* keys, const float* q, int64_t n, float* logits, bool fresh) {
    int lane = unit0 * kLanes;
    const int end = unit1 * kLanes;
    for (; lane + kColumns * kLanes <= end; lane += kColumns * kLanes)
      product<kColumns>(keys, q + lane, n, logits + lane, fresh);
    switch ((end - lane) / kLanes) {
      case 1: return product<1>(keys, q + lane, n, logits + lane, fresh);
      case 2: return product<2>(keys, q + lane, n, logits + lane, fresh);
      case 3: return product<3>(keys, q + lane, n, logits + lane, fresh);
    }
  }

  const AntidiagonalScore& a_;
  const int64_t depth_;
  const size_t queries_size_, keys_size_, lines_size_;
  float *queries_, *keys_, *lines_;  // [head][c][lane], see load_keys, see pack_queries
};

#if defined(SA_AMX)
// bfloat16 products on AMX: key groups are the rows of A, query groups the columns of B, in pairs of numbers of the folded axis.
class TileProduct {
 public:
  // 2 x 128 lanes share one reading of the keys: 4 bytes of K per cycle at full rate. In the prototype L3 was the bound, and
  // 128 lanes instead of 32 took 28% off. L2 holds their packed queries: 1 MiB at stride 16 and D 128.
  static constexpr int kPanel = 128, kHeads = 2;
  static constexpr int kTile = 2 * kTileRows, kAlign = kTile;  // key groups: two A tiles
  // of 32 numbers each, between stores of the logits: 16 KiB of keys stay in L1 for all lanes. With 4 steps the same product
  // ran 13% slower in the attention prototype. Neither constant has been measured in this kernel.
  static constexpr int kSteps = 8;
  using Guard = TileGuard;

  // All keys as tiles, [batch row][KV head][tile of key groups][step][2][16 key groups][32 numbers], zeros past the last key.
  // In place the rows of a tile would lie stride * D apart and share a few sets of L1.
  class Prepared {
   public:
    Prepared(const AntidiagonalScore& a, int64_t passes, const Parallel& parallel) : steps_(steps_of(a)) {
      if (passes < 2) return;  // read once: each task packs for itself
      const int64_t batch = a.k.size[0], kv_heads = a.k.size[1];
      tiles_ = ceil_div(ceil_div(a.k.size[2], a.stride), kTile), kv_heads_ = kv_heads;
      const int64_t total = batch * kv_heads * tiles_ * steps_ * kStep;
      // up to 64 MiB stay with the calling thread between calls: fresh pages cost more than the packing
      if (total * 2 <= (64 << 20)) {
        static thread_local Scratch kept;
        kept.reset(total * 2);
        keys_ = kept.take<uint16_t>(total);
      } else {
        owned_.reset(static_cast<uint16_t*>(std::aligned_alloc(64, total * 2)));
        if (!owned_) throw std::bad_alloc();
        keys_ = owned_.get();
      }
      parallel_tasks(parallel, batch * kv_heads * tiles_, [&](TaskQueue& queue) {
        for (int64_t task; queue.take(&task);) {
          const int64_t tile = task % tiles_, kv_head = task / tiles_ % kv_heads, b = task / tiles_ / kv_heads;
          const Span span = span_of(b, a.q.size[2], a.k.size[2], a.q_start, a.causal, a.padding);
          if (tile * kTile * a.stride < span.n_k) pack_keys(a, span, b, kv_head, tile * kTile, keys_ + task * steps_ * kStep);
        }
      });
    }
    // null where tasks pack for themselves
    const uint16_t* tile(int64_t b, int64_t kv_head, int64_t w0) const {
      return keys_ ? keys_ + ((b * kv_heads_ + kv_head) * tiles_ + w0 / kTile) * steps_ * kStep : nullptr;
    }

   private:
    const int64_t steps_;
    int64_t tiles_ = 0, kv_heads_ = 0;
    uint16_t* keys_ = nullptr;
    std::unique_ptr<uint16_t, decltype(&std::free)> owned_{nullptr, &std::free};
  };

  TileProduct(const AntidiagonalScore& args, const Prepared& prepared)
      : a_(args),
        prepared_(prepared),
        steps_(steps_of(args)),
        queries_size_(kHeads * kPairs * steps_ * kStep),
        own_size_(steps_ * kStep) {}

  size_t bytes() const { return Scratch::bytes_for<uint16_t>(queries_size_) + Scratch::bytes_for<uint16_t>(own_size_); }
  void take(Scratch& scratch) { queries_ = scratch.take<uint16_t>(queries_size_), own_ = scratch.take<uint16_t>(own_size_); }

  // [head][32 lanes][step][2]: row i of a tile holds numbers 2i and 2i + 1 of 16 lanes; padding is 0
  void pack_queries(const Row& row, int64_t head, int h, const Panel<kPanel>& panel) {
    for (int lane0 = 0; lane0 < ceil_div(panel.lanes, 32) * 32; lane0 += kLanes) {
      uint16_t* to = queries_ + (h * kPairs + lane0 / 32) * steps_ * kStep + lane0 / 16 % 2 * (kTileBytes / 2);
      const int64_t group0 = panel.group0 + lane0;
      const int lanes = std::clamp(panel.lanes - lane0, 0, kLanes);
      for (int64_t step = 0; step < steps_; ++step, to += kStep) {
        F32 words[kLanes];
        for (int l = 0; l < kLanes; ++l) {
          uint16_t line[32] = {};
          if (l < lanes)
            read_folded(a_, a_.q, step * 32, line, [&](int64_t r) -> const uint16_t* {
              const int64_t token = (group0 + l) * a_.stride + partner(a_, group0 + l, r);
              return token < row.span.n_q ? at<uint16_t>(a_.q, row.b, head, row.span.row0 + token) : nullptr;
            });
          std::memcpy(&words[l], line, 64);
        }
        transpose(words);
        std::memcpy(to, words, kTileBytes);
      }
    }
  }

  void load_keys(const Row& row, int64_t kv_head, int64_t w0, int64_t end) {
    keys_ = prepared_.tile(row.b, kv_head, w0);
    next_ = keys_ && w0 + kTile < end ? keys_ + steps_ * kStep : nullptr;
    if (keys_ == nullptr) pack_keys(a_, row.span, row.b, kv_head, w0, own_), keys_ = own_;
  }

  // logits[head][w][lane] of the loaded keys; on its own, so that the addresses of the loop stay in registers
  [[gnu::noinline]] void multiply(int heads, int64_t w0, int, const Panel<kPanel>& panel, float* logits) const {
    const int first = panel.first_unit(w0) / 2, end = (panel.end_unit() + 1) / 2;
    const int64_t steps = steps_;
    const uint16_t *const keys = keys_, *const next = next_;
    for (int h = 0; h < heads; ++h)
      for (int64_t step0 = 0; step0 < steps; step0 += kSteps)
        for (int pair = first; pair < end; ++pair) {
          // lines of the next tile that this product fetches into L2: spread evenly, not in a burst
          const int turn = h * (end - first) + pair - first, turns = heads * (end - first), lines = next ? kStepLines : 0;
          const int64_t line0 = lines * turn / turns, line1 = lines * (turn + 1) / turns;
          const uint16_t* q = queries_ + (h * kPairs + pair) * steps * kStep;
          float* to = logits + h * kTile * kPanel + pair * 32;
          if (step0 == 0) tiles_2x2_zero();
          else tiles_2x2_load(to, kPanel * 4);
          for (int64_t step = step0; step < std::min(step0 + kSteps, steps); ++step) {
            const uint16_t *a = keys + step * kStep, *b = q + step * kStep;
            tiles_2x2_product(a, a + kTileBytes / 2, 64, b, b + kTileBytes / 2);
            for (int64_t line = line0; line < line1; ++line) _mm_prefetch(next + step * kStep + line * 32, _MM_HINT_T1);
          }
          tiles_2x2_store(to, kPanel * 4);
        }
  }

 private:
  static constexpr int kPairs = kPanel / 32;              // of B tiles
  static constexpr int64_t kStep = 2 * kTileBytes / 2;    // numbers in the two tiles of a step
  static constexpr int kStepLines = 2 * kTileBytes / 64;  // cache lines of the same

  static int64_t steps_of(const AntidiagonalScore& a) { return ceil_div(a.stride * a.q.size[3], 32); }

  // 32 numbers of the folded axis from c on; row_of(r) is where row r of the group lies, null for zeros
  template <class RowOf>
  static SA_INLINE void read_folded(const AntidiagonalScore& a, const View& x, int64_t c, uint16_t* to, const RowOf& row_of) {
    const int64_t dim = x.size[3], step = x.stride[3];
    int64_t r = c / dim, d = c % dim;
    if (step == 1 && d + 32 <= dim) {
      if (const uint16_t* from = row_of(r)) std::memcpy(to, from + d, 64);
      else std::memset(to, 0, 64);
      return;
    }
    const uint16_t* from = row_of(r);
    for (int i = 0; i < 32; ++i) {
      to[i] = from && r < a.stride ? from[d * step] : 0;
      if (++d == dim) d = 0, from = ++r < a.stride ? row_of(r) : nullptr;
    }
  }

  // key groups [w0, w0 + kTile) in memory order
  static void pack_keys(const AntidiagonalScore& a, const Span& span, int64_t b, int64_t kv_head, int64_t w0, uint16_t* to) {
    for (int w = 0; w < kTile; ++w)
      for (int64_t step = 0; step < steps_of(a); ++step)
        read_folded(a, a.k, step * 32, to + step * kStep + w * 32, [&](int64_t r) -> const uint16_t* {
          const int64_t token = (w0 + w) * a.stride + r;
          return token < span.n_k ? at<uint16_t>(a.k, b, kv_head, span.key0 + token) : nullptr;
        });
  }

  const AntidiagonalScore& a_;
  const Prepared& prepared_;
  const int64_t steps_;
  const size_t queries_size_, own_size_;
  const uint16_t *keys_ = nullptr, *next_ = nullptr;  // tiles of the keys at hand, and of those that come next
  uint16_t *queries_, *own_;
};
#endif

// how logits are computed from a dtype in this library
template <class Element>
struct ProductOf {
  using type = SimdProduct<Element>;
};
#if defined(SA_AMX)
template <>
struct ProductOf<Bf16> {
  using type = TileProduct;
};
#endif

template <class Product>
class Worker {
 public:
  Worker(const AntidiagonalScore& args, const typename Product::Prepared& prepared)
      : a_(args), k_blocks_(ceil_div(args.k.size[2], args.block_k)), product_(args, prepared) {
    const size_t logits = kHeads * kTile * kPanel, blocks = kHeads * k_blocks_ * kPanel;
    Scratch& scratch = Scratch::mine();
    const auto bytes = Scratch::bytes_for<float>;
    scratch.reset(product_.bytes() + bytes(logits) + 2 * bytes(blocks));
    product_.take(scratch);
    logits_ = scratch.take<float>(logits), mass_ = scratch.take<float>(blocks), peak_ = scratch.take<float>(blocks);
  }

  // scores of query blocks [block0, block1) of `heads` heads; their key groups are those of one KV head
  void score(const Row& row, int64_t head0, int heads, int64_t block0, int64_t block1) {
    const int64_t q_blocks = ceil_div(a_.q.size[2], a_.block_q), heads_q = a_.q.size[1];
    float* out[kHeads];
    for (int h = 0; h < heads; ++h) {
      out[h] = a_.out + ((row.b * heads_q + head0 + h) * q_blocks + block0) * k_blocks_;
      std::fill(out[h], out[h] + (block1 - block0) * k_blocks_, 0.f);
    }
    if (row.span.n_k == 0) return;
    const int64_t per_block = a_.block_q / a_.stride;
    const int64_t end = std::min(block1 * per_block, row.groups_q);
    for (int64_t group = block0 * per_block; group < end; group += kPanel) {
      describe(row, group, static_cast<int>(std::min<int64_t>(kPanel, end - group)));
      for (int h = 0; h < heads; ++h) product_.pack_queries(row, head0 + h, h, panel_);
      scan(row, head0, heads);
      for (int h = 0; h < heads; ++h) collect(h, block0, out[h]);
    }
    for (int h = 0; h < heads; ++h) normalise(out[h], block1 - block0);
  }

 private:
  static constexpr int kPanel = Product::kPanel, kTile = Product::kTile, kHeads = Product::kHeads;

  void describe(const Row& row, int64_t group0, int lanes) {
    const Span& s = row.span;
    const int64_t stride = a_.stride, last_real = s.n_k - (row.groups_k - 1) * stride;
    panel_.group0 = group0, panel_.lanes = lanes;
    panel_.low = row.groups_k, panel_.high = 0, panel_.all_low = 0, panel_.all_high = row.groups_k;
    for (int l = 0; l < kPanel; ++l) {
      const int64_t group = group0 + l;
      int64_t low = 0, high = 0, pairs = 0, last_pairs = 0;
      if (l < lanes) {
        const int64_t first_q = s.q_start + group * stride;
        const int64_t last_q = s.q_start + std::min((group + 1) * stride, s.n_q) - 1;
        for (int64_t r = 0; r < stride; ++r) {
          const bool real = group * stride + partner(a_, group, r) < s.n_q;
          pairs += real, last_pairs += real && r < last_real;
        }
        high = a_.causal ? std::min(row.groups_k, last_q / stride + 1) : row.groups_k;
        if (a_.window) low = std::max<int64_t>(0, floor_div(first_q - a_.window + 1, stride));
        if (last_pairs == 0) high = std::min(high, row.groups_k - 1);
        low = std::min(low, high);
        panel_.all_low = std::max(panel_.all_low, low), panel_.all_high = std::min(panel_.all_high, high);
        if (low < high) panel_.low = std::min(panel_.low, low), panel_.high = std::max(panel_.high, high);
      }
      panel_.lane_low[l] = static_cast<int32_t>(low), panel_.lane_high[l] = static_cast<int32_t>(high);
      panel_.factor[l] = static_cast<float>(a_.scale * kLog2E / static_cast<double>(std::max<int64_t>(pairs, 1)));
      panel_.last_factor[l] = static_cast<float>(a_.scale * kLog2E / static_cast<double>(std::max<int64_t>(last_pairs, 1)));
    }
  }

  void scan(const Row& row, int64_t head0, int heads) {
    const int64_t kv_head = head0 / (a_.q.size[1] / a_.k.size[1]);
    const int64_t run = a_.block_k / a_.stride;
    first_block_ = panel_.low / run, end_block_ = panel_.low < panel_.high ? ceil_div(panel_.high, run) : first_block_;
    for (int h = 0; h < heads; ++h) {
      const int64_t at = (h * k_blocks_ + first_block_) * kPanel, n = (end_block_ - first_block_) * kPanel;
      std::fill(mass_ + at, mass_ + at + n, 0.f);
      std::fill(peak_ + at, peak_ + at + n, -FLT_MAX);
    }
    for (int64_t w0 = panel_.low - panel_.low % Product::kAlign; w0 < panel_.high; w0 += kTile) {
      const int rows = static_cast<int>(std::min<int64_t>(kTile, panel_.high - w0));
      product_.load_keys(row, kv_head, w0, panel_.high);
      product_.multiply(heads, w0, rows, panel_, logits_);
      for (int h = 0; h < heads; ++h) absorb(row, h, w0, rows);
    }
  }

  // logits of key groups [w0, w0 + rows), those that any lane sees, into the mass of their blocks
  void absorb(const Row& row, int h, int64_t w0, int rows) {
    const int64_t run = a_.block_k / a_.stride;
    for (int64_t w = std::max(w0, panel_.low); w < w0 + rows;) {
      const int64_t block = w / run, end = std::min((block + 1) * run, w0 + rows);
      const int n = static_cast<int>(end - w);
      const bool last = end == row.groups_k, edge = w < panel_.all_low || end > panel_.all_high;
      for (int v = panel_.first_unit(w); v < panel_.end_unit(); ++v) {
        float* x = logits_ + (h * kTile + (w - w0)) * kPanel + v * kLanes;
        const F32 factor = load(panel_.factor + v * kLanes);
        for (int i = 0; i < n - last; ++i) store(x + i * kPanel, load(x + i * kPanel) * factor);
        if (last) store(x + (n - 1) * kPanel, load(x + (n - 1) * kPanel) * load(panel_.last_factor + v * kLanes));
        if (edge) hide(x, w, n, v);
        const int64_t cell = (h * k_blocks_ + block) * kPanel + v * kLanes;
        const F32 before = load(peak_ + cell);
        F32 top = before;
        for (int i = 0; i < n; ++i) top = max(load(x + i * kPanel), top);
        F32 sum = load(mass_ + cell) * exp2_nonpositive(before - top);
        for (int i = 0; i < n; ++i) sum += exp2_nonpositive(load(x + i * kPanel) - top);
        store(mass_ + cell, sum), store(peak_ + cell, top);
      }
      w = end;
    }
  }

  [[gnu::noinline]] void hide(float* x, int64_t w0, int rows, int v) const {
    I32 low, high;
    std::memcpy(&low, panel_.lane_low + v * kLanes, sizeof low), std::memcpy(&high, panel_.lane_high + v * kLanes, sizeof high);
    for (int i = 0; i < rows; ++i) {
      const I32 w = splat(static_cast<int32_t>(w0 + i));
      store(x + i * kPanel, (w >= low) & (w < high) ? load(x + i * kPanel) : splat(kHidden));
    }
  }

  // adds the shares of the panel's lanes to the rows of their query blocks
  void collect(int h, int64_t block0, float* out) {
    const int64_t per_block = a_.block_q / a_.stride;
    alignas(64) float top[kPanel], weight[kPanel], share[kPanel];
    const float *mass = mass_ + h * k_blocks_ * kPanel, *peak = peak_ + h * k_blocks_ * kPanel;
    for (int v = 0; v < kPanel; v += kLanes) {
      F32 m = splat(-FLT_MAX), total = splat(0.f);
      for (int64_t b = first_block_; b < end_block_; ++b) m = max(load(peak + b * kPanel + v), m);
      for (int64_t b = first_block_; b < end_block_; ++b) total += load(mass + b * kPanel + v) * exp2_nonpositive(load(peak + b * kPanel + v) - m);
      store(top + v, m), store(weight + v, total);
    }
    // a row without any visible key, or with NaN or infinite logits, has no mass
    for (int l = 0; l < kPanel; ++l) weight[l] = weight[l] > 0 && weight[l] <= FLT_MAX ? 1 / weight[l] : 0;
    for (int64_t b = first_block_; b < end_block_; ++b) {
      for (int v = 0; v < kPanel; v += kLanes)
        store(share + v, load(mass + b * kPanel + v) * exp2_nonpositive(load(peak + b * kPanel + v) - load(top + v)) * load(weight + v));
      for (int l = 0; l < panel_.lanes;) {
        const int64_t block = (panel_.group0 + l) / per_block;
        const int end = static_cast<int>(std::min<int64_t>(panel_.lanes, (block + 1) * per_block - panel_.group0));
        float sum = 0;
        for (; l < end; ++l)
          if (weight[l] > 0) sum += share[l];
        out[(block - block0) * k_blocks_ + b] += sum;
      }
    }
  }

  void normalise(float* out, int64_t blocks) const {
    for (float* row = out; row < out + blocks * k_blocks_; row += k_blocks_) {
      double sum = 0;
      for (int64_t b = 0; b < k_blocks_; ++b) sum += row[b];
      const float inverse = sum > 0 ? static_cast<float>(1 / sum) : 0.f;
      for (int64_t b = 0; b < k_blocks_; ++b) row[b] *= inverse;
    }
  }

  const AntidiagonalScore& a_;
  const int64_t k_blocks_;
  Product product_;
  int64_t first_block_ = 0, end_block_ = 0;
  Panel<kPanel> panel_;
  float *logits_, *mass_, *peak_;  // [head][w][lane], [head][key block][lane]
};

}  // namespace

void antidiagonal_score(const AntidiagonalScore& args, const Parallel& parallel) {
  const int64_t heads = args.q.size[1], kv_heads = args.k.size[1], group = heads / std::max<int64_t>(kv_heads, 1);
  const int64_t per_block = args.block_q / args.stride, q_blocks = ceil_div(args.q.size[2], args.block_q);
  // the keys of a KV head stay in cache for all its tasks; its longest come first, so the last task of all is a short one
  with_element(args.q.dtype, [&](auto element) {
    using Product = typename ProductOf<decltype(element)>::type;
    const int64_t blocks = std::max<int64_t>(1, Product::kPanel / per_block), tiles = ceil_div(q_blocks, blocks);
    const int64_t parts = ceil_div(group, Product::kHeads);
    const typename Product::Prepared prepared(args, parts * ceil_div(q_blocks * per_block, Product::kPanel), parallel);
    parallel_tasks(parallel, args.q.size[0] * kv_heads * tiles * parts, [&](TaskQueue& queue) {
      [[maybe_unused]] const typename Product::Guard guard{};
      Worker<Product> worker(args, prepared);
      for (int64_t task; queue.take(&task);) {
        const int64_t part = task % parts, tile = tiles - 1 - task / parts % tiles, kv = task / (parts * tiles) % kv_heads;
        const int64_t b = task / (parts * tiles * kv_heads);
        const Span span = span_of(b, args.q.size[2], args.k.size[2], args.q_start, args.causal, args.padding);
        const Row row{span, b, ceil_div(span.n_q, args.stride), ceil_div(span.n_k, args.stride)};
        const int count = static_cast<int>(std::min<int64_t>(Product::kHeads, group - part * Product::kHeads));
        worker.score(row, kv * group + part * Product::kHeads, count, tile * blocks, std::min(q_blocks, (tile + 1) * blocks));
      }
    });
  });
}

}  // namespace SA_NAMESPACE
