// The engine of block_sparse_attention for any CPU: float32 arithmetic for every dtype, half precision widened as it is loaded.
#pragma once
#include <limits>

#include "../spans.h"
#include "simd.h"

namespace SA_NAMESPACE {

// consecutive keys, counted from the first real key
struct Run {
  int64_t start, keys;
};

// below every logit, yet finite: subtracting it never makes a NaN
constexpr float kNoSink = -std::numeric_limits<float>::max();

// Outer-product blocking: kRows broadcasts against kVecs vectors. Accumulators fill the register file but for the operands.
// On AVX-512 4 x 6 beat 2 x 12 by about a tenth (one thread, D=128), though a panel of Q^T is then as large as L1.
#if defined(__AVX512F__)
constexpr int kSimdVecs = 4, kSimdRows = 6;
#elif defined(__AVX2__)
constexpr int kSimdVecs = 2, kSimdRows = 6;
#else
constexpr int kSimdVecs = 2, kSimdRows = 4;
#endif
constexpr int kSimdPanel = kSimdVecs * kLanes;

// s[r][lane] = sum over i of k[r][i] * q[i][lane]
template <int R>
void simd_scores(const float* __restrict k, int64_t stride, const float* __restrict q, int64_t d, float* __restrict s) {
  constexpr int kBases = (R + 2) / 3;  // x86 addresses base, base + stride, base + 2 stride: a third of the pointers
  const float* base[kBases];
  for (int i = 0; i < kBases; ++i) base[i] = k + 3 * i * stride;
  F32 c[R][kSimdVecs] = {};
  #pragma GCC unroll 2
  for (int64_t i = 0; i < d; ++i) {
    F32 b[kSimdVecs];
    #pragma GCC unroll 4
    for (int v = 0; v < kSimdVecs; ++v) b[v] = load(q + v * kLanes);
    #pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F32 x = splat(base[r / 3][(r % 3) * stride + i]);
      #pragma GCC unroll 4
      for (int v = 0; v < kSimdVecs; ++v) c[r][v] += x * b[v];
    }
    q += kSimdPanel;
  }
  #pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    #pragma GCC unroll 4
    for (int v = 0; v < kSimdVecs; ++v) store(s + r * kSimdPanel + v * kLanes, c[r][v]);
}

// o[r][lane] = o[r][lane] * keep[lane] + sum over keys of v[key][r] * p[key][lane]
template <int R>
void simd_values(const float* __restrict v, int64_t stride, const float* __restrict p, int64_t keys, const float* __restrict keep,
                 float* __restrict o) {
  F32 c[R][kSimdVecs] = {};
  #pragma GCC unroll 2
  for (int64_t i = 0; i < keys; ++i) {
    F32 b[kSimdVecs];
    #pragma GCC unroll 4
    for (int w = 0; w < kSimdVecs; ++w) b[w] = load(p + w * kLanes);
    #pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F32 x = splat(v[r]);
      #pragma GCC unroll 4
      for (int w = 0; w < kSimdVecs; ++w) c[r][w] += x * b[w];
    }
    p += kSimdPanel;
    v += stride;
  }
  #pragma GCC unroll 4
  for (int w = 0; w < kSimdVecs; ++w) {
    const F32 factor = load(keep + w * kLanes);
    #pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* at = o + r * kSimdPanel + w * kLanes;
      store(at, load(at) * factor + c[r][w]);
    }
  }
}

// all n rows in groups of kSimdRows, the last group by its own size
template <int R = kSimdRows - 1>
void simd_scores_tail(int64_t n, const float* k, int64_t stride, const float* q, int64_t d, float* s) {
  if (n == R) return simd_scores<R>(k, stride, q, d, s);
  if constexpr (R > 1) simd_scores_tail<R - 1>(n, k, stride, q, d, s);
}
template <int R = kSimdRows - 1>
void simd_values_tail(int64_t n, const float* v, int64_t stride, const float* p, int64_t keys, const float* keep, float* o) {
  if (n == R) return simd_values<R>(v, stride, p, keys, keep, o);
  if constexpr (R > 1) simd_values_tail<R - 1>(n, v, stride, p, keys, keep, o);
}

// rows [row0, row0 + n) of a matrix, transposed into to[column][lane] and scaled; lanes past n become 0
template <class Element>
void pack_lanes(const typename Element::Storage* from, int64_t row_stride, int64_t stride, int64_t n, int64_t columns, float scale,
                int panel, float* to) {
  for (int64_t lane0 = 0; lane0 < panel; lane0 += kLanes) {
    int64_t c = 0;
    const int64_t have = std::min<int64_t>(n - lane0, kLanes);
    if (stride == 1)
      for (; c + kLanes <= columns; c += kLanes) {
        F32 row[kLanes];
        for (int i = 0; i < kLanes; ++i) row[i] = i < have ? Element::load(from + (lane0 + i) * row_stride + c) * scale : F32{};
        transpose(row);
        for (int i = 0; i < kLanes; ++i) store(to + (c + i) * panel + lane0, row[i]);
      }
    for (; c < columns; ++c)
      for (int i = 0; i < kLanes; ++i)
        to[c * panel + lane0 + i] = i < have ? Element::get(from[(lane0 + i) * row_stride + c * stride]) * scale : 0.0f;
  }
}

