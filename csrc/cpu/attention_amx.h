// The engine of block_sparse_attention on AMX: bfloat16 in, float32 sums.
//
//   S^T[key][q] = K Q^T     A: rows of K as they lie, B: Q^T in pairs of channels, packed once per query block
//   O^T[dv][q] += V^T P     A: V^T as 1 KiB tiles, packed once per call, B: P in pairs of keys, written by the softmax
//
// Keys go in strips of 32. While the tiles of one strip are multiplied, the exponentials of the strip before are taken, a few
// vectors after each product, so that both kinds of unit are busy. P is relative to an anchor per query. It moves only when
// a logit lies more than kSlack powers of two above it: bf16 keeps its relative precision at any scale, and P stays below
// 2^kSlack, so no finite logit overflows and a rescale is rare. The sum is taken over the rounded P, the numbers V is
// multiplied by: a peaked softmax then loses nothing.
#pragma once
#include <memory>
#include <vector>

#include "amx.h"
#include "attention_simd.h"

namespace SA_NAMESPACE {

constexpr int kStrip = 32;
constexpr float kSlack = 8.0f;

// 2^x to 1e-4, a twentieth of a bf16 rounding; -inf gives 0, NaN stays NaN
SA_INLINE F32 exp2_bf16(F32 x) {
  const F32 r = (F32)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
  const F32 p = ((splat(0.078024523f) * r + 0.226067168f) * r + 0.695833529f) * r + 0.999925220f;
  return (F32)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)x);
}

class AmxEngine {
 public:
  static constexpr int kVecs = 4, kPanel = kVecs * kLanes, kTileKeys = 256, kAlign = kStrip;
  static constexpr bool kScalesLate = true;  // Q stays as it came: scaling it in bf16 would round it again
  using Guard = TileGuard;

  // V^T of every batch row and key head as tiles: [strip of 32 keys][16 channels][row = channel, 32 keys]
  struct Prepared {
    std::unique_ptr<uint16_t, decltype(&std::free)> owned{nullptr, &std::free};
    uint16_t* tiles = nullptr;  // null: packed by each task for itself
    int64_t strips = 0;
  };

  // visits: how many key blocks are read in all; packing everything pays once each is read more than once
  static void prepare(const BlockSparseAttention& a, const Span* spans, int64_t visits, const Parallel& parallel, Prepared* to) {
    const int64_t batch = a.k.size[0], kv_heads = a.k.size[1], n_k = a.k.size[2];
    if (visits * a.block_k <= batch * kv_heads * n_k) return;
    to->strips = (n_k + kStrip - 1) / kStrip;
    const int64_t per_strip = tiles_across(a.v.size[3]) * kTileBytes / 2, total = batch * kv_heads * to->strips * per_strip;
    // up to 64 MiB stay with the calling thread between calls: fresh pages cost more than the packing
    if (total * 2 <= (64 << 20)) {
      static thread_local Scratch kept;
      kept.reset(total * 2);
      to->tiles = kept.take<uint16_t>(total);
    } else {
      to->owned.reset(static_cast<uint16_t*>(std::aligned_alloc(64, total * 2)));
      if (!to->owned) throw std::bad_alloc();
      to->tiles = to->owned.get();
    }
    constexpr int64_t kChunk = 16;  // strips per task
    const int64_t chunks = (to->strips + kChunk - 1) / kChunk;
    parallel_tasks(parallel, batch * kv_heads * chunks, [&](TaskQueue& queue) {
      for (int64_t t; queue.take(&t);) {
        const int64_t b = t / chunks / kv_heads, h = t / chunks % kv_heads;
        const uint16_t* v = static_cast<const uint16_t*>(a.v.data) + b * a.v.stride[0] + h * a.v.stride[1] +
                            spans[b].key0 * a.v.stride[2];
        for (int64_t s = t % chunks * kChunk; s < std::min((t % chunks + 1) * kChunk, to->strips); ++s) {
          const int64_t start = s * kStrip, keys = std::min<int64_t>(spans[b].n_k - start, kStrip);
          if (keys <= 0) break;
          const uint16_t* rows[kStrip];
          for (int64_t i = 0; i < keys; ++i) rows[i] = v + (start + i) * a.v.stride[2];
          pack_values(rows, int(keys), a.v.stride[3], a.v.size[3], to->tiles + ((b * kv_heads + h) * to->strips + s) * per_strip);
        }
      }
    });
  }

