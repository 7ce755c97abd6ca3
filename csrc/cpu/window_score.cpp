// What probe rows attend to. Lanes are keys, so a column sum is one addition per register, and so is a diagonal sum: the keys of
// one row, read backwards, are consecutive distances.
//
// One product: as tiles of keys pass, each row keeps 2^(logit - its maximum so far), lane by lane, and that maximum once per tile.
// When the keys have passed its sum is known, and a factor per tile makes probabilities of them. Rows go together as far as
// what they keep fits kKept, so a long context divides the rows, each part of which packs the keys again. A task owns the
// outputs of its heads and adds rows in order, and a row's own sums start at fixed keys: neither threads, nor neighbours, nor
// the future change a bit.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../spans.h"
#include "probes.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kMaxHeads = 4;
constexpr int64_t kEnoughTasks = 16;  // below this, groups of heads are divided
// bytes a thread keeps at most, unless for kFewRows: each part of the rows packs the keys anew
constexpr int64_t kKept = int64_t(8) << 20, kFewRows = 32;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats floats(int64_t count) {
  Floats made(static_cast<float*>(std::aligned_alloc(64, size_t(count) * sizeof(float))));  // whole registers, so a multiple of 64
  if (!made) throw std::bad_alloc();
  return made;
}

struct Task {
  int64_t b, head0;  // heads of one KV head
  int heads;
};

template <class Logits>
class Worker {
 public:
  Worker(const WindowScore& args) : a_(args), probes_(args.q.size[3], args.scale, args.softcap) {}

  void run(const Task& task) {
    b_ = task.b, head0_ = task.head0;
    span_ = span_of(b_, a_.q.size[2], n_k(), a_.q_start, a_.causal, a_.padding);
    std::fill(columns(0), columns(task.heads), 0.0f);
    std::fill(diagonals(0), diagonals(task.heads), 0.0f);
    const int64_t most = kKept / int64_t(sizeof(float)) / std::max<int64_t>(1, span_.n_k);
    const int64_t together = std::clamp<int64_t>(most, kFewRows, probes_.kMaxRows) / task.heads;
    for (int64_t i = 0; i < a_.n_rows;) {
      probes_.clear();
      for (; i < a_.n_rows && probes_.size() < together * task.heads; ++i)
        add_probe(a_.rows[b_ * a_.n_rows + i], task.heads);
      if (probes_.size()) score();
    }
  }

 private:
  using Storage = typename Logits::Storage;
  static constexpr int64_t kTile = Probes<Logits>::kTileKeys;

  int64_t n_k() const { return a_.k.size[2]; }
  float* columns(int head) const { return a_.columns + (b_ * a_.q.size[1] + head0_ + head) * n_k(); }
  float* diagonals(int head) const { return a_.diagonals + (b_ * a_.q.size[1] + head0_ + head) * n_k(); }

  // the heads of a query next to each other: they see the same keys
  void add_probe(int64_t row, int heads) {
    if (row < 0 || row >= span_.n_q) return;
    const int64_t at = (a_.causal ? span_.q_start : 0) + row;
    const int64_t high = a_.causal ? std::min(span_.n_k, at + 1) : span_.n_k;
    const int64_t low = a_.window ? std::max<int64_t>(0, at - a_.window + 1) : 0;
    for (int h = 0; h < heads; ++h) {
      const Storage* from = static_cast<const Storage*>(a_.q.data) + b_ * a_.q.stride[0] + (head0_ + h) * a_.q.stride[1] +
                            (span_.row0 + row) * a_.q.stride[2];
      probes_.add(from, a_.q.stride[3], {at, low, high, h});
    }
  }

