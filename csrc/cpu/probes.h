// Rows of queries that meet keys a tile at a time, for the ops that add up probabilities per key. Lanes are keys, so a sum per
// key is one addition per register.
#pragma once
#include <algorithm>
#include <cfloat>
#include <vector>

#include "logits.h"

namespace SA_NAMESPACE {

// One query of one head; it sees keys low <= key < high.
struct Probe {
  int64_t position, low, high;
  int head;
};

// What a softmax takes from a row: its logits' maximum, base 2, and their sum relative to it.
struct Peak {
  float top, total;

  // 0 where nothing can be added: no visible key, or NaN or infinite logits
  float inverse() const { return total > 0 && total <= FLT_MAX ? 1 / total : 0.0f; }
};

template <class Logits>
class Probes {
 public:
  using Storage = typename Logits::Storage;
  using Number = typename Logits::Number;
  static constexpr int kTileKeys = 256, kMaxRows = 256;
  static constexpr int kPanel = Logits::kPanel, kStep = Logits::kRowStep, kVecs = kPanel / kLanes;
  static constexpr int kPanels = kTileKeys / kPanel;

  Probes(int64_t d, double scale, double softcap)
      : logits_(d),
        cap_(softcap > 0 ? float(softcap * kLog2E) : 0.0f),
        factor_(float(softcap > 0 ? scale / softcap : scale * double(kLog2E))) {
    const size_t rows = (kMaxRows + kStep) * logits_.row_size(), keys = kPanels * logits_.panel_size();
    Scratch& scratch = Scratch::mine();
    const auto floats = Scratch::bytes_for<float>;
    scratch.reset(Scratch::bytes_for<Number>(rows) + Scratch::bytes_for<Number>(keys) + floats(kPiece * kTileKeys) +
                  2 * floats(kMaxRows * kLanes));
    rows_ = scratch.take<Number>(rows), keys_ = scratch.take<Number>(keys);
    s_ = scratch.take<float>(kPiece * kTileKeys);
    m_ = scratch.take<float>(kMaxRows * kLanes), l_ = scratch.take<float>(kMaxRows * kLanes);
  }

  int size() const { return int(probes_.size()); }
  const Probe& operator[](int row) const { return probes_[row]; }
  void clear() { probes_.clear(); }

  // a row, its channels `stride` apart; at most kMaxRows, then close()
  void add(const Storage* from, int64_t stride, const Probe& probe) {
    logits_.pack_row(from, stride, rows_ + size() * logits_.row_size());
    probes_.push_back(probe);
  }
  // rows past the last are multiplied too
  void close() { std::fill(rows_ + size() * logits_.row_size(), rows_ + (size() + kStep) * logits_.row_size(), Number{}); }

  // panels of keys [key0, end); row(key) is where a key lies
  template <class Row>
  void load_keys(int64_t key0, int64_t end, int64_t stride, const Row& row) {
    for (int panel = 0; panel * kPanel < end - key0; ++panel) {
      const Storage* lanes[kPanel];
      for (int i = 0; i < kPanel; ++i) {
        const int64_t key = key0 + panel * kPanel + i;
        lanes[i] = key < end ? row(key) : nullptr;
      }
      logits_.pack_panel(lanes, stride, keys_ + panel * logits_.panel_size());
    }
  }

  // load(key0, end) and then use(row, logits) for every row that sees a key of the tile; low is a multiple of kTileKeys
  template <class Load, class Use>
  void each_tile(int64_t low, int64_t high, const Load& load, const Use& use) {
    for (int64_t key0 = low; key0 < high; key0 += kTileKeys) {
      const int64_t end = std::min(key0 + kTileKeys, high);
      const int panels = int((end - key0 + kPanel - 1) / kPanel);
      auto sees = [&](const Probe& p) { return p.low < end && p.high > key0; };
      if (std::none_of(probes_.begin(), probes_.end(), sees)) continue;
      load(key0, end);
      for (int piece = 0; piece < size(); piece += kPiece) {
        const int rows = std::min(size() - piece, kPiece);
        for (int panel = 0; panel < panels; ++panel)
          for (int row = 0; row < rows; row += kStep) {
            const Probe* first = probes_.data() + piece + row;
            const int count = std::min(rows - row, kStep);
            if (std::any_of(first, first + count, sees))
              multiply(piece + row, count, panel, s_ + (panel * kPiece + row) * kPanel);
          }
        for (int row = 0; row < rows; ++row)
          if (sees(probes_[piece + row])) use(piece + row, s_ + row * kPanel, key0);
      }
    }
  }

