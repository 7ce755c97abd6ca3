// XAttention block scores: folded q times folded k, softmax over key groups, block sums, in one pass and without a logits buffer.
//
// Lanes are query groups. A key group is stride * D consecutive numbers of a contiguous k; a query group is the same length
// with its rows in the order of the antidiagonal, packed transposed, so every logit of a key group is one register lane.
// Each key block keeps its own running maximum, and its mass relative to that; blocks meet only at the end. A lane's result
// depends on its own row of logits alone, so neither threads nor neighbours nor the future change a bit of it.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "../checks.h"
#include "../ops.h"
#include "../spans.h"
#include "simd.h"

namespace SA_NAMESPACE {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kColumns = 4;  // of 32 registers, 24 accumulate
#else
constexpr int kColumns = 2;  // of 16 registers, 12 accumulate
#endif
constexpr int kRows = 6;     // key groups per register tile: kRows x kColumns accumulators
constexpr int kPanel = 64;   // query groups in a panel
constexpr int kLines = 16;   // queries transposed at a time
constexpr int kTile = 48;    // key groups per pass over a panel
constexpr int kDepth = 128;  // of the stride * D products, how many at a time, between stores of the logits
constexpr int kHeads = 2;    // heads of a KV head that share converted keys
constexpr float kHidden = -std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// What the tasks of one batch row share.
struct Row {
  Span span;
  int64_t b, groups_q, groups_k;
};

// Which key groups one lane may see, and what its logits are multiplied with.
struct Panel {
  int64_t group0;         // first query group
  int lanes;              // groups in use
  int64_t low, high;      // key groups that any lane sees: low <= w < high
  int64_t all_low, all_high;  // key groups that every lane in use sees
  int32_t lane_low[kPanel], lane_high[kPanel];
  float factor[kPanel], last_factor[kPanel];  // of logits in base 2, for a whole and for the last key group
};

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

template <class Element>
class Worker {
 public:
  explicit Worker(const AntidiagonalScore& args)
      : a_(args), depth_(args.stride * args.q.size[3]), k_blocks_(ceil_div(args.k.size[2], args.block_k)) {
    // transposes write whole groups of 4 rows
    const size_t queries = (kHeads * depth_ + 3) * kPanel, keys = ceil_div(depth_, kDepth) * kDepth * kTile;
    const size_t lines = kLines * ceil_div(args.q.size[3], 4) * 4, logits = kHeads * kTile * kPanel;
    const size_t blocks = kHeads * k_blocks_ * kPanel;
    Scratch& scratch = Scratch::mine();
    const auto bytes = Scratch::bytes_for<float>;
    scratch.reset(bytes(queries) + bytes(keys) + bytes(lines) + bytes(logits) + 2 * bytes(blocks));
    queries_ = scratch.take<float>(queries), keys_ = scratch.take<float>(keys);
    lines_ = scratch.take<float>(lines), logits_ = scratch.take<float>(logits);
    mass_ = scratch.take<float>(blocks), peak_ = scratch.take<float>(blocks);
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
      for (int h = 0; h < heads; ++h) pack_queries(row, head0 + h, queries_ + h * depth_ * kPanel);
      scan(row, head0, heads);
      for (int h = 0; h < heads; ++h) collect(h, block0, out[h]);
    }
    for (int h = 0; h < heads; ++h) normalise(out[h], block1 - block0);
  }

 private:
  // query row that key row r of a group meets
  int64_t partner(int64_t group, int64_t r) const {
    const int64_t turned = a_.stride - 1 - r - (a_.alternate ? group % 2 : 0);
    return turned < 0 ? turned + a_.stride : turned;
  }

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
          const bool real = group * stride + partner(group, r) < s.n_q;
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

  // to[(r * D + d) * kPanel + lane]; padding is 0
  void pack_queries(const Row& row, int64_t head, float* to) {
    const View& q = a_.q;
    const int64_t dim = q.size[3], padded = ceil_div(dim, 4) * 4;
    for (int l0 = 0; l0 < kPanel; l0 += kLines) {
      for (int64_t r = 0; r < a_.stride; ++r) {
        // whole rows first: they lie stride * D apart, so going across them would evict them from L1 before they are used up
        for (int l = 0; l < kLines; ++l) {
          const int64_t group = panel_.group0 + l0 + l, token = group * a_.stride + partner(group, r);
          float* line = lines_ + l * padded;
          if (l0 + l >= panel_.lanes || token >= row.span.n_q) std::fill(line, line + dim, 0.f);
          else read_row<Element>(at(q, row.b, head, row.span.row0 + token), q.stride[3], dim, line);
        }
        for (int64_t d = 0; d < padded; d += 4)
          for (int l = 0; l < kLines; l += 4)
            transpose4(lines_ + l * padded + d, padded, to + (r * dim + d) * kPanel + l0 + l, kPanel);
      }
    }
  }

