// A few queries against the rows of runs, each row read once for all queries of its group, so that memory sets the pace: what
// page_score and row_score share.
//
// A register of scores holds R queries against kLanes / R rows. Tasks are stretches of the rows of a run; nothing is shared between
// them: threads do not change a bit.
#pragma once
#include <limits>

#include "run_probes.h"
#include "simd.h"

namespace SA_NAMESPACE {

constexpr int kScanTile = 64;              // rows, whose scores per head stay in L1
constexpr int64_t kScanBytes = 512 << 10;  // of a task

inline int64_t scan_rows(int64_t row_bytes) { return std::max<int64_t>(kScanBytes / row_bytes / kScanTile, 1) * kScanTile; }

// Table says what a row is made of and how a query meets it:
//   Element, kParts            floats per channel of a packed query
//   width()                    channels, kLanes or more
//   split(x, parts)            a register of a query's channels -> its parts
//   stage(row, n)              n <= kScanTile rows come next
//   load(i, channel, parts)    a register of what each part is multiplied with, of the i-th of them
template <class Table, int R>
class RowScan {
  using Element = typename Table::Element;
  using Storage = typename Element::Storage;
  static constexpr int kRows = kLanes / R;  // lane r * kRows + j is query r and row j
  static constexpr int kParts = Table::kParts;

 public:
  RowScan(const View& q, int64_t kv_heads, float scale, const Table& table)
      : q_(q),
        scale_(scale),
        table_(table),
        d_(table_.width()),
        registers_((d_ + kLanes - 1) / kLanes),
        group_(q.size[1] / kv_heads),
        panels_((group_ * q.size[2] + R - 1) / R) {
    const auto floats = Scratch::bytes_for<float>;
    Scratch& scratch = Scratch::mine();
    scratch.reset(floats(panels_ * R * registers_ * kParts * kLanes) + floats(R * kScanTile) + floats(d_));
    packed_ = scratch.take<float>(panels_ * R * registers_ * kParts * kLanes);
    found_ = scratch.take<float>(R * kScanTile);
    row_ = scratch.take<float>(d_);
  }

  // the run whose rows come next, with one real query or more
  void meet(const TokenRun& run, int number) {
    if (number_ == number) return;
    number_ = number;
    queries_ = group_ * run.n_q;
    for (int64_t i = 0; i < (queries_ + R - 1) / R * R; ++i) pack(run, std::min(i, queries_ - 1), i);
  }

  // take(query, products) for every query of the run, head by head, with rows [row0, row0 + n), a tile at most
  template <class Take>
  void tile(int64_t row0, int n, const Take& take) {
    table_.stage(row0, n);
    for (int64_t panel = 0; panel * R < queries_; ++panel) {
      const float* const q = packed_ + panel * R * registers_ * kParts * kLanes;
      if (registers_ == 1) narrow(n, q);
      else wide(n, q);
      for (int r = 0; r < R && panel * R + r < queries_; ++r) take(panel * R + r, found_ + r * kScanTile);
    }
  }

 private:
  // the first of these lanes are those of the register before, where the last one does not fill up
  SA_INLINE int64_t channel_of(int64_t c) const { return std::min(c * kLanes, d_ - kLanes); }

  // found_ of rows whose channels lie along the lanes
  SA_INLINE void wide(int n, const float* q) {
    for (int at = 0; at < n; at += kRows) {
      F32 totals[kLanes];
      for (int j = 0; j < kRows; ++j) {
        const int row = std::min(at + j, n - 1);
        F32 found[R] = {};
        const float* with = q;
        for (int64_t c = 0; c < registers_; ++c, with += R * kParts * kLanes) {
          F32 parts[kParts];
          table_.load(row, channel_of(c), parts);
          #pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
            for (int p = 0; p < kParts; ++p) found[r] += load(with + (r * kParts + p) * kLanes) * parts[p];
        }
        for (int r = 0; r < R; ++r) totals[r * kRows + j] = found[r];
      }
      float lanes[kLanes];
      store(lanes, sums(totals));
      for (int r = 0; r < R; ++r) std::copy_n(lanes + r * kRows, kRows, found_ + r * kScanTile + at);
    }
  }