  // the loaded tile, its sums per key and head added to sums[head][kTileKeys]; the probabilities are as set() says
  void add_columns(int64_t key0, int64_t end, float* sums) {
    for (int panel = 0; panel * kPanel < end - key0; ++panel) {
      const int64_t key = key0 + panel * kPanel;
      auto sees = [&](const Probe& p) { return p.low < key + kPanel && p.high > key; };
      F32 sum[kVecs] = {};
      int head = probes_.empty() ? 0 : probes_[0].head;
      auto flush = [&] {
        float* at = sums + head * kTileKeys + panel * kPanel;
        for (int v = 0; v < kVecs; ++v) store(at + v * kLanes, load(at + v * kLanes) + sum[v]), sum[v] = F32{};
      };
      for (int step = 0; step < size(); step += kStep) {
        const int count = std::min(size() - step, kStep);
        if (std::none_of(probes_.data() + step, probes_.data() + step + count, sees)) continue;
        multiply(step, count, panel, s_);
        for (int i = 0; i < count; ++i) {
          const Probe& probe = probes_[step + i];
          if (!sees(probe)) continue;
          if (probe.head != head) flush(), head = probe.head;
          const float* s = s_ + i * kPanel;
          if (cap_ == 0 && probe.low <= key && probe.high >= key + kPanel) {
            const F32 top = load(m_ + (step + i) * kLanes), inverse = load(l_ + (step + i) * kLanes);
            #pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) sum[v] += exp2_nonpositive(load(s + v * kLanes) * factor_ - top) * inverse;
          } else {
            for (int v = 0; v < kVecs; ++v) sum[v] += probability(step + i, s + v * kLanes, key + v * kLanes);
          }
        }
      }
      flush();
    }
  }

  // registers [from, to) of the tile hold keys that the row sees
  SA_INLINE void seen(int row, int64_t key0, int64_t* from, int64_t* to) const {
    *from = std::max<int64_t>(probes_[row].low - key0, 0) / kLanes;
    *to = (std::min<int64_t>(probes_[row].high - key0, kTileKeys) + kLanes - 1) / kLanes;
  }
  // register v of a row's logits of a tile
  static SA_INLINE float* part(float* s, int64_t v) { return s + v / kVecs * (kPiece * kPanel) + v % kVecs * kLanes; }

  // forget what rows absorbed
  void begin() {
    std::fill(m_, m_ + size() * kLanes, kNoSink);
    std::fill(l_, l_ + size() * kLanes, 0.0f);
  }

  // the row's running maximum and sum, each lane its own; shares, one per key of the tile, are 2^(logit - maximum so far)
  void absorb(int row, float* s, int64_t key0, float* shares = nullptr) {
    const F32 before = load(m_ + row * kLanes);
    F32 top = before, total{};
    if (const Probe& p = probes_[row]; cap_ == 0 && p.low <= key0 && p.high >= key0 + kTileKeys) {
      auto all = [&](auto use) {
        for (int panel = 0; panel < kPanels; ++panel) {
          #pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) use(load(s + panel * (kPiece * kPanel) + v * kLanes), panel * kPanel + v * kLanes);
        }
      };
      // the factor may be negative, and infinite products have to be seen
      all([&](F32 x, int) { top = max(x * factor_, top); });
      total = load(l_ + row * kLanes) * exp2_nonpositive(before - top);
      all([&](F32 x, int at) {
        const F32 share = exp2_nonpositive(x * factor_ - top);
        total += share;
        if (shares) store(shares + at, share);
      });
    } else {
      int64_t from, to;
      seen(row, key0, &from, &to);
      for (int64_t v = from; v < to; ++v) {
        const F32 x = logit(row, part(s, v), key0 + v * kLanes);
        store(part(s, v), x);
        top = max(x, top);
      }
      total = load(l_ + row * kLanes) * exp2_nonpositive(before - top);
      for (int64_t v = from; v < to; ++v) {
        const F32 share = exp2_nonpositive(load(part(s, v)) - top);
        total += share;
        if (shares) store(shares + v * kLanes, share);
      }
    }
    store(m_ + row * kLanes, top), store(l_ + row * kLanes, total);
  }