  AmxEngine(const BlockSparseAttention& a, const Prepared& prepared, int64_t max_rows)
      : a_(a), prepared_(prepared), d_(a.q.size[3]), dv_(a.v.size[3]), steps_((d_ + 31) / 32), dv_tiles_(tiles_across(dv_)) {
    const size_t lanes = (max_rows + kPanel - 1) / kPanel * kPanel, half = kTileBytes / 2;
    const size_t q = lanes / 16 * steps_ * half, o = lanes * dv_tiles_ * 16, strips = kTileKeys / kStrip;
    const size_t k = strips * kStrip * steps_ * 32, v = strips * dv_tiles_ * half, p = strips * kVecs * half;
    Scratch& scratch = Scratch::mine();
    auto halves = [](size_t n) { return Scratch::bytes_for<uint16_t>(n); };
    auto floats = [](size_t n) { return Scratch::bytes_for<float>(n); };
    scratch.reset(halves(q) + halves(k) + halves(v) + halves(p) + floats(o) + 2 * floats(lanes) + floats(kPanel) +
                  floats(2 * kStrip * kPanel));
    q_ = scratch.take<uint16_t>(q);
    k_own_ = scratch.take<uint16_t>(k);
    v_own_ = scratch.take<uint16_t>(v);
    p_ = scratch.take<uint16_t>(p);
    o_ = scratch.take<float>(o);
    m_ = scratch.take<float>(lanes);
    l_ = scratch.take<float>(lanes);
    keep_ = scratch.take<float>(kPanel);
    s_ = scratch.take<float>(2 * kStrip * kPanel);
  }

  void begin(int64_t b, int64_t h, const Span& span, int64_t row0, int64_t rows, float factor, float sink) {
    b_ = b, h_ = h, factor_ = factor;
    kv_head_ = h / (a_.q.size[1] / a_.k.size[1]);
    auto at = [&](const View& x, int64_t head, int64_t row) {
      return static_cast<const uint16_t*>(x.data) + b * x.stride[0] + head * x.stride[1] + row * x.stride[2];
    };
    k_ = at(a_.k, kv_head_, span.key0), v_ = at(a_.v, kv_head_, span.key0);
    const int64_t lanes = (rows + kPanel - 1) / kPanel * kPanel;
    pack_queries(at(a_.q, h, span.row0 + row0), rows, lanes);
    std::memset(o_, 0, lanes * dv_tiles_ * 16 * sizeof(float));
    std::fill(m_, m_ + lanes, sink);
    std::fill(l_, l_ + lanes, sink == kNoSink ? 0.0f : 1.0f);
  }

