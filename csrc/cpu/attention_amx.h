// The engine of block_sparse_attention on AMX: bfloat16 products, float32 sums.
//
//   S^T[key][q] = K Q^T     A: rows of K as they lie, B: Q^T in pairs of channels, packed once per query block
//   O^T[dv][q] += V^T P     A: V^T as 1 KiB tiles, packed once per call, B: P in pairs of keys, written by the softmax
//
// Keys go in strips of 32. While the tiles of one strip are multiplied, the exponentials of the strip before are taken, a few
// vectors after each product, so that both kinds of unit are busy. P is relative to an anchor per query. It moves only when
// a logit lies more than kSlack powers of two above it: bf16 keeps its relative precision at any scale, and P stays below
// 2^kSlack, so no finite logit overflows and a rescale is rare. The sum is taken over the rounded P, the numbers V is
// multiplied by: a peaked softmax then loses nothing.
//
// float16 and float32 values are written as a sum of two or three bfloat16 terms, 8 bits each, and the products of terms that
// reach the last bit of the dtype are added up: 3 tile products for float16, 6 for float32.
#pragma once
#include <iterator>
#include <memory>
#include <type_traits>
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

// which terms are multiplied with which, the small products first
struct TermPair {
  int a, b;
};
constexpr TermPair kPairs1[] = {{0, 0}}, kPairs2[] = {{0, 1}, {1, 0}, {0, 0}},
                   kPairs3[] = {{0, 2}, {2, 0}, {1, 1}, {0, 1}, {1, 0}, {0, 0}};
template <int kTerms>
constexpr const auto& term_pairs() {
  if constexpr (kTerms == 1)
    return kPairs1;
  else if constexpr (kTerms == 2)
    return kPairs2;
  else
    return kPairs3;
}

// n values, `stride` apart, as terms: to[term * term_stride + i]
template <class Element, int kTerms>
SA_INLINE void split_terms(const typename Element::Storage* from, int64_t stride, int64_t n, uint16_t* to, int64_t term_stride) {
  int64_t i = 0;
  if constexpr (kTerms == 1) {
    static_assert(std::is_same_v<Element, Bf16>);
    if (stride == 1) std::memcpy(to, from, n * 2), i = n;
    for (; i < n; ++i) to[i] = from[i * stride];
  } else {
    if (stride == 1)
      for (; i + kLanes <= n; i += kLanes) {
        F32 rest = Element::load(from + i);
        #pragma GCC unroll 3
        for (int t = 0; t < kTerms; ++t) {
          const U16 term = narrow_bf16(rest);
          std::memcpy(to + t * term_stride + i, &term, sizeof term);
          rest -= widen_bf16(term);
        }
      }
    for (; i < n; ++i) {
      float rest = Element::get(from[i * stride]);
      for (int t = 0; t < kTerms; ++t) {
        const uint16_t term = float_to_bf16(rest);
        to[t * term_stride + i] = term;
        rest -= bf16_to_float(term);
      }
    }
  }
}

template <class Element, int kTerms>
class AmxEngine {
  using Storage = typename Element::Storage;
  static constexpr int64_t kTile = kTileBytes / 2;  // bf16 values in a tile

 public:
  static constexpr int kVecs = 4, kPanel = kVecs * kLanes, kTileKeys = 256, kAlign = kStrip;
  static constexpr bool kScalesLate = true;  // Q stays as it came: scaling it in bf16 would round it again
  using Guard = TileGuard;

  // V^T of every batch row and key head as tiles: [strip of 32 keys][term][16 channels][row = channel, 32 keys]
  struct Prepared {
    std::unique_ptr<uint16_t, decltype(&std::free)> owned{nullptr, &std::free};
    uint16_t* tiles = nullptr;  // null: packed by each task for itself
    int64_t strips = 0;
  };

