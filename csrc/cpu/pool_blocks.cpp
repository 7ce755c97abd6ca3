// One vector per block of tokens, in one pass over the tensor.
//
// A block's vector stays in L1 while its tokens are added to it: loading and storing it again for each token is hidden behind
// the tokens, which come from memory. Where the heads of a token lie together they are pooled together, so that memory is read
// in long runs: head by head, 32 heads of 128 numbers ran 3 times slower. Sums are float32 in the order of the tokens.
#include <algorithm>
#include <limits>

#include "../ops.h"
#include "simd.h"

namespace SA_NAMESPACE {
namespace {

constexpr int64_t kTaskTokens = 512;  // at least, times heads: what a task reads takes much longer than fetching its number
constexpr int64_t kSums = 4096;       // numbers in the vectors of a task: 16 KiB of L1

struct Sum {
  static constexpr float kStart = 0;
  static SA_INLINE F32 of(F32 a, F32 x) { return a + x; }
  static float of(float a, float x) { return a + x; }
};
// a NaN wins, and stays
struct Max {
  static constexpr float kStart = -std::numeric_limits<float>::infinity();
  static SA_INLINE F32 of(F32 a, F32 x) { return (x > a) | (x != x) ? x : a; }
  static float of(float a, float x) { return x > a || x != x ? x : a; }
};
struct Min {
  static constexpr float kStart = std::numeric_limits<float>::infinity();
  static SA_INLINE F32 of(F32 a, F32 x) { return (x < a) | (x != x) ? x : a; }
  static float of(float a, float x) { return x < a || x != x ? x : a; }
};

// to[d] = Reduce(to[d], row[d])
template <class Reduce, class Element>
SA_INLINE void absorb(const typename Element::Storage* row, int64_t n, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(to + d, Reduce::of(load(to + d), Element::load(row + d)));
  for (; d < n; ++d) to[d] = Reduce::of(to[d], Element::get(row[d]));
}

typedef double F64 __attribute__((vector_size(4 * kLanes)));
typedef float HalfF32 __attribute__((vector_size(2 * kLanes)));

// line / |line|, and 0 where that is 0; in double, as squares of float32 can leave its range
void normalise(float* line, int64_t n) {
  F64 part{};
  double squares = 0;
  int64_t d = 0;
  for (; d + kLanes / 2 <= n; d += kLanes / 2) {
    HalfF32 x;
    std::memcpy(&x, line + d, sizeof x);
    const F64 wide = __builtin_convertvector(x, F64);
    part += wide * wide;
  }
  for (; d < n; ++d) squares += static_cast<double>(line[d]) * line[d];
  for (int i = 0; i < kLanes / 2; ++i) squares += part[i];
  if (squares == 0) return;
  const double inverse = 1 / std::sqrt(squares);
  for (d = 0; d < n; ++d) line[d] = static_cast<float>(line[d] * inverse);
}

// A block of some heads of a batch row: what a task does at a time.
struct Piece {
  int64_t b, head0, heads, token0, tokens;
};

// sums[head][d]; line has room for one token of one head
template <class Element, class Reduce>
void pool(const PoolBlocks& a, const Piece& piece, float* line, float* sums) {
  const View& x = a.x;
  const int64_t dim = x.size[3];
  const auto* token = static_cast<const typename Element::Storage*>(x.data) + piece.b * x.stride[0] + piece.head0 * x.stride[1] +
                      piece.token0 * x.stride[2];
  std::fill(sums, sums + piece.heads * dim, Reduce::kStart);
  for (int64_t t = 0; t < piece.tokens; ++t, token += x.stride[2])
    for (int64_t h = 0; h < piece.heads; ++h) {
      const auto* row = token + h * x.stride[1];
      float* to = sums + h * dim;
      if (a.kind != Pool::unit_mean && x.stride[3] == 1) {
        absorb<Reduce, Element>(row, dim, to);
        continue;
      }
      read_row<Element>(row, x.stride[3], dim, line);
      if (a.kind == Pool::unit_mean) normalise(line, dim);
      absorb<Reduce, Fp32>(line, dim, to);
    }
  if (a.kind == Pool::mean || a.kind == Pool::unit_mean)
    for (int64_t d = 0; d < piece.heads * dim; ++d) sums[d] /= static_cast<float>(piece.tokens);
}

template <class Element>
void pool(const PoolBlocks& a, const Piece& piece, float* line, float* sums) {
  switch (a.kind) {
    case Pool::max: return pool<Element, Max>(a, piece, line, sums);
    case Pool::min: return pool<Element, Min>(a, piece, line, sums);
    default: return pool<Element, Sum>(a, piece, line, sums);
  }
}

}  // namespace

void pool_blocks(const PoolBlocks& args, const Parallel& parallel) {
  const View& x = args.x;
  const int64_t heads = x.size[1], n = x.size[2], dim = x.size[3], blocks = (n + args.block - 1) / args.block;
  const bool heads_inside = x.stride[1] < x.stride[2];
  const int64_t group = heads_inside ? std::clamp<int64_t>(kSums / std::max<int64_t>(dim, 1), 1, std::max<int64_t>(heads, 1)) : 1;
  const int64_t groups = (heads + group - 1) / group, total = x.size[0] * groups * blocks;
  const int64_t run = std::max<int64_t>(1, kTaskTokens / (args.block * group));
  with_element(x.dtype, [&](auto element) {
    parallel_tasks(parallel, (total + run - 1) / run, [&](TaskQueue& queue) {
      Scratch& scratch = Scratch::mine();
      scratch.reset(Scratch::bytes_for<float>(dim) + Scratch::bytes_for<float>(group * dim));
      float *line = scratch.take<float>(dim), *sums = scratch.take<float>(group * dim);
      for (int64_t task; queue.take(&task);)
        for (int64_t i = task * run; i < std::min(total, (task + 1) * run); ++i) {
          const int64_t b = i / (groups * blocks), block = heads_inside ? i / groups % blocks : i % blocks;
          const int64_t head0 = (heads_inside ? i % groups : i / blocks % groups) * group;
          const int64_t first = std::clamp<int64_t>(args.padding.first ? args.padding.first[b] : 0, 0, n);
          const int64_t end = std::max<int64_t>(std::min<int64_t>(args.padding.last ? args.padding.last[b] : n, n), first);
          const int64_t token0 = first + block * args.block;
          const Piece piece{b, head0, std::min(group, heads - head0), token0, std::min(args.block, end - token0)};
          if (piece.tokens > 0) pool<decltype(element)>(args, piece, line, sums);
          else std::fill(sums, sums + piece.heads * dim, 0.f);
          for (int64_t h = 0; h < piece.heads; ++h)
            std::copy(sums + h * dim, sums + (h + 1) * dim, args.out + ((b * heads + head0 + h) * blocks + block) * dim);
        }
    });
  });
}

}  // namespace SA_NAMESPACE
