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

constexpr int kVecs = kRegisters >= 32 ? 4 : 2;
constexpr int kLanes = kVecs * kWidth;  // query groups in a panel
constexpr int kRows = 6;                // key groups per register tile: kRows x kVecs accumulators
constexpr int kTile = 48;               // key groups per pass over a panel
constexpr int kDepth = 64;              // of the stride * D products, how many at a time: panel and keys stay in L1
constexpr int kHeads = 2;               // heads of a KV head that share converted keys
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
  alignas(64) int32_t lane_low[kLanes], lane_high[kLanes];
  alignas(64) float factor[kLanes], last_factor[kLanes];  // scale / real pairs, for a whole and for the last key group
};

class Worker {
 public:
  Worker(const AntidiagonalScore& args)
      : a_(args),
        depth_(args.stride * args.q.size[3]),
        k_blocks_(ceil_div(args.k.size[2], args.block_k)),
        panel_q_(kHeads * depth_ * kLanes),
        keys_(kTile * kDepth),
        logits_(kHeads * kTile * kLanes),
        mass_(kHeads * k_blocks_ * kLanes),
        peak_(kHeads * k_blocks_ * kLanes) {}

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
    for (int64_t group = block0 * per_block; group < end; group += kLanes) {
      describe(row, group, static_cast<int>(std::min<int64_t>(kLanes, end - group)));
      for (int h = 0; h < heads; ++h) pack_queries(row, head0 + h, panel_q_.data() + h * depth_ * kLanes);
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
    for (int l = 0; l < kLanes; ++l) {
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
      panel_.factor[l] = static_cast<float>(a_.scale / static_cast<double>(std::max<int64_t>(pairs, 1)));
      panel_.last_factor[l] = static_cast<float>(a_.scale / static_cast<double>(std::max<int64_t>(last_pairs, 1)));
    }
    if (lanes < kLanes) panel_.all_high = 0;
  }

  // to[(r * D + d) * kLanes + lane]; padding is 0
  void pack_queries(const Row& row, int64_t head, float* to) {
    const View& q = a_.q;
    const int64_t dim = q.size[3];
    for (int l0 = 0; l0 < kLanes; l0 += kWidth) {
      for (int64_t r = 0; r < a_.stride; ++r) {
        int64_t token[kWidth];
        for (int l = 0; l < kWidth; ++l) {
          const int64_t group = panel_.group0 + l0 + l;
          token[l] = group * a_.stride + partner(group, r);
          if (l0 + l >= panel_.lanes || token[l] >= row.span.n_q) token[l] = -1;
        }
        for (int64_t d = 0; d < dim; d += kWidth) {
          const int n = static_cast<int>(std::min<int64_t>(kWidth, dim - d));
          alignas(64) float square[kWidth * kWidth];
          for (int l = 0; l < kWidth; ++l) {
            float* line = square + l * kWidth;
            if (token[l] < 0) std::fill(line, line + kWidth, 0.f);
            else load_floats(q, offset(q, row.b, head, row.span.row0 + token[l]) + d * q.stride[3], n, line);
          }
          transpose(square);
          for (int i = 0; i < n; ++i) store(to + (r * dim + d + i) * kLanes + l0, load(square + i * kWidth));
        }
      }
    }
  }

  static int64_t offset(const View& x, int64_t b, int64_t head, int64_t token) {
    return b * x.stride[0] + head * x.stride[1] + token * x.stride[2];
  }

  // n numbers from element `at` on, along the last axis
  static void load_floats(const View& x, int64_t at, int64_t n, float* to) {
    if (x.stride[3] == 1) return to_floats(x.data, x.dtype, at, n, to);
    for (int64_t i = 0; i < n; ++i) to_floats(x.data, x.dtype, at + i * x.stride[3], 1, to + i);
  }

  // keys_[w][c] for c in [c0, c0 + n) of the folded axis; padding is 0
  void load_keys(const Row& row, int64_t kv_head, int64_t w0, int rows, int64_t c0, int64_t n) {
    const View& k = a_.k;
    const int64_t dim = k.size[3];
    for (int w = 0; w < rows; ++w) {
      float* to = keys_.data() + w * kDepth;
      for (int64_t c = c0; c < c0 + n;) {
        const int64_t token = (w0 + w) * a_.stride + c / dim, d = c % dim;
        const int64_t run = std::min(dim - d, c0 + n - c);
        if (token < row.span.n_k) load_floats(k, offset(k, row.b, kv_head, row.span.key0 + token) + d * k.stride[3], run, to);
        else std::fill(to, to + run, 0.f);
        to += run, c += run;
      }
    }
    const int padded = static_cast<int>(ceil_div(rows, kRows)) * kRows;
    for (int w = rows; w < padded; ++w) std::fill(keys_.data() + w * kDepth, keys_.data() + (w + 1) * kDepth, 0.f);
  }