  using Storage = typename Element::Storage;
  static const Storage* at(const View& x, int64_t b, int64_t head, int64_t token) {
    return static_cast<const Storage*>(x.data) + b * x.stride[0] + head * x.stride[1] + token * x.stride[2];
  }

  // element c of the folded axis of key group w0 + w goes to chunk(c / kDepth)[w][c % kDepth]; padding is 0
  void load_keys(const Row& row, int64_t kv_head, int64_t w0, int rows) {
    const View& k = a_.k;
    const int64_t dim = k.size[3];
    for (int w = 0; w < ceil_div(rows, kRows) * kRows; ++w) {
      int64_t c = 0;
      for (int64_t r = 0; r < a_.stride; ++r) {
        const int64_t token = (w0 + w) * a_.stride + r;
        const bool real = w < rows && token < row.span.n_k;
        const Storage* from = at(k, row.b, kv_head, row.span.key0 + token);
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
  float* chunk(int64_t c) const { return keys_ + c / kDepth * (kTile * kDepth); }

  // first register of lanes that sees key group w or an earlier one: later lanes see further
  int first_unit(int64_t w) const {
    int v = 0;
    while ((v + 1) * kLanes < panel_.lanes && panel_.lane_high[v * kLanes + kLanes - 1] <= w) ++v;
    return v;
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
    const int end_unit = static_cast<int>(ceil_div(panel_.lanes, kLanes));
    for (int64_t w0 = panel_.low; w0 < panel_.high; w0 += kTile) {
      const int rows = static_cast<int>(std::min<int64_t>(kTile, panel_.high - w0));
      load_keys(row, kv_head, w0, rows);
      for (int64_t c = 0; c < depth_; c += kDepth) {
        const int64_t n = std::min<int64_t>(kDepth, depth_ - c);
        for (int h = 0; h < heads; ++h) {
          const float* q = queries_ + (h * depth_ + c) * kPanel;
          float* logits = logits_ + h * kTile * kPanel;
          for (int w = 0; w < rows; w += kRows)
            product(first_unit(w0 + w), end_unit, chunk(c) + w * kDepth, q, n, logits + w * kPanel, c == 0);
        }
      }
      for (int h = 0; h < heads; ++h) absorb(row, h, w0, rows, end_unit);
    }
  }

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

  // logits of key groups [w0, w0 + rows) into the mass of their blocks
  void absorb(const Row& row, int h, int64_t w0, int rows, int end_unit) {
    const int64_t run = a_.block_k / a_.stride;
    for (int64_t w = w0; w < w0 + rows;) {
      const int64_t block = w / run, end = std::min((block + 1) * run, w0 + rows);
      const int n = static_cast<int>(end - w);
      const bool last = end == row.groups_k, edge = w < panel_.all_low || end > panel_.all_high;
      for (int v = first_unit(w); v < end_unit; ++v) {
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
  const int64_t depth_, k_blocks_;
  int64_t first_block_ = 0, end_block_ = 0;
  Panel panel_;
  float *queries_, *keys_, *lines_;   // [head][c][lane], see load_keys, see pack_queries
  float *logits_, *mass_, *peak_;     // [head][w][lane], [head][key block][lane]
};

}  // namespace

void antidiagonal_score(const AntidiagonalScore& args, const Parallel& parallel) {
  const int64_t heads = args.q.size[1], kv_heads = args.k.size[1], group = heads / std::max<int64_t>(kv_heads, 1);
  const int64_t per_block = args.block_q / args.stride, q_blocks = ceil_div(args.q.size[2], args.block_q);
  const int64_t blocks = std::max<int64_t>(1, kPanel / per_block), tiles = ceil_div(q_blocks, blocks);
  const int64_t parts = ceil_div(group, kHeads);
  // the keys of a KV head stay in cache for all its tasks; its longest come first, so the last task of all is a short one
  with_element(args.q.dtype, [&](auto element) {
    parallel_tasks(parallel, args.q.size[0] * kv_heads * tiles * parts, [&](TaskQueue& queue) {
      Worker<decltype(element)> worker(args);
      for (int64_t task; queue.take(&task);) {
        const int64_t part = task % parts, tile = tiles - 1 - task / parts % tiles, kv = task / (parts * tiles) % kv_heads;
        const int64_t b = task / (parts * tiles * kv_heads);
        const Span span = span_of(b, args.q.size[2], args.k.size[2], args.q_start, args.causal, args.padding);
        const Row row{span, b, ceil_div(span.n_q, args.stride), ceil_div(span.n_k, args.stride)};
        const int count = static_cast<int>(std::min<int64_t>(kHeads, group - part * kHeads));
        worker.score(row, kv * group + part * kHeads, count, tile * blocks, std::min(q_blocks, (tile + 1) * blocks));
      }
    });
  });
}

}  // namespace SA_NAMESPACE