// the way back: lanes [0, n) of from[column][lane], each times factor[lane], become rows
template <class Element>
void unpack_lanes(const float* from, int panel, const float* factor, int64_t n, int64_t columns, typename Element::Storage* to,
                  int64_t row_stride, int64_t stride) {
  for (int64_t lane0 = 0; lane0 < n; lane0 += kLanes) {
    int64_t c = 0;
    const int64_t have = std::min<int64_t>(n - lane0, kLanes);
    if (stride == 1)
      for (; c + kLanes <= columns; c += kLanes) {
        F32 row[kLanes];
        for (int i = 0; i < kLanes; ++i) row[i] = load(from + (c + i) * panel + lane0) * load(factor + lane0);
        transpose(row);
        for (int i = 0; i < have; ++i) Element::store(to + (lane0 + i) * row_stride + c, row[i]);
      }
    for (; c < columns; ++c)
      for (int i = 0; i < have; ++i)
        to[(lane0 + i) * row_stride + c * stride] = Element::put(from[c * panel + lane0 + i] * factor[lane0 + i]);
  }
}

// Running maximum m (base 2) and sum l of one panel. Turns logits into probabilities in place; keep[lane] is what earlier
// output must be multiplied by. False, and nothing done, if far > 0 and every logit is more than far below its maximum.
template <int kVecs>
SA_INLINE bool online_softmax(float* s, int keys, float far, float* m, float* l, float* keep) {
  constexpr int kPanel = kVecs * kLanes;
  F32 top[kVecs], total[kVecs];
  #pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) top[v] = splat(-std::numeric_limits<float>::infinity()), total[v] = F32{};
  for (int i = 0; i < keys; ++i)
    #pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) top[v] = max(top[v], load(s + int64_t(i) * kPanel + v * kLanes));
  if (far > 0) {
    I32 below = ~I32{};
    for (int v = 0; v < kVecs; ++v) below &= top[v] < load(m + v * kLanes) - far;
    if (!any(~below)) return false;
  }
  #pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    top[v] = max(load(m + v * kLanes), top[v]);
    store(keep + v * kLanes, exp2_nonpositive(load(m + v * kLanes) - top[v]));
    store(m + v * kLanes, top[v]);
  }
  for (int i = 0; i < keys; ++i)
    #pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* at = s + int64_t(i) * kPanel + v * kLanes;
      const F32 p = exp2_nonpositive(load(at) - top[v]);
      store(at, p);
      total[v] += p;
    }
  #pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) store(l + v * kLanes, load(l + v * kLanes) * load(keep + v * kLanes) + total[v]);
  return true;
}

// what each lane's output must be multiplied by, and its lse; a row that saw nothing has l == 0, and a NaN stays one
inline void finish_lanes(const float* m, const float* l, int64_t n, float* factor, float* lse) {
  for (int64_t i = 0; i < n; ++i) {
    factor[i] = l[i] == 0 ? 0.0f : 1.0f / l[i];
    lse[i] = l[i] == 0 ? -std::numeric_limits<float>::infinity() : float(m[i] * kLn2 + std::log(double(l[i])));
  }
}

template <class Element>
class SimdEngine {
  using Storage = typename Element::Storage;

 public:
  static constexpr int kVecs = kSimdVecs, kPanel = kSimdPanel, kTileKeys = 128, kAlign = 1;
  static constexpr bool kScalesLate = false;
  struct Guard {};
  struct Prepared {};
  static void prepare(const BlockSparseAttention&, const Span*, int64_t, const Parallel&, Prepared*) {}

  SimdEngine(const BlockSparseAttention& a, const Prepared&, int64_t max_rows)
      : a_(a), d_(a.q.size[3]), dv_(a.v.size[3]), far_(float(a.pv_threshold) * kLog2E) {
    const size_t lanes = (max_rows + kPanel - 1) / kPanel * kPanel;
    Scratch& scratch = Scratch::mine();
    auto bytes = [](size_t n) { return Scratch::bytes_for<float>(n); };
    scratch.reset(bytes(lanes * d_) + bytes(lanes * dv_) + 2 * bytes(lanes) + bytes(kPanel) + bytes(kTileKeys * kPanel) +
                  bytes(kTileKeys * d_) + bytes(kTileKeys * dv_));
    q_ = scratch.take<float>(lanes * d_);
    o_ = scratch.take<float>(lanes * dv_);
    m_ = scratch.take<float>(lanes);
    l_ = scratch.take<float>(lanes);
    keep_ = scratch.take<float>(kPanel);
    p_ = scratch.take<float>(kTileKeys * kPanel);
    k_tile_ = scratch.take<float>(kTileKeys * d_);
    v_tile_ = scratch.take<float>(kTileKeys * dv_);
  }