  void score() {
    probes_.close();
    probes_.begin();
    int64_t low = span_.n_k, high = 0;
    for (int row = 0; row < probes_.size(); ++row) low = std::min(low, probes_[row].low), high = std::max(high, probes_[row].high);
    low -= low % probes_.kTileKeys;
    const Storage* k = static_cast<const Storage*>(a_.k.data) + b_ * a_.k.stride[0] +
                       head0_ / (a_.q.size[1] / a_.k.size[1]) * a_.k.stride[1] + span_.key0 * a_.k.stride[2];
    auto load_keys = [&](int64_t key0, int64_t end) {
      probes_.load_keys(key0, end, a_.k.stride[3], [&](int64_t key) { return k + key * a_.k.stride[2]; });
    };
    make_room(probes_.size() * ceil_div(high - low, kTile));
    probes_.each_tile(low, high, load_keys, [&](int row, float* s, int64_t key0) {
      const int64_t at = (key0 - low) / kTile * probes_.size() + row;
      probes_.absorb(row, s, key0, shares_.get() + at * kTile);
      store(tops_.get() + at * kLanes, probes_.top(row));
    });
    for (int row = 0; row < probes_.size(); ++row) {
      const Peak peak = probes_.join(row);
      probes_.set(row, peak.top, peak.inverse());
    }
    for (int64_t key0 = low, at = 0; key0 < high; key0 += kTile)
      for (int row = 0; row < probes_.size(); ++row, ++at)
        if (probes_[row].low < key0 + kTile && probes_[row].high > key0 && probes_.gives(row))
          spread(row, shares_.get() + at * kTile, probes_.rescaled(row, load(tops_.get() + at * kLanes)), key0);
  }

  void make_room(int64_t tiles) {
    if (tiles <= room_) return;
    shares_.reset(), tops_.reset();
    room_ = 0;
    shares_ = floats(tiles * kTile), tops_ = floats(tiles * kLanes);
    room_ = tiles;
  }

  // probabilities of one row and tile into the sums of keys and of distances
  void spread(int row, const float* shares, F32 factor, int64_t key0) {
    const Probe& probe = probes_[row];
    float *column = columns(probe.head), *diagonal = diagonals(probe.head);
    I32 backwards{};
    for (int i = 0; i < kLanes; ++i) backwards[i] = kLanes - 1 - i;
    int64_t from, to;
    probes_.seen(row, key0, &from, &to);
    for (int64_t v = from; v < to; ++v) {
      const int64_t key = key0 + v * kLanes, nearest = probe.position - key - (kLanes - 1);
      const F32 p = load(shares + v * kLanes) * factor;
      if (key + kLanes <= n_k()) {
        store(column + key, load(column + key) + p);
      } else {
        const int n = int(n_k() - key);
        store_first(column + key, load_first(column + key, n) + p, n);
      }
      const F32 turned = __builtin_shuffle(p, backwards);
      if (nearest >= 0 && nearest + kLanes <= n_k()) store(diagonal + nearest, load(diagonal + nearest) + turned);
      else add_edge(diagonal, nearest, turned);
    }
  }

  // distances outside 0 .. Nk-1 are hidden keys, or keys ahead of a query without causality
  [[gnu::noinline]] void add_edge(float* diagonal, int64_t nearest, F32 p) const {
    for (int i = 0; i < kLanes; ++i)
      if (nearest + i >= 0 && nearest + i < n_k()) diagonal[nearest + i] += p[i];
  }

  const WindowScore& a_;
  Probes<Logits> probes_;
  Span span_{};
  int64_t b_ = 0, head0_ = 0;
  Floats shares_, tops_;  // [tile][row][key], [tile][row][lane]
  int64_t room_ = 0;      // [tile][row]
};

}  // namespace

void window_score(const WindowScore& args, const Parallel& parallel) {
  const int64_t kv_tasks = args.k.size[0] * args.k.size[1], group = args.q.size[1] / std::max<int64_t>(args.k.size[1], 1);
  int64_t together = std::min<int64_t>(group, kMaxHeads);
  while (together > 1 && kv_tasks * ceil_div(group, together) < kEnoughTasks) together = ceil_div(together, 2);
  std::vector<Task> tasks;
  for (int64_t kv = 0; kv < kv_tasks; ++kv)
    for (int64_t h = 0; h < group; h += together)
      tasks.push_back({kv / args.k.size[1], kv % args.k.size[1] * group + h, int(std::min(together, group - h))});
  with_element(args.q.dtype, [&](auto element) {
    using Logits = typename LogitsOf<decltype(element)>::type;
    parallel_tasks(parallel, int64_t(tasks.size()), [&](TaskQueue& queue) {
      [[maybe_unused]] const typename Logits::Guard guard{};
      Worker<Logits> worker(args);
      for (int64_t t; queue.take(&t);) worker.run(tasks[t]);
    });
  });
}

}  // namespace SA_NAMESPACE