  // where each strip's K rows and V^T tiles are: in place where they can be, else copied, zeros past the last key
  void load_tile(const Run* runs, int, int keys) {
    int run = 0;
    int64_t used = 0;
    for (int strip = 0; strip * kStrip < keys; ++strip) {
      const int n = std::min(keys - strip * kStrip, kStrip);
      const int64_t start = runs[run].start + used;
      const bool whole = n == kStrip && runs[run].keys - used >= kStrip;
      const bool aligned = start % kStrip == 0 && runs[run].keys - used >= n;
      const bool k_in_place = whole && a_.k.stride[3] == 1 && d_ % 32 == 0;
      const bool v_in_place = prepared_.tiles && aligned;
      int64_t key[kStrip];
      for (int i = 0; i < n; ++i) {
        key[i] = runs[run].start + used;
        if (++used == runs[run].keys) ++run, used = 0;
      }
      if (k_in_place) {
        k_strip_[strip] = k_ + start * a_.k.stride[2], k_stride_[strip] = a_.k.stride[2] * 2;
      } else {
        uint16_t* own = k_own_ + int64_t(strip) * kStrip * steps_ * 32;
        for (int i = 0; i < kStrip; ++i) {
          uint16_t* row = own + int64_t(i) * steps_ * 32;
          int64_t c = 0;
          if (i < n) {
            const uint16_t* from = k_ + key[i] * a_.k.stride[2];
            if (a_.k.stride[3] == 1) std::memcpy(row, from, d_ * 2), c = d_;
            for (; c < d_; ++c) row[c] = from[c * a_.k.stride[3]];
          }
          std::memset(row + c, 0, (steps_ * 32 - c) * 2);
        }
        k_strip_[strip] = own, k_stride_[strip] = steps_ * 64;
      }
      if (v_in_place) {
        const int64_t at = (b_ * a_.k.size[1] + kv_head_) * prepared_.strips + start / kStrip;
        v_strip_[strip] = prepared_.tiles + at * dv_tiles_ * (kTileBytes / 2);
      } else {
        uint16_t* own = v_own_ + int64_t(strip) * dv_tiles_ * (kTileBytes / 2);
        const uint16_t* rows[kStrip];
        for (int i = 0; i < n; ++i) rows[i] = v_ + key[i] * a_.v.stride[2];
        pack_values(rows, n, a_.v.stride[3], dv_, own);
        v_strip_[strip] = own;
      }
    }
  }

  // one panel against the first `keys` keys of the tile; hide(s, first key, keys) masks logits in place
  template <class Hide>
  void attend(int panel, int keys, const Hide& hide) {
    const int strips = (keys + kStrip - 1) / kStrip;
    float* o = o_ + int64_t(panel) * kPanel * dv_tiles_ * 16;
    F32 total[kVecs] = {}, top[kVecs];
    int from = 0;  // strips before this one are already in O
    scores(panel, 0, s_, [](int) {});
    for (int strip = 0; strip < strips; ++strip) {
      float* s = s_ + (strip % 2) * kStrip * kPanel;
      const int n = std::min(keys - strip * kStrip, kStrip);
      for (int i = n; i < kStrip; ++i)
        for (int v = 0; v < kVecs; ++v) store(s + i * kPanel + v * kLanes, splat(-std::numeric_limits<float>::infinity()));
      hide(s, strip * kStrip, n);
      raise_anchor(panel, s, top, [&] {
        multiply(o, from, strip);
        from = strip;
        add_total(panel, total);
      });
      auto some = [&](int pair0, int pair1) {
        for (int pair = pair0; pair < pair1; ++pair)
          probabilities(s + 2 * pair * kPanel, top, p_ + (int64_t(strip) * kVecs * kTileRows + pair) * 32, total);
      };
      if (strip + 1 < strips) {
        // a share of the exponentials after each step of the next strip's product
        const int chunks = int(2 * steps_);
        scores(panel, strip + 1, s_ + ((strip + 1) % 2) * kStrip * kPanel, [&](int chunk) {
          some(16 * chunk / chunks, 16 * (chunk + 1) / chunks);
        });
      } else {
        some(0, 16);
      }
    }
    multiply(o, from, strips);
    add_total(panel, total);
  }

  void finish(int64_t row, int64_t rows, float* lse) {
    uint16_t* out = static_cast<uint16_t*>(a_.out.data) + b_ * a_.out.stride[0] + h_ * a_.out.stride[1];
    for (int64_t p = 0; p * kPanel < rows; ++p) {
      const int64_t n = std::min<int64_t>(rows - p * kPanel, kPanel), at = row + p * kPanel;
      finish_lanes(m_ + p * kPanel, l_ + p * kPanel, n, keep_, lse + at);
      unpack_lanes<Bf16>(o_ + p * kPanel * dv_tiles_ * 16, kPanel, keep_, n, dv_, out + at * a_.out.stride[2], a_.out.stride[2],
                         a_.out.stride[3]);
    }
  }

