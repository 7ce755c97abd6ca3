// Logits of some rows against a panel of lanes, s[row][lane] = sum over channels of row * lane, for the ops that score tokens.
// The caller decides which of the two are queries. SimdLogits works in float32 for any dtype, TileLogits on AMX for bfloat16.
#pragma once
#include "attention_simd.h"
#if defined(SA_AMX)
#include "amx.h"
#endif

namespace SA_NAMESPACE {

constexpr float kHiddenLogit = -std::numeric_limits<float>::infinity();

template <class Element>
class SimdLogits {
 public:
  using Storage = typename Element::Storage;
  using Number = float;  // of packed rows and panels
  static constexpr int kPanel = kSimdPanel, kRowStep = kSimdRows;
  struct Guard {};

  explicit SimdLogits(int64_t d) : d_(d) {}
  int64_t row_size() const { return d_; }
  int64_t panel_size() const { return d_ * kPanel; }

  void pack_row(const Storage* from, int64_t stride, float* to) const { read_row<Element>(from, stride, d_, to); }

  // to[channel][lane]; a null lane is 0
  void pack_panel(const Storage* const* lanes, int64_t stride, float* to) const {
    for (int lane0 = 0; lane0 < kPanel; lane0 += kLanes) {
      const Storage* const* from = lanes + lane0;
      int64_t c = 0;
      if (stride == 1)
        for (; c + kLanes <= d_; c += kLanes) {
          F32 row[kLanes];
          for (int i = 0; i < kLanes; ++i) row[i] = from[i] ? Element::load(from[i] + c) : F32{};
          transpose(row);
          for (int i = 0; i < kLanes; ++i) store(to + (c + i) * kPanel + lane0, row[i]);
        }
      for (; c < d_; ++c)
        for (int i = 0; i < kLanes; ++i) to[c * kPanel + lane0 + i] = from[i] ? Element::get(from[i][c * stride]) : 0.0f;
    }
  }

  // n <= kRowStep rows, row_size() apart, into s[row][kPanel]
  void multiply(const float* rows, int n, const float* panel, float* s) const {
    if (n == kRowStep) simd_scores<kRowStep>(rows, d_, panel, d_, s);
    else simd_scores_tail(n, rows, d_, panel, d_, s);
  }

 private:
  const int64_t d_;
};

#if defined(SA_AMX)
class TileLogits {
 public:
  using Storage = uint16_t;
  using Number = uint16_t;
  static constexpr int kPanel = 64, kRowStep = 2 * kTileRows;
  using Guard = TileGuard;

  explicit TileLogits(int64_t d) : d_(d), steps_((d + 31) / 32) {}
  int64_t row_size() const { return steps_ * 32; }
  int64_t panel_size() const { return kPanel * steps_ * 32; }

  void pack_row(const uint16_t* from, int64_t stride, uint16_t* to) const {
    copy(from, stride, d_, to);
    std::fill(to + d_, to + row_size(), uint16_t{0});
  }

  // [32 lanes][step][2]: row i of a tile holds channels 2i and 2i + 1 of 16 lanes; a null lane is 0
  void pack_panel(const uint16_t* const* lanes, int64_t stride, uint16_t* to) const {
    for (int lane0 = 0; lane0 < kPanel; lane0 += kLanes)
      for (int64_t step = 0; step < steps_; ++step) {
        F32 words[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          uint16_t line[32] = {};
          if (lanes[lane0 + i]) copy(lanes[lane0 + i] + step * 32 * stride, stride, std::min<int64_t>(d_ - step * 32, 32), line);
          std::memcpy(&words[i], line, 64);
        }
        transpose(words);
        std::memcpy(to + ((lane0 / 32 * steps_ + step) * 2 + lane0 / 16 % 2) * kTile, words, kTileBytes);
      }
  }

  // kRowStep rows are read and written, whatever n <= kRowStep is
  void multiply(const uint16_t* rows, int, const uint16_t* panel, float* s) const {
    for (int half = 0; half < kPanel / 32; ++half) {
      tiles_2x2_zero();
      for (int64_t step = 0; step < steps_; ++step) {
        const uint16_t *a = rows + step * 32, *b = panel + (half * steps_ + step) * 2 * kTile;
        tiles_2x2_product(a, a + kTileRows * row_size(), row_size() * 2, b, b + kTile);
      }
      tiles_2x2_store(s + half * 32, kPanel * 4);
    }
  }

 private:
  static constexpr int64_t kTile = kTileBytes / 2;  // numbers in a tile

  static SA_INLINE void copy(const uint16_t* from, int64_t stride, int64_t n, uint16_t* to) {
    if (stride == 1) std::memcpy(to, from, n * 2);
    else
      for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
  }

  const int64_t d_, steps_;
};
#endif

// how logits are computed from a dtype in this library
template <class Element>
struct LogitsOf {
  using type = SimdLogits<Element>;
};
#if defined(SA_AMX)
template <>
struct LogitsOf<Bf16> {
  using type = TileLogits;
};
#endif

}  // namespace SA_NAMESPACE
