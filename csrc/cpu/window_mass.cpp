// What the last queries of each sequence attend to, in two passes over the keys: the first finds the peak of every row, chunks of
// keys on their own and joined in order, the second computes the logits again and adds up probabilities as key_mass does. Sums per
// head exist for whole runs only where rows are pooled. Chunks and tiles start at fixed keys: threads do not change a bit.
#include <cmath>
#include <memory>

#include "run_probes.h"

namespace SA_NAMESPACE {
namespace {

constexpr int64_t kChunkKeys = 2048;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Logits>
class Window {
 public:
  Window(const WindowMass& args)
      : a_(args), runs_(token_runs(args.runs, args.q, args.k.size[2])), group_(args.q.size[1] / args.runs.kv_heads) {
    int64_t peaks = 0, rows = 0, sums = 0;
    for (const TokenRun& run : runs_) {
      const int64_t queries = std::min(a_.window, run.n_q);
      places_.push_back({queries, peaks, rows, sums});
      rows += queries * group_, peaks += queries * group_ * ceil_div(run.length, kChunkKeys), sums += run.length * group_;
    }
    peaks_.resize(peaks), rows_.resize(rows);
    if (a_.kernel > 1) sums_.reset(new float[sums]);
  }

  void run(const Parallel& parallel) {
    std::fill(a_.out, a_.out + a_.k.size[2], 0.0f);
    const std::vector<KeyTask> chunks = key_tasks(runs_, kChunkKeys), tiles = key_tasks(runs_, Queries::kTileKeys);
    each(parallel, int64_t(chunks.size()), [&](Queries& queries, float*, int64_t t) { find_peaks(queries, chunks[t]); });
    parallel_tasks(parallel, int64_t(runs_.size()), [&](TaskQueue& queue) {
      for (int64_t t; queue.take(&t);) join_chunks(int(t));
    });
    each(parallel, int64_t(tiles.size()), [&](Queries& queries, float* sums, int64_t t) { add_up(queries, sums, tiles[t]); });
    if (a_.kernel == 1) return;
    parallel_tasks(parallel, int64_t(tiles.size()), [&](TaskQueue& queue) {
      std::vector<float> sums(group_ * Queries::kTileKeys);
      for (int64_t t; queue.take(&t);) pool(tiles[t], sums.data());
    });
  }

 private:
  using Queries = RunProbes<Logits>;

  // where a run's things start; rows are numbered [head][query of the window]
  struct Place {
    int64_t queries, peaks, rows, sums;
  };
  struct Row {
    float top, inverse;
  };

  template <class Do>
  void each(const Parallel& parallel, int64_t tasks, const Do& act) {
    parallel_tasks(parallel, tasks, [&](TaskQueue& queue) {
      [[maybe_unused]] const typename Logits::Guard guard{};
      Queries queries(a_.q, a_.k, a_.scale, a_.softcap);
      std::vector<float> sums(group_ * Queries::kTileKeys);
      for (int64_t t; queue.take(&t);) act(queries, sums.data(), t);
    });
  }

  void find_peaks(Queries& queries, const KeyTask& task) {
    const TokenRun& run = runs_[task.run];
    const Place& place = places_[task.run];
    const int64_t all = place.queries * group_;
    for (int64_t row0 = 0; row0 < all; row0 += Queries::kMaxRows) {
      const int64_t end = std::min<int64_t>(row0 + Queries::kMaxRows, all);
      queries.clear();
      for (int64_t row = row0; row < end; ++row)
        queries.add_query(run, int(row / place.queries), run.n_q - place.queries + row % place.queries);
      queries.close();
      queries.begin();
      queries.each_tile(task.key0, task.end, [&](int64_t key0, int64_t key_end) { queries.load_tile(run, key0, key_end); },
                        [&](int row, float* s, int64_t key0) { queries.absorb(row, s, key0); });
      Peak* to = peaks_.data() + place.peaks + task.key0 / kChunkKeys * all + row0;
      for (int row = 0; row < queries.size(); ++row) to[row] = queries.join(row);
    }
  }

