// Queries against the runs of a flat store: what key_mass and window_mass share.
#pragma once
#include "../runs.h"
#include "probes.h"

namespace SA_NAMESPACE {

// keys [key0, end) of a run
struct KeyTask {
  int run;
  int64_t key0, end;
};

// runs cut into pieces of `keys`; the first keys come first: more queries see them
inline std::vector<KeyTask> key_tasks(const std::vector<TokenRun>& runs, int64_t keys) {
  std::vector<KeyTask> tasks;
  int64_t longest = 0;
  for (const TokenRun& run : runs) longest = std::max(longest, run.length);
  for (int64_t key0 = 0; key0 < longest; key0 += keys)
    for (int i = 0; i < int(runs.size()); ++i)
      if (key0 < runs[i].length) tasks.push_back({i, key0, std::min(key0 + keys, runs[i].length)});
  return tasks;
}

// to[0..n) of sums[head][stride]
inline void reduce_heads(const float* sums, int64_t heads, int64_t stride, int64_t n, Reduce reduce, float* to) {
  std::copy(sums, sums + n, to);
  for (int64_t head = 1; head < heads; ++head) {
    const float* from = sums + head * stride;
    if (reduce == Reduce::max)
      for (int64_t i = 0; i < n; ++i) to[i] = std::max(to[i], from[i]);
    else
      for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  }
  if (reduce == Reduce::mean)
    for (int64_t i = 0; i < n; ++i) to[i] /= float(heads);
}

template <class Logits>
class RunProbes : public Probes<Logits> {
 public:
  using Storage = typename Logits::Storage;
  using Probes<Logits>::kMaxRows, Probes<Logits>::kTileKeys;

  RunProbes(const View& q, const View& k, double scale, double softcap) : Probes<Logits>(q.size[3], scale, softcap), q_(q), k_(k) {}

  // real query `query` of head `head` of the run's group
  void add_query(const TokenRun& run, int head, int64_t query) {
    const Storage* from = static_cast<const Storage*>(q_.data) + run.b * q_.stride[0] + (run.head0 + head) * q_.stride[1] +
                          (run.query0 + query) * q_.stride[2];
    this->add(from, q_.stride[3], {query, 0, run.seen(query), head});
  }

  void load_tile(const TokenRun& run, int64_t key0, int64_t end) {
    const Storage* k = static_cast<const Storage*>(k_.data) + run.start * k_.stride[2];
    this->load_keys(key0, end, k_.stride[3], [&](int64_t key) { return k + key * k_.stride[2]; });
  }

  // sums[head][kTileKeys] of keys [key0, end), a tile at most, over the real queries from `first` on; weight(head, query, &top,
  // &inverse) is how the logits of a query become probabilities, or false where it gives nothing
  template <class Weight>
  void sum_queries(const TokenRun& run, int64_t key0, int64_t end, int64_t first, int64_t group, const Weight& weight,
                   float* sums) {
    std::fill(sums, sums + group * kTileKeys, 0.0f);
    load_tile(run, key0, end);
    auto take = [&] {
      this->close();
      this->add_columns(key0, end, sums);
      this->clear();
    };
    this->clear();
    first = std::max(first, key0 - (run.length - run.n_q));
    const int64_t together = std::max<int64_t>(kMaxRows / group, 1);
    for (; first < run.n_q; first += together) {
      for (int head = 0; head < group; ++head)
        for (int64_t query = first; query < std::min(first + together, run.n_q); ++query) {
          float top, inverse;
          if (!weight(head, query, &top, &inverse)) continue;
          add_query(run, head, query);
          this->set(this->size() - 1, top, inverse);
          if (this->size() == kMaxRows) take();
        }
      take();
    }
  }

 private:
  const View &q_, &k_;
};

}  // namespace SA_NAMESPACE