 private:
  // channels in tiles of 16, an even number of them: the product takes two at a time
  static int64_t tiles_across(int64_t channels) { return (channels + 31) / 32 * 2; }

  // 16 x 16 words of two bf16 each, transposed
  static SA_INLINE void transpose_words(const F32* in, uint16_t* to) {
    F32 row[kLanes];
    #pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) row[i] = in[i];
    transpose(row);
    #pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) std::memcpy(to + i * 32, &row[i], 64);
  }

  // Q^T tiles [16 queries][32 channels]: row r holds channels 2r and 2r + 1 of 16 queries
  void pack_queries(const uint16_t* q, int64_t rows, int64_t lanes) {
    for (int64_t lane0 = 0; lane0 < lanes; lane0 += 16)
      for (int64_t step = 0; step < steps_; ++step) {
        F32 words[kLanes];
        for (int i = 0; i < 16; ++i) {
          uint16_t row[32] = {};
          if (lane0 + i < rows) {
            const uint16_t* from = q + (lane0 + i) * a_.q.stride[2];
            const int64_t n = std::min<int64_t>(d_ - step * 32, 32);
            if (a_.q.stride[3] == 1)
              std::memcpy(row, from + step * 32, n * 2);
            else
              for (int64_t c = 0; c < n; ++c) row[c] = from[(step * 32 + c) * a_.q.stride[3]];
          }
          std::memcpy(&words[i], row, 64);
        }
        transpose_words(words, q_ + (lane0 / 16 * steps_ + step) * (kTileBytes / 2));
      }
  }

  // V^T tiles of one strip: row = channel, 32 keys along it; zeros past the last key and the last channel
  static void pack_values(const uint16_t* const* rows, int keys, int64_t stride, int64_t channels, uint16_t* to) {
    for (int64_t tile = 0; tile < tiles_across(channels); ++tile, to += kTileBytes / 2) {
      const int64_t c0 = tile * 16, n = std::clamp<int64_t>(channels - c0, 0, 16);
      F32 words[kLanes];
      // word i: keys 2i and 2i + 1 of 16 channels
      for (int i = 0; i < 16; ++i) {
        uint16_t low[16] = {}, high[16] = {};
        if (stride == 1 && n == 16) {
          if (2 * i < keys) std::memcpy(low, rows[2 * i] + c0, 32);
          if (2 * i + 1 < keys) std::memcpy(high, rows[2 * i + 1] + c0, 32);
        } else {
          for (int64_t c = 0; c < n; ++c) {
            if (2 * i < keys) low[c] = rows[2 * i][(c0 + c) * stride];
            if (2 * i + 1 < keys) high[c] = rows[2 * i + 1][(c0 + c) * stride];
          }
        }
        U16 a, b;
        std::memcpy(&a, low, 32), std::memcpy(&b, high, 32);
        words[i] = (F32)(__builtin_convertvector(a, U32) | __builtin_convertvector(b, U32) << 16);
      }
      transpose_words(words, to);
    }
  }

  // logits of one strip against a panel, 32 queries at a time; between(i) is called after each of the 2 * steps_ products
  template <class Between>
  void scores(int panel, int strip, float* s, const Between& between) {
    const char* k = reinterpret_cast<const char*>(k_strip_[strip]);
    const int64_t stride = k_stride_[strip], per_lanes = steps_ * kTileBytes;
    int chunk = 0;
    for (int half = 0; half < 2; ++half) {
      const char* q = reinterpret_cast<const char*>(q_) + (panel * kVecs + half * 2) * per_lanes;
      tiles_2x2_zero();
      for (int64_t step = 0; step < steps_; ++step) {
        tiles_2x2_product(k + step * 64, k + 16 * stride + step * 64, stride, q + step * kTileBytes, q + per_lanes + step * kTileBytes);
        between(chunk++);
      }
      tiles_2x2_store(s + half * 32, kPanel * 4);
    }
  }