  // first register of lanes that sees key group w or an earlier one: lanes are in rising order of their limit
  int first_vec(int64_t w) const {
    int v = 0;
    while (v < kVecs - 1 && panel_.lane_high[v * kWidth + kWidth - 1] <= w && (v + 1) * kWidth < panel_.lanes) ++v;
    return v;
  }

  void scan(const Row& row, int64_t head0, int heads) {
    const int64_t kv_head = head0 / (a_.q.size[1] / a_.k.size[1]);
    const int64_t run = a_.block_k / a_.stride;
    first_block_ = panel_.low / run, end_block_ = panel_.low < panel_.high ? ceil_div(panel_.high, run) : first_block_;
    for (int h = 0; h < heads; ++h) {
      const int64_t at = (h * k_blocks_ + first_block_) * kLanes, n = (end_block_ - first_block_) * kLanes;
      std::fill(mass_.data() + at, mass_.data() + at + n, 0.f);
      std::fill(peak_.data() + at, peak_.data() + at + n, -FLT_MAX);
    }
    const int last_vec = static_cast<int>(ceil_div(panel_.lanes, kWidth));
    for (int64_t w0 = panel_.low; w0 < panel_.high; w0 += kTile) {
      const int rows = static_cast<int>(std::min<int64_t>(kTile, panel_.high - w0));
      for (int64_t c = 0; c < depth_; c += kDepth) {
        const int64_t n = std::min<int64_t>(kDepth, depth_ - c);
        load_keys(row, kv_head, w0, rows, c, n);
        for (int h = 0; h < heads; ++h) {
          const float* q = panel_q_.data() + (h * depth_ + c) * kLanes;
          float* logits = logits_.data() + h * kTile * kLanes;
          for (int w = 0; w < rows; w += kRows)
            product(first_vec(w0 + w), last_vec, keys_.data() + w * kDepth, q, n, logits + w * kLanes, c == 0);
        }
      }
      for (int h = 0; h < heads; ++h) absorb(row, h, w0, rows, last_vec);
    }
  }