  // a new task: `rows` queries from row0 on (counted from the first real one); factor turns q.k into what the softmax wants
  void begin(int64_t b, int64_t h, const Span& span, int64_t row0, int64_t rows, float factor, float sink) {
    b_ = b, h_ = h;
    const int64_t kv_head = h / (a_.q.size[1] / a_.k.size[1]);
    const Storage* q = static_cast<const Storage*>(a_.q.data) + b * a_.q.stride[0] + h * a_.q.stride[1] +
                       (span.row0 + row0) * a_.q.stride[2];
    k_ = static_cast<const Storage*>(a_.k.data) + b * a_.k.stride[0] + kv_head * a_.k.stride[1] + span.key0 * a_.k.stride[2];
    v_ = static_cast<const Storage*>(a_.v.data) + b * a_.v.stride[0] + kv_head * a_.v.stride[1] + span.key0 * a_.v.stride[2];
    const int64_t panels = (rows + kPanel - 1) / kPanel;
    for (int64_t p = 0; p < panels; ++p)
      pack_lanes<Element>(q + p * kPanel * a_.q.stride[2], a_.q.stride[2], a_.q.stride[3], rows - p * kPanel, d_, factor, kPanel,
                          q_ + p * kPanel * d_);
    std::memset(o_, 0, panels * kPanel * dv_ * sizeof(float));
    std::fill(m_, m_ + rows, sink);
    // a lane without a query never asks for a tile
    std::fill(m_ + rows, m_ + panels * kPanel, std::numeric_limits<float>::max());
    std::fill(l_, l_ + panels * kPanel, sink == kNoSink ? 0.0f : 1.0f);
  }

  void load_tile(const Run* runs, int n_runs, int) {
    widen(k_, a_.k, d_, runs, n_runs, k_tile_);
    widen(v_, a_.v, dv_, runs, n_runs, v_tile_);
  }

  // one panel against the first `keys` keys of the tile; hide(s, first key, keys) masks logits in place
  template <class Hide>
  void attend(int panel, int keys, const Hide& hide) {
    const float* q = q_ + int64_t(panel) * kPanel * d_;
    int64_t k = 0;
    for (; k + kSimdRows <= keys; k += kSimdRows)
      simd_scores<kSimdRows>(k_tile_ + k * d_, d_, q, d_, p_ + k * kPanel);
    simd_scores_tail(keys - k, k_tile_ + k * d_, d_, q, d_, p_ + k * kPanel);
    hide(p_, 0, keys);
    if (!online_softmax<kVecs>(p_, keys, far_, m_ + panel * kPanel, l_ + panel * kPanel, keep_)) return;
    float* o = o_ + int64_t(panel) * kPanel * dv_;
    int64_t i = 0;
    for (; i + kSimdRows <= dv_; i += kSimdRows) simd_values<kSimdRows>(v_tile_ + i, dv_, p_, keys, keep_, o + i * kPanel);
    simd_values_tail(dv_ - i, v_tile_ + i, dv_, p_, keys, keep_, o + i * kPanel);
  }

  // write rows [row, row + rows) of the tensor and their lse
  void finish(int64_t row, int64_t rows, float* lse) {
    Storage* out = static_cast<Storage*>(a_.out.data) + b_ * a_.out.stride[0] + h_ * a_.out.stride[1];
    for (int64_t p = 0; p * kPanel < rows; ++p) {
      const int64_t n = std::min<int64_t>(rows - p * kPanel, kPanel), at = row + p * kPanel;
      finish_lanes(m_ + p * kPanel, l_ + p * kPanel, n, keep_, lse + at);
      unpack_lanes<Element>(o_ + p * kPanel * dv_, kPanel, keep_, n, dv_, out + at * a_.out.stride[2], a_.out.stride[2],
                            a_.out.stride[3]);
    }
  }

 private:
  // the rows of a tile as floats; float32 is copied too, the panels then find it in L2 (no slower than reading in place)
  static void widen(const Storage* from, const View& view, int64_t columns, const Run* runs, int n_runs, float* to) {
    for (int r = 0; r < n_runs; ++r)
      for (int64_t i = 0; i < runs[r].keys; ++i, to += columns)
        read_row<Element>(from + (runs[r].start + i) * view.stride[2], view.stride[3], columns, to);
  }

  const BlockSparseAttention& a_;
  const int64_t d_, dv_;
  const float far_;  // 2^-far: a tile of smaller probabilities is left out
  int64_t b_ = 0, h_ = 0;
  const Storage *k_ = nullptr, *v_ = nullptr;
  float *q_, *o_, *m_, *l_, *keep_, *p_, *k_tile_, *v_tile_;
};

}  // namespace SA_NAMESPACE
