// Which page each slot of a run holds; see kvcache.tiers.Slots.
#pragma once
#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "failure.h"

namespace sparse_attn_host {

class Slots {
 public:
  Slots(int64_t runs, int64_t slots) : slots_(slots), runs_(runs) { clear(); }

  void clear() {
    for (Run& run : runs_) {
      run.at.clear();
      run.page.assign(slots_, -1);
      run.wanted.assign(slots_, 0);
    }
  }

  // ids, slot and miss are [runs, m].
  void want(const int64_t* ids, int64_t m, int64_t* slot, bool* miss) {
    if (m > slots_) require_few(ids, m);
    for (size_t r = 0; r < runs_.size(); ++r, ids += m, slot += m, miss += m) want_one(runs_[r], ids, m, slot, miss);
  }

  int64_t hits = 0, misses = 0;

 private:
  struct Run {
    std::unordered_map<int64_t, int64_t> at;  // page -> slot
    std::vector<int64_t> page;                // of each slot, -1 for none
    std::vector<uint64_t> wanted;             // when last; 0 for never
  };

  void require_few(const int64_t* ids, int64_t m) const {
    std::vector<int64_t> row;
    int64_t most = 0;
    for (size_t r = 0; r < runs_.size(); ++r) {
      row.assign(ids + r * m, ids + (r + 1) * m);
      std::sort(row.begin(), row.end());
      auto first = std::lower_bound(row.begin(), row.end(), 0);
      most = std::max<int64_t>(most, std::unique(first, row.end()) - first);
    }
    if (most > slots_) throw Failure("too_many", most, slots_);
  }

  void want_one(Run& run, const int64_t* ids, int64_t m, int64_t* slot, bool* miss) {
    const uint64_t before = clock_;
    new_.clear();
    for (int64_t i = 0; i < m; ++i) {
      slot[i] = -1;
      miss[i] = false;
      if (ids[i] < 0) continue;
      auto [found, missing] = run.at.try_emplace(ids[i], -1);
      slot[i] = found->second;
      if (missing) {
        miss[i] = true;
        new_.emplace_back(ids[i], ++clock_);
      } else if (slot[i] >= 0 && run.wanted[slot[i]] <= before) {
        run.wanted[slot[i]] = ++clock_;
        ++hits;
      }
    }
    if (new_.empty()) return;
    misses += new_.size();
    free_.clear();
    for (int64_t s = 0; s < slots_; ++s) {
      if (run.wanted[s] <= before) free_.emplace_back(run.wanted[s], s);
    }
    std::partial_sort(free_.begin(), free_.begin() + new_.size(), free_.end());
    for (size_t i = 0; i < new_.size(); ++i) {
      const int64_t s = free_[i].second;
      if (run.page[s] >= 0) run.at.erase(run.page[s]);
      run.page[s] = new_[i].first;
      run.wanted[s] = new_[i].second;
      run.at[new_[i].first] = s;
    }
    for (int64_t i = 0; i < m; ++i) {
      if (ids[i] >= 0 && slot[i] < 0) slot[i] = run.at[ids[i]];
    }
  }

  const int64_t slots_;
  std::vector<Run> runs_;
  uint64_t clock_ = 0;
  std::vector<std::pair<int64_t, uint64_t>> new_;   // page, when
  std::vector<std::pair<uint64_t, int64_t>> free_;  // when last wanted, slot
};

}  // namespace sparse_attn_host