  // O^T += V^T P over strips [from, to)
  void multiply(float* o, int from, int to) {
    if (from == to) return;
    for (int64_t tile = 0; tile < dv_tiles_; tile += 2)
      for (int half = 0; half < 2; ++half) {
        float* at = o + tile * 16 * kPanel + half * 32;
        tiles_2x2_load(at, kPanel * 4);
        for (int strip = from; strip < to; ++strip) {
          const char* v = reinterpret_cast<const char*>(v_strip_[strip]) + tile * kTileBytes;
          const char* p = reinterpret_cast<const char*>(p_) + (int64_t(strip) * kVecs + half * 2) * kTileBytes;
          tiles_2x2_product(v, v + kTileBytes, 64, p, p + kTileBytes);
        }
        tiles_2x2_store(at, kPanel * 4);
      }
  }

  // Anchors of the panel for this strip. Where a logit is too far above, flush() first brings what was summed up to date.
  template <class Flush>
  SA_INLINE void raise_anchor(int panel, const float* s, F32* anchor, const Flush& flush) {
    F32 high[kVecs];
    #pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) high[v] = load(s + v * kLanes);
    #pragma GCC unroll 4
    for (int i = 1; i < kStrip; ++i)
      #pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) high[v] = max(high[v], load(s + i * kPanel + v * kLanes));
    float* m = m_ + panel * kPanel;
    I32 moved{};
    #pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      high[v] *= factor_;
      anchor[v] = load(m + v * kLanes);
      moved |= high[v] > anchor[v] + kSlack;
    }
    if (__builtin_expect(!any(moved), 1)) return;
    flush();
    float* l = l_ + panel * kPanel;
    for (int v = 0; v < kVecs; ++v) {
      const F32 raised = max(anchor[v], high[v]);
      const F32 keep = exp2_nonpositive(anchor[v] - raised);
      anchor[v] = raised;
      store(m + v * kLanes, raised);
      store(l + v * kLanes, load(l + v * kLanes) * keep);
      float* o = o_ + int64_t(panel) * kPanel * dv_tiles_ * 16 + v * kLanes;
      for (int64_t c = 0; c < dv_; ++c) store(o + c * kPanel, load(o + c * kPanel) * keep);
    }
  }

  // two keys of a panel: rounded probabilities as pairs, one row of each of the strip's four tiles, and their sums
  SA_INLINE void probabilities(const float* s, const F32* anchor, uint16_t* p, F32* total) {
    #pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const F32 even = exp2_bf16(load(s + v * kLanes) * factor_ - anchor[v]);
      const F32 odd = exp2_bf16(load(s + kPanel + v * kLanes) * factor_ - anchor[v]);
      // to the nearest, ties up: P is not negative
      const U32 a = (U32)even + 0x8000u, b = ((U32)odd + 0x8000u) & 0xffff0000u;
      total[v] += (F32)(a & 0xffff0000u) + (F32)b;
      const U32 pair = a >> 16 | b;
      std::memcpy(p + v * (kTileBytes / 2), &pair, 64);
    }
  }

  void add_total(int panel, F32* total) {
    float* l = l_ + panel * kPanel;
    for (int v = 0; v < kVecs; ++v) store(l + v * kLanes, load(l + v * kLanes) + total[v]), total[v] = F32{};
  }

  const BlockSparseAttention& a_;
  const Prepared& prepared_;
  const int64_t d_, dv_, steps_, dv_tiles_;
  int64_t b_ = 0, h_ = 0, kv_head_ = 0;
  float factor_ = 1;
  const uint16_t *k_ = nullptr, *v_ = nullptr;
  const uint16_t *k_strip_[kTileKeys / kStrip], *v_strip_[kTileKeys / kStrip];
  int64_t k_stride_[kTileKeys / kStrip];
  uint16_t *q_, *k_own_, *v_own_, *p_;
  float *o_, *m_, *l_, *keep_, *s_;
};

}  // namespace SA_NAMESPACE