  // Of each `keys` keys of the tile the first `far`, and the others: sums of 2^(logit - maximum so far). Returns that maximum,
  // which here is one for all lanes.
  float absorb_parts(int row, float* s, int64_t key0, int64_t keys, int64_t far, float* sums) {
    const Probe& p = probes_[row];
    float factor = factor_;
    if (cap_ > 0 || p.low > key0 || p.high < key0 + kTileKeys) {
      int64_t from, to;
      seen(row, key0, &from, &to);
      for (int64_t v = 0; v < kTileKeys / kLanes; ++v)
        store(part(s, v), v < from || v >= to ? splat(kHiddenLogit) : logit(row, part(s, v), key0 + v * kLanes));
      factor = 1.0f;
    }
    F32 top = load(m_ + row * kLanes);
    #pragma GCC unroll 4
    for (int64_t v = 0; v < kTileKeys / kLanes; ++v) top = max(load(part(s, v)) * factor, top);
    top = joined(top, [](F32 a, F32 b) { return max(a, b); });
    store(m_ + row * kLanes, top);
    for (int64_t v = 0; v < kTileKeys / kLanes;) {
      F32 farther{}, nearer{};
      I32 left = splat(int32_t(far)) - lane_numbers();
      #pragma GCC unroll 4
      for (int64_t end = v + keys / kLanes; v < end; ++v, left -= kLanes) {
        const F32 share = exp2_nonpositive(load(part(s, v)) * factor - top);
        farther += left > 0 ? share : F32{}, nearer += left > 0 ? F32{} : share;
      }
      auto plus = [](F32 a, F32 b) { return a + b; };
      *sums++ = joined(farther, plus)[0], *sums++ = joined(nearer, plus)[0];
    }
    return top[0];
  }

  // each lane's maximum so far
  F32 top(int row) const { return load(m_ + row * kLanes); }

  // what the lanes of a row absorbed
  Peak join(int row) const {
    const float* m = m_ + row * kLanes;
    const float top = *std::max_element(m, m + kLanes);
    return {top, sum(load(l_ + row * kLanes) * exp2_nonpositive(load(m) - splat(top)))};
  }

  // from here on a probability of the row is 2^(logit - top) * inverse
  void set(int row, float top, float inverse) { store(m_ + row * kLanes, splat(top)), store(l_ + row * kLanes, splat(inverse)); }
  bool gives(int row) const { return l_[row * kLanes] > 0; }
  // what a share of a lane whose maximum was `top` then is, as a factor
  F32 rescaled(int row, F32 top) const { return exp2_nonpositive(top - load(m_ + row * kLanes)) * load(l_ + row * kLanes); }

  SA_INLINE F32 probability(int row, const float* s, int64_t key) const {
    return exp2_nonpositive(logit(row, s, key) - load(m_ + row * kLanes)) * load(l_ + row * kLanes);
  }

 private:
  // rows whose logits of one tile exist at a time: whole steps, and in the first cache where steps are small
  static constexpr int kPiece = kStep < 32 ? 24 : 96;
  static_assert(kTileKeys % kPanel == 0 && kPiece % kStep == 0);

  SA_INLINE void multiply(int row, int count, int panel, float* s) const {
    logits_.multiply(rows_ + row * logits_.row_size(), count, keys_ + panel * logits_.panel_size(), s);
  }

  // logits in base 2, hidden keys at -inf
  SA_INLINE F32 logit(int row, const float* s, int64_t key) const {
    const Probe& p = probes_[row];
    F32 x = load(s) * factor_;
    if (cap_ > 0) x = tanh_lanes(x) * cap_;
    if (key < p.low || key + kLanes > p.high) {
      const I32 lane = lane_numbers();
      const int32_t low = int32_t(std::clamp<int64_t>(p.low - key, 0, kLanes));
      const int32_t high = int32_t(std::clamp<int64_t>(p.high - key, 0, kLanes));
      x = (lane >= low) & (lane < high) ? x : splat(kHiddenLogit);
    }
    return x;
  }

  const Logits logits_;
  const float cap_, factor_;
  std::vector<Probe> probes_;
  Number *rows_, *keys_;  // [row][channel], panels of keys
  float *s_, *m_, *l_;    // [panel][row of the piece][lane], [row][lane] twice
};

}  // namespace SA_NAMESPACE
