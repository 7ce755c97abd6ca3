// Softmax over key blocks of pooled dot products.
//
// Lanes are query blocks, packed transposed, so that softmax runs down registers; each key block is a broadcast from where it
// lies. Key blocks that no lane reaches are not computed, and a lane's result depends on its own row of logits alone.
#include <algorithm>
#include <cfloat>
#include <limits>

#include "../ops.h"
#include "../spans.h"
#include "simd.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kKeys = 8;  // key blocks per register tile: as many independent sums hide the latency of a product
constexpr float kHidden = -std::numeric_limits<float>::infinity();

const float* row_of(const View& x, int64_t b, int64_t head, int64_t block) {
  return static_cast<const float*>(x.data) + b * x.stride[0] + head * x.stride[1] + block * x.stride[2];
}

class Worker {
 public:
  explicit Worker(const PooledScore& args) : a_(args), dim_(args.q_pooled.size[3]), k_blocks_(args.k_pooled.size[2]) {
    const int64_t lines = (dim_ + kLanes - 1) / kLanes * kLanes, logits = k_blocks_ + std::max(kKeys, kLanes);
    const auto bytes = Scratch::bytes_for<float>;
    Scratch& scratch = Scratch::mine();
    scratch.reset(2 * bytes(lines * kLanes) + bytes(logits * kLanes));
    rows_ = scratch.take<float>(lines * kLanes), queries_ = scratch.take<float>(lines * kLanes);
    logits_ = scratch.take<float>(logits * kLanes);
  }

  // the kLanes query blocks from block0 on
  void score(const Span& span, int64_t b, int64_t head, int64_t block0) {
    const int64_t q_blocks = a_.q_pooled.size[2], real = (span.n_q + a_.block_q - 1) / a_.block_q;
    const int lanes = static_cast<int>(std::clamp<int64_t>(real - block0, 0, kLanes));
    float* out = a_.out + ((b * a_.q_pooled.size[1] + head) * q_blocks + block0) * k_blocks_;
    std::fill(out, out + std::min<int64_t>(kLanes, q_blocks - block0) * k_blocks_, 0.f);
    I32 lane_low{}, lane_high{};  // reached: low <= key block < high
    int64_t low = k_blocks_, high = 0;
    for (int l = 0; l < lanes; ++l) {
      const Reach lane = reach(a_, span, block0 + l);
      lane_low[l] = static_cast<int32_t>(lane.low), lane_high[l] = static_cast<int32_t>(std::min(lane.high + 1, k_blocks_));
      if (lane_low[l] < lane_high[l]) low = std::min<int64_t>(low, lane_low[l]), high = std::max<int64_t>(high, lane_high[l]);
    }
    if (low >= high) return;
    pack(b, head, block0, lanes);
    const float* keys = row_of(a_.k_pooled, b, head / (a_.q_pooled.size[1] / a_.k_pooled.size[1]), 0);
    for (int64_t j = low; j < high; j += kKeys) multiply(keys, j, high, logits_ + (j - low) * kLanes);
    softmax(low, high, lane_low, lane_high, static_cast<float>(a_.scale.at(b, head) * static_cast<double>(kLog2E)));
    write(low, high, lanes, out);
  }

 private:
  // queries_[d][lane]; lanes past the last are zeros
  void pack(int64_t b, int64_t head, int64_t block0, int lanes) {
    const int64_t padded = (dim_ + kLanes - 1) / kLanes * kLanes;
    for (int l = 0; l < kLanes; ++l) {
      float* line = rows_ + l * padded;
      if (l < lanes) read_row<Fp32>(row_of(a_.q_pooled, b, head, block0 + l), a_.q_pooled.stride[3], dim_, line);
      std::fill(line + (l < lanes ? dim_ : 0), line + padded, 0.f);
    }
    for (int64_t d = 0; d < padded; d += kLanes) {
      F32 square[kLanes];
      for (int l = 0; l < kLanes; ++l) square[l] = load(rows_ + l * padded + d);
      transpose(square);
      std::memcpy(queries_ + d * kLanes, square, sizeof square);
    }
  }

  // to[i][lane] = keys[j + i] . queries[lane]; past the last key block its numbers are repeated
  void multiply(const float* keys, int64_t j, int64_t end, float* to) const {
    const int64_t step = a_.k_pooled.stride[3];
    const float* row[kKeys];
    F32 sum[kKeys];
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) row[i] = keys + std::min(j + i, end - 1) * a_.k_pooled.stride[2], sum[i] = F32{};
    for (int64_t d = 0; d < dim_; ++d) {
      const F32 x = load(queries_ + d * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) sum[i] += row[i][d * step] * x;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) store(to + i * kLanes, sum[i]);
  }

  // logits of key blocks [low, high) become shares, exactly 0 where a lane does not reach
  void softmax(int64_t low, int64_t high, I32 lane_low, I32 lane_high, float factor) {
    F32 top = splat(kHidden), total{};
    for (int64_t j = low; j < high; ++j) {
      float* at = logits_ + (j - low) * kLanes;
      const I32 block = splat(static_cast<int32_t>(j));
      const F32 x = (block >= lane_low) & (block < lane_high) ? load(at) * factor : splat(kHidden);
      store(at, x);
      top = max(x, top);
    }
    for (int64_t j = low; j < high; ++j) {
      float* at = logits_ + (j - low) * kLanes;
      const F32 p = exp2_nonpositive(load(at) - top);
      store(at, p);
      total += p;
    }
    // a row with NaN or infinite logits has no shares
    const I32 good = (total > 0.0f) & (total <= FLT_MAX);
    const F32 weight = 1.0f / total;
    for (int64_t j = low; j < high; ++j) {
      float* at = logits_ + (j - low) * kLanes;
      store(at, good ? load(at) * weight : F32{});
    }
  }

  void write(int64_t low, int64_t high, int lanes, float* out) const {
    for (int64_t j = low; j < high; j += kLanes) {
      F32 square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(logits_ + (j - low + i) * kLanes);
      transpose(square);
      const int n = static_cast<int>(std::min<int64_t>(kLanes, high - j));
      for (int l = 0; l < lanes; ++l) store_first(out + l * k_blocks_ + j, square[l], n);
    }
  }

  const PooledScore& a_;
  const int64_t dim_, k_blocks_;
  float *rows_, *queries_, *logits_;  // [lane][d], [d][lane], [key block - low][lane]
};

}  // namespace

void pooled_score(const PooledScore& args, const Parallel& parallel) {
  const int64_t heads = args.q_pooled.size[1], panels = (args.q_pooled.size[2] + kLanes - 1) / kLanes;
  // heads of a group follow each other and share the key blocks in cache; the longest panels come first
  parallel_tasks(parallel, args.q_pooled.size[0] * heads * panels, [&](TaskQueue& queue) {
    Worker worker(args);
    for (int64_t task; queue.take(&task);) {
      const int64_t panel = panels - 1 - task % panels, head = task / panels % heads, b = task / (panels * heads);
      worker.score(span_of(b, args.n_q, args.n_k, args.q_start, args.causal, args.padding), b, head, panel * kLanes);
    }
  });
}

}  // namespace SA_NAMESPACE