  // likewise for rows of one register: kLanes of them turned, a channel each, spare the sums across lanes (1.5 times faster)
  SA_INLINE void narrow(int n, const float* q) {
    for (int at = 0; at < n; at += kLanes) {
      F32 found[R] = {};
      for (int p = 0; p < kParts; ++p) {
        F32 x[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          F32 parts[kParts];
          table_.load(std::min(at + i, n - 1), 0, parts);
          x[i] = parts[p];
        }
        transpose(x);
        #pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          for (int r = 0; r < R; ++r) found[r] += splat(q[(r * kParts + p) * kLanes + i]) * x[i];
      }
      for (int r = 0; r < R; ++r) store(found_ + r * kScanTile + at, found[r]);
    }
  }

  void pack(const TokenRun& run, int64_t i, int64_t slot) {
    const int64_t head = i / run.n_q, query = i % run.n_q;
    std::fill(row_, row_ + d_, 0.0f);
    read_row<Element>(static_cast<const Storage*>(q_.data) + run.b * q_.stride[0] + (run.head0 + head) * q_.stride[1] +
                          (run.query0 + query) * q_.stride[2],
                      q_.stride[3], q_.size[3], row_);
    float* to = packed_ + slot / R * R * registers_ * kParts * kLanes + slot % R * kParts * kLanes;
    for (int64_t c = 0; c < registers_; ++c, to += R * kParts * kLanes) {
      const int32_t twice = int32_t(c * kLanes - channel_of(c));
      F32 parts[kParts];
      Table::split(lane_numbers() < twice ? F32{} : load(row_ + channel_of(c)) * scale_, parts);
      for (int p = 0; p < kParts; ++p) store(to + p * kLanes, parts[p]);
    }
  }

  const View& q_;
  const float scale_;
  Table table_;
  const int64_t d_, registers_, group_, panels_;
  int number_ = -1;      // the run whose queries are packed
  int64_t queries_ = 0;  // of it
  float* packed_;        // [panel][register of channels][R][kParts]
  float* found_;         // [R][kScanTile]
  float* row_;           // [d]
};

// score(std::integral_constant<int, R>{}) with the R that so many queries want
template <class Score>
void with_panel(int64_t queries, const Score& score) {
  if (queries == 1) score(std::integral_constant<int, 1>{});
  else if (queries == 2) score(std::integral_constant<int, 2>{});
  else score(std::integral_constant<int, 4>{});
}

// out[row] of the rows of every run: of each head the largest over its queries, reduced over the group
template <class Table, int R>
void scan_largest(const View& q, const Runs& runs, const std::vector<TokenRun>& found, float scale, const Table& table,
                  int64_t row_bytes, Reduce reduce, float* out, const Parallel& parallel) {
  const std::vector<KeyTask> tasks = key_tasks(found, scan_rows(row_bytes));
  parallel_tasks(parallel, int64_t(tasks.size()), [&](TaskQueue& queue) {
    RowScan<Table, R> scan(q, runs.kv_heads, scale, table);
    const int64_t group = q.size[1] / runs.kv_heads;
    std::vector<float> heads(group * kScanTile);
    for (int64_t t; queue.take(&t);) {
      const TokenRun& run = found[tasks[t].run];
      if (run.n_q == 0) continue;
      scan.meet(run, tasks[t].run);
      for (int64_t row = tasks[t].key0; row < tasks[t].end; row += kScanTile) {
        const int n = int(std::min<int64_t>(kScanTile, tasks[t].end - row));
        std::fill(heads.begin(), heads.end(), -std::numeric_limits<float>::infinity());
        scan.tile(run.start + row, n, [&](int64_t query, const float* scores) {
          float* best = heads.data() + query / run.n_q * kScanTile;
          for (int i = 0; i < n; ++i) best[i] = std::max(best[i], scores[i]);
        });
        reduce_heads(heads.data(), group, kScanTile, n, reduce, out + run.start + row);
      }
    }
  });
}

}  // namespace SA_NAMESPACE