  void join_chunks(int at) {
    const TokenRun& run = runs_[at];
    const Place& place = places_[at];
    const int64_t all = place.queries * group_, chunks = ceil_div(run.length, kChunkKeys);
    for (int64_t row = 0; row < all; ++row) {
      const Peak* peak = peaks_.data() + place.peaks + row;
      const float sink = a_.sinks ? a_.sinks[run.head0 + row / place.queries] * kLog2E : kHiddenLogit;
      Peak whole{std::max(sink, kNoSink), 0.0f};
      for (int64_t c = 0; c < chunks; ++c) whole.top = std::max(whole.top, peak[c * all].top);
      for (int64_t c = 0; c < chunks; ++c) whole.total += peak[c * all].total * std::exp2(peak[c * all].top - whole.top);
      whole.total += std::exp2(sink - whole.top);
      rows_[place.rows + row] = {whole.top, whole.inverse()};
    }
  }

  void add_up(Queries& queries, float* sums, const KeyTask& task) {
    const TokenRun& run = runs_[task.run];
    const Place& place = places_[task.run];
    const int64_t first = run.n_q - place.queries, n = task.end - task.key0;
    auto weight = [&](int head, int64_t query, float* top, float* inverse) {
      const Row& row = rows_[place.rows + head * place.queries + query - first];
      *top = row.top, *inverse = row.inverse;
      return row.inverse > 0;
    };
    queries.sum_queries(run, task.key0, task.end, first, group_, weight, sums);
    if (a_.kernel == 1) return reduce_heads(sums, group_, Queries::kTileKeys, n, a_.reduce, a_.out + run.start + task.key0);
    for (int64_t head = 0; head < group_; ++head)
      std::copy(sums + head * Queries::kTileKeys, sums + head * Queries::kTileKeys + n,
                sums_.get() + place.sums + head * run.length + task.key0);
  }

  void pool(const KeyTask& task, float* pooled) {
    const TokenRun& run = runs_[task.run];
    const Place& place = places_[task.run];
    // rows of the run that are pooled, and the first of this task that are not
    const int64_t before = std::max<int64_t>(run.length - place.queries, 0), own = std::clamp(before, task.key0, task.end);
    const int64_t half = a_.kernel / 2, reach = std::min(half, before);
    for (int64_t head = 0; head < group_; ++head) {
      const float* sums = sums_.get() + place.sums + head * run.length;
      float* to = pooled + head * Queries::kTileKeys;
      std::fill(to, to + (own - task.key0), 0.0f);  // no sum is negative: 0 is also where a maximum starts
      for (int64_t offset = -reach; offset <= reach; ++offset) {
        const int64_t low = std::max(task.key0, -offset), high = std::min(own, before - offset);
        for (int64_t key = low; key < high; ++key) {
          float& at = to[key - task.key0];
          at = a_.pool == Pool::max ? std::max(at, sums[key + offset]) : at + sums[key + offset];
        }
      }
      if (a_.pool == Pool::mean)
        for (int64_t key = task.key0; key < own; ++key)
          to[key - task.key0] /= float(std::min(before, key + half + 1) - std::max<int64_t>(0, key - half));
      std::copy(sums + own, sums + task.end, to + (own - task.key0));
    }
    reduce_heads(pooled, group_, Queries::kTileKeys, task.end - task.key0, a_.reduce, a_.out + run.start + task.key0);
  }

  const WindowMass& a_;
  const std::vector<TokenRun> runs_;
  const int64_t group_;
  std::vector<Place> places_;
  std::vector<Peak> peaks_;        // [run][chunk][row]
  std::vector<Row> rows_;          // [run][row]
  std::unique_ptr<float[]> sums_;  // [run][head][key]
};

}  // namespace

void window_mass(const WindowMass& args, const Parallel& parallel) {
  with_element(args.q.dtype, [&](auto element) { Window<typename LogitsOf<decltype(element)>::type>(args).run(parallel); });
}

}  // namespace SA_NAMESPACE