  template <int V>
  static void product(const float* keys, const float* q, int64_t n, float* logits, bool fresh) {
    Vec sum[kRows][V];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] = fresh ? splat(0.f) : load(logits + i * kLanes + v * kWidth);
    for (int64_t c = 0; c < n; ++c) {
      Vec x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] = load(q + c * kLanes + v * kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vec key = splat(keys[i * kDepth + c]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[i][v] = fma(key, x[v], sum[i][v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(logits + i * kLanes + v * kWidth, sum[i][v]);
  }

  static void product(int v0, int v1, const float* keys, const float* q, int64_t n, float* logits, bool fresh) {
    q += v0 * kWidth, logits += v0 * kWidth;
    switch (v1 - v0) {
      case 1: return product<1>(keys, q, n, logits, fresh);
      case 2: return product<2>(keys, q, n, logits, fresh);
      case 3: return product<std::min(3, kVecs)>(keys, q, n, logits, fresh);
      default: return product<kVecs>(keys, q, n, logits, fresh);
    }
  }

  // logits of key groups [w0, w0 + rows) into the mass of their blocks
  void absorb(const Row& row, int h, int64_t w0, int rows, int last_vec) {
    const int64_t run = a_.block_k / a_.stride;
    for (int64_t w = w0; w < w0 + rows;) {
      const int64_t block = w / run, end = std::min({(block + 1) * run, w0 + rows});
      const int n = static_cast<int>(end - w);
      float* logits = logits_.data() + (h * kTile + (w - w0)) * kLanes;
      const bool partial = end == row.groups_k && row.span.n_k % a_.stride;
      const bool edge = w < panel_.all_low || end > panel_.all_high;
      for (int v = first_vec(w); v < last_vec; ++v) {
        float* x = logits + v * kWidth;
        const Vec factor = load(panel_.factor + v * kWidth);
        for (int i = 0; i < n; ++i) store(x + i * kLanes, load(x + i * kLanes) * factor);
        if (partial) rescale_last(x + (n - 1) * kLanes, v);
        if (edge) hide(x, w, n, v);
        float* mass = mass_.data() + (h * k_blocks_ + block) * kLanes + v * kWidth;
        float* peak = peak_.data() + (h * k_blocks_ + block) * kLanes + v * kWidth;
        const Vec before = load(peak);
        Vec top = before;
        for (int i = 0; i < n; ++i) top = max(load(x + i * kLanes), top);
        Vec sum = load(mass) * exp(before - top);
        for (int i = 0; i < n; ++i) sum += exp(load(x + i * kLanes) - top);
        store(mass, sum), store(peak, top);
      }
      w = end;
    }
  }

  [[gnu::noinline]] void rescale_last(float* x, int v) const {
    for (int l = 0; l < kWidth; ++l) x[l] *= panel_.last_factor[v * kWidth + l] / panel_.factor[v * kWidth + l];
  }

  [[gnu::noinline]] void hide(float* x, int64_t w0, int rows, int v) const {
    for (int i = 0; i < rows; ++i)
      for (int l = 0; l < kWidth; ++l)
        if (w0 + i < panel_.lane_low[v * kWidth + l] || w0 + i >= panel_.lane_high[v * kWidth + l]) x[i * kLanes + l] = kHidden;
  }

  // adds the shares of the panel's lanes to the rows of their query blocks
  void collect(int h, int64_t block0, float* out) {
    const int64_t per_block = a_.block_q / a_.stride;
    alignas(64) float top[kLanes], weight[kLanes], share[kLanes];
    const float *mass = mass_.data() + h * k_blocks_ * kLanes, *peak = peak_.data() + h * k_blocks_ * kLanes;
    for (int v = 0; v < kLanes; v += kWidth) {
      Vec m = splat(-FLT_MAX), total = splat(0.f);
      for (int64_t b = first_block_; b < end_block_; ++b) m = max(load(peak + b * kLanes + v), m);
      for (int64_t b = first_block_; b < end_block_; ++b) total += load(mass + b * kLanes + v) * exp(load(peak + b * kLanes + v) - m);
      store(top + v, m), store(weight + v, total);
    }
    // a row without any visible key, or with NaN or infinite logits, has no mass
    for (int l = 0; l < kLanes; ++l) weight[l] = weight[l] > 0 && weight[l] <= FLT_MAX ? 1 / weight[l] : 0;
    for (int64_t b = first_block_; b < end_block_; ++b) {
      for (int v = 0; v < kLanes; v += kWidth)
        store(share + v, load(mass + b * kLanes + v) * exp(load(peak + b * kLanes + v) - load(top + v)) * load(weight + v));
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
  Floats panel_q_, keys_, logits_, mass_, peak_;
};

}  // namespace

void antidiagonal_score(const AntidiagonalScore& args, const Parallel& parallel) {
  const int64_t heads = args.q.size[1], kv_heads = args.k.size[1], group = heads / std::max<int64_t>(kv_heads, 1);
  const int64_t per_block = args.block_q / args.stride, q_blocks = ceil_div(args.q.size[2], args.block_q);
  const int64_t blocks = std::max<int64_t>(1, kLanes / per_block), tiles = ceil_div(q_blocks, blocks);
  const int64_t parts = ceil_div(group, kHeads);
  // the keys of a KV head stay in cache for all its tasks; its longest come first, so the last task of all is a short one
  parallel_tasks(parallel, args.q.size[0] * kv_heads * tiles * parts, [&](TaskQueue& queue) {
    Worker worker(args);
    for (int64_t task; queue.take(&task);) {
      const int64_t part = task % parts, tile = tiles - 1 - task / parts % tiles, kv = task / (parts * tiles) % kv_heads;
      const int64_t b = task / (parts * tiles * kv_heads);
      const Span span = span_of(b, args.q.size[2], args.k.size[2], args.q_start, args.causal, args.padding);
      const Row row{span, b, ceil_div(span.n_q, args.stride), ceil_div(span.n_k, args.stride)};
      const int count = static_cast<int>(std::min<int64_t>(kHeads, group - part * kHeads));
      worker.score(row, kv * group + part * kHeads, count, tile * blocks, std::min(q_blocks, (tile + 1) * blocks));
    }
  });
}

}  // namespace SA_NAMESPACE