  // run_keys: how many keys the tasks read in runs; packing everything pays once each is read more than once
  static void prepare(const BlockSparseAttention& a, const Span* spans, int64_t run_keys, const Parallel& parallel, Prepared* to) {
    const int64_t batch = a.k.size[0], kv_heads = a.k.size[1], n_k = a.k.size[2];
    if (run_keys <= batch * kv_heads * n_k) return;
    to->strips = (n_k + kStrip - 1) / kStrip;
    const int64_t per_strip = kTerms * tiles_across(a.v.size[3]) * kTile, total = batch * kv_heads * to->strips * per_strip;
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
        const Storage* v = static_cast<const Storage*>(a.v.data) + b * a.v.stride[0] + h * a.v.stride[1] +
                           spans[b].key0 * a.v.stride[2];
        for (int64_t s = t % chunks * kChunk; s < std::min((t % chunks + 1) * kChunk, to->strips); ++s) {
          const int64_t start = s * kStrip, keys = std::min<int64_t>(spans[b].n_k - start, kStrip);
          if (keys <= 0) break;
          const Storage* rows[kStrip];
          for (int64_t i = 0; i < keys; ++i) rows[i] = v + (start + i) * a.v.stride[2];
          pack_values(rows, int(keys), a.v.stride[3], a.v.size[3], to->tiles + ((b * kv_heads + h) * to->strips + s) * per_strip);
        }
      }
    });
  }

  AmxEngine(const BlockSparseAttention& a, const Prepared& prepared, int64_t max_rows)
      : a_(a), prepared_(prepared), d_(a.q.size[3]), dv_(a.v.size[3]), steps_((d_ + 31) / 32), dv_tiles_(tiles_across(dv_)) {
    const size_t lanes = (max_rows + kPanel - 1) / kPanel * kPanel;
    const size_t q = kTerms * lanes / 16 * steps_ * kTile, o = lanes * dv_tiles_ * 16, strips = kTileKeys / kStrip;
    const size_t k = kTerms * strips * kStrip * steps_ * 32, v = kTerms * strips * dv_tiles_ * kTile;
    const size_t p = kTerms * strips * kVecs * kTile;
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
      return static_cast<const Storage*>(x.data) + b * x.stride[0] + head * x.stride[1] + row * x.stride[2];
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
      const bool k_in_place = kTerms == 1 && whole && a_.k.stride[3] == 1 && d_ % 32 == 0;
      const bool v_in_place = prepared_.tiles && aligned;
      int64_t key[kStrip];
      for (int i = 0; i < n; ++i) {
        key[i] = runs[run].start + used;
        if (++used == runs[run].keys) ++run, used = 0;
      }
      if (k_in_place) {
        k_strip_[strip] = reinterpret_cast<const char*>(k_ + start * a_.k.stride[2]), k_stride_[strip] = a_.k.stride[2] * 2;
      } else {
        uint16_t* own = k_own_ + strip * kTerms * kStrip * steps_ * 32;
        for (int i = 0; i < kStrip; ++i) {
          uint16_t* row = own + i * steps_ * 32;
          const int64_t have = i < n ? d_ : 0;
          if (i < n) split_terms<Element, kTerms>(k_ + key[i] * a_.k.stride[2], a_.k.stride[3], d_, row, kStrip * steps_ * 32);
          for (int t = 0; t < kTerms; ++t) std::memset(row + t * kStrip * steps_ * 32 + have, 0, (steps_ * 32 - have) * 2);
        }
        k_strip_[strip] = reinterpret_cast<const char*>(own), k_stride_[strip] = steps_ * 64;
      }
      if (v_in_place) {
        const int64_t at = (b_ * a_.k.size[1] + kv_head_) * prepared_.strips + start / kStrip;
        v_strip_[strip] = prepared_.tiles + at * kTerms * dv_tiles_ * kTile;
      } else {
        uint16_t* own = v_own_ + strip * kTerms * dv_tiles_ * kTile;
        const Storage* rows[kStrip];
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
      raise_anchor(panel, s, top, total, [&] {
        multiply(o, from, strip);
        from = strip;
      });
      auto some = [&](int pair0, int pair1) {
        for (int pair = pair0; pair < pair1; ++pair)
          probabilities(s + 2 * pair * kPanel, top, p_ + (int64_t(strip) * kTerms * kVecs * kTileRows + pair) * 32, total);
      };
      if (strip + 1 < strips) {
        // a share of the exponentials after each step of the next strip's product
        const int chunks = int(2 * steps_ * kPairs);
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
    Storage* out = static_cast<Storage*>(a_.out.data) + b_ * a_.out.stride[0] + h_ * a_.out.stride[1];
    for (int64_t p = 0; p * kPanel < rows; ++p) {
      const int64_t n = std::min<int64_t>(rows - p * kPanel, kPanel), at = row + p * kPanel;
      finish_lanes(m_ + p * kPanel, l_ + p * kPanel, n, keep_, lse + at);
      unpack_lanes<Element>(o_ + p * kPanel * dv_tiles_ * 16, kPanel, keep_, n, dv_, out + at * a_.out.stride[2], a_.out.stride[2],
                         a_.out.stride[3]);
    }
  }

 private:
  static constexpr int kPairs = std::size(term_pairs<kTerms>());

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

  // Q^T tiles [16 queries][term][32 channels]: row r holds channels 2r and 2r + 1 of 16 queries
  void pack_queries(const Storage* q, int64_t rows, int64_t lanes) {
    for (int64_t lane0 = 0; lane0 < lanes; lane0 += 16)
      for (int64_t step = 0; step < steps_; ++step) {
        F32 words[kTerms][kLanes];
        for (int i = 0; i < 16; ++i) {
          uint16_t row[kTerms][32] = {};
          if (lane0 + i < rows)
            split_terms<Element, kTerms>(q + (lane0 + i) * a_.q.stride[2] + step * 32 * a_.q.stride[3], a_.q.stride[3],
                                         std::min<int64_t>(d_ - step * 32, 32), row[0], 32);
          for (int t = 0; t < kTerms; ++t) std::memcpy(&words[t][i], row[t], 64);
        }
        for (int t = 0; t < kTerms; ++t) transpose_words(words[t], q_ + ((lane0 / 16 * kTerms + t) * steps_ + step) * kTile);
      }
  }

  // V^T tiles of one strip, term by term: row = channel, 32 keys along it; zeros past the last key and the last channel
  static void pack_values(const Storage* const* rows, int keys, int64_t stride, int64_t channels, uint16_t* to) {
    const int64_t tiles = tiles_across(channels);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t c0 = tile * 16, n = std::clamp<int64_t>(channels - c0, 0, 16);
      F32 words[kTerms][kLanes];
      // word i: keys 2i and 2i + 1 of 16 channels
      for (int i = 0; i < 16; ++i) {
        alignas(64) uint16_t pair[2][kTerms][16] = {};
        for (int j = 0; j < 2; ++j) {
          if (2 * i + j >= keys) continue;
          const Storage* from = rows[2 * i + j] + c0 * stride;
          if (stride == 1 && n == 16)
            split_terms<Element, kTerms>(from, 1, 16, pair[j][0], 16);
          else
            split_terms<Element, kTerms>(from, stride, n, pair[j][0], 16);
        }
        for (int t = 0; t < kTerms; ++t) {
          U16 low, high;
          std::memcpy(&low, pair[0][t], 32), std::memcpy(&high, pair[1][t], 32);
          words[t][i] = (F32)(__builtin_convertvector(low, U32) | __builtin_convertvector(high, U32) << 16);
        }
      }
      for (int t = 0; t < kTerms; ++t) transpose_words(words[t], to + (t * tiles + tile) * kTile);
    }
  }

  // logits of one strip against a panel, 32 queries at a time; between(i) is called after each of the 2 * steps_ products
  template <class Between>
  void scores(int panel, int strip, float* s, const Between& between) {
    const int64_t stride = k_stride_[strip], per_term = steps_ * kTileBytes, per_lanes = kTerms * per_term;
    int chunk = 0;
    for (int half = 0; half < 2; ++half) {
      const char* queries = reinterpret_cast<const char*>(q_) + (panel * kVecs + half * 2) * per_lanes;
      tiles_2x2_zero();
      for (const TermPair pair : term_pairs<kTerms>()) {
        const char* k = k_strip_[strip] + pair.a * kStrip * steps_ * 64;
        const char* q = queries + pair.b * per_term;
        for (int64_t step = 0; step < steps_; ++step) {
          tiles_2x2_product(k + step * 64, k + 16 * stride + step * 64, stride, q + step * kTileBytes,
                            q + per_lanes + step * kTileBytes);
          between(chunk++);
        }
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
        auto add = [&](int strip, TermPair pair) {
          const char* v = reinterpret_cast<const char*>(v_strip_[strip]) + (pair.a * dv_tiles_ + tile) * kTileBytes;
          const char* p = reinterpret_cast<const char*>(p_) + ((int64_t(strip) * kTerms + pair.b) * kVecs + half * 2) * kTileBytes;
          tiles_2x2_product(v, v + kTileBytes, 64, p, p + kTileBytes);
        };
        if constexpr (kTerms == 1) {
          tiles_2x2_load(at, kPanel * 4);
          for (int strip = from; strip < to; ++strip) add(strip, {0, 0});
          tiles_2x2_store(at, kPanel * 4);
        } else {
          // small products first and the large output last: added in another order, float32 had 1.6 times torch's error.
          // One strip at a time: were strips summed together, a rescale between them would change the order of the sum,
          // and a query's last bit would depend on keys that only its neighbours see
          alignas(64) float sum[32 * 32];
          for (int strip = from; strip < to; ++strip) {
            tiles_2x2_zero();
            for (const TermPair pair : term_pairs<kTerms>()) add(strip, pair);
            tiles_2x2_store(sum, 128);
            for (int r = 0; r < 32; ++r)
              for (int i = 0; i < 32; i += kLanes) store(at + r * kPanel + i, load(at + r * kPanel + i) + load(sum + r * 32 + i));
          }
        }
      }
  }

  // Anchors of the panel for this strip. Where a logit is too far above, flush() first brings what was summed up to date.
  template <class Flush>
  SA_INLINE void raise_anchor(int panel, const float* s, F32* anchor, F32* total, const Flush& flush) {
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
      // lane by lane: a query's result must not depend on what its neighbours see
      const F32 raised = high[v] > anchor[v] + kSlack ? high[v] : anchor[v];
      const F32 keep = exp2_nonpositive(anchor[v] - raised);
      anchor[v] = raised;
      store(m + v * kLanes, raised);
      store(l + v * kLanes, load(l + v * kLanes) * keep);
      total[v] *= keep;
      float* o = o_ + int64_t(panel) * kPanel * dv_tiles_ * 16 + v * kLanes;
      for (int64_t c = 0; c < dv_; ++c) store(o + c * kPanel, load(o + c * kPanel) * keep);
    }
  }

  // two keys of a panel: rounded probabilities as pairs, one row of each of the strip's four tiles, and their sums
  SA_INLINE void probabilities(const float* s, const F32* anchor, uint16_t* p, F32* total) {
    #pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      F32 even = load(s + v * kLanes) * factor_ - anchor[v], odd = load(s + kPanel + v * kLanes) * factor_ - anchor[v];
      if constexpr (kTerms == 1)
        even = exp2_bf16(even), odd = exp2_bf16(odd);
      else
        even = exp2_nonpositive(even), odd = exp2_nonpositive(odd), total[v] += even + odd;  // right up to 2^126
      #pragma GCC unroll 3
      for (int t = 0; t < kTerms; ++t) {
        // to the nearest, ties away from zero
        const U32 a = ((U32)even + 0x8000u) & 0xffff0000u, b = ((U32)odd + 0x8000u) & 0xffff0000u;
        if constexpr (kTerms == 1) total[v] += (F32)a + (F32)b;
        even -= (F32)a, odd -= (F32)b;
        const U32 pair = a >> 16 | b;
        std::memcpy(p + (t * kVecs + v) * kTile, &pair, 64);
      }
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
  const Storage *k_ = nullptr, *v_ = nullptr;
  const char* k_strip_[kTileKeys / kStrip];
  const uint16_t* v_strip_[kTileKeys / kStrip];
  int64_t k_stride_[kTileKeys / kStrip];
  uint16_t *q_, *k_own_, *v_own_, *p_;
  float *o_, *m_, *l_, *keep_, *s_;
};

}  // namespace SA_NAMESPACE
