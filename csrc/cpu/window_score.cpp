// What probe rows attend to. Lanes are keys, so a column sum is one addition per register, and so is a diagonal sum: the keys of
// one row, read backwards, are consecutive distances.
//
// One product: as tiles of keys pass, each row keeps 2^(logit - its maximum so far), lane by lane, and that maximum once per tile.
// When the keys have passed its sum is known, and a factor per tile makes probabilities of them. Rows go together as far as
// what they keep fits kKept, so a long context divides the rows, each part of which packs the keys again. Where the sums of
// blocks are wanted, and parts of tiles make up blocks, a row keeps two numbers a part instead: the keys of a part that lie
// behind a query stand in two blocks of distances at most. A task owns the outputs of its heads and adds rows in order, and a
// row's own sums start at fixed keys: neither threads, nor neighbours, nor the future change a bit.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <utility>
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

// Memory that grows and never carries anything over.
class Room {
 public:
  // whole registers
  float* of(int64_t count) {
    if (count > size_) {
      count = ceil_div(count, 16) * 16;
      held_.reset(), size_ = 0;
      held_.reset(static_cast<float*>(std::aligned_alloc(64, size_t(count) * sizeof(float))));
      if (!held_) throw std::bad_alloc();
      size_ = count;
    }
    return held_.get();
  }

 private:
  std::unique_ptr<float, Free> held_;
  int64_t size_ = 0;
};

struct Task {
  int64_t b, head0;  // heads of one KV head
  int heads;
};

template <class Logits>
class Worker {
 public:
  Worker(const WindowScore& args)
      : a_(args),
        probes_(args.q.size[3], args.scale, args.softcap),
        block_(std::min(args.block, std::max<int64_t>(1, ceil_div(args.k.size[2], kTile)) * kTile)),
        blocks_(ceil_div(args.k.size[2], block_)),
        part_(std::min(args.block, kTile)),
        in_parts_(args.causal && part_ % kLanes == 0 && kTile % part_ == 0 && args.block % part_ == 0) {}

  void run(const Task& task) {
    b_ = task.b, head0_ = task.head0, heads_ = task.heads;
    span_ = span_of(b_, a_.q.size[2], n_k(), a_.q_start, a_.causal, a_.padding);
    if (one_by_one()) tokens_.resize(2 * heads_ * n_k());
    std::fill(columns(0), columns(heads_), 0.0f);
    std::fill(diagonals(0), diagonals(heads_), 0.0f);
    const int64_t kept = ceil_div(span_.n_k, kTile) * (in_parts_ ? 2 * kTile / part_ + 1 : kTile);  // of a row
    const int64_t most = kKept / int64_t(sizeof(float)) / std::max<int64_t>(1, kept);
    const int64_t together = std::clamp<int64_t>(most, kFewRows, probes_.kMaxRows) / heads_;
    for (int64_t i = 0; i < a_.n_rows;) {
      probes_.clear();
      for (; i < a_.n_rows && probes_.size() < together * heads_; ++i) add_probe(a_.rows[b_ * a_.n_rows + i]);
      if (probes_.size()) score();
    }
    if (one_by_one()) add_blocks();
  }

 private:
  using Storage = typename Logits::Storage;
  static constexpr int64_t kTile = Probes<Logits>::kTileKeys;

  int64_t n_k() const { return a_.k.size[2]; }
  // sums of blocks whose parts tiles do not hold: of single keys and distances first
  bool one_by_one() const { return block_ > 1 && !in_parts_; }
  float* columns(int head) { return one_by_one() ? tokens_.data() + head * n_k() : out(a_.columns, head); }
  float* diagonals(int head) { return one_by_one() ? tokens_.data() + (heads_ + head) * n_k() : out(a_.diagonals, head); }
  float* out(float* of, int head) const { return of + (b_ * a_.q.size[1] + head0_ + head) * blocks_; }

  // the heads of a query next to each other: they see the same keys
  void add_probe(int64_t row) {
    if (row < 0 || row >= span_.n_q) return;
    const int64_t at = span_.q_start + row;
    const int64_t high = a_.causal ? std::min(span_.n_k, at + 1) : span_.n_k;
    const int64_t low = a_.window ? std::max<int64_t>(0, at - a_.window + 1) : 0;
    for (int h = 0; h < heads_; ++h) {
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
    low -= low % kTile;
    const Storage* k = static_cast<const Storage*>(a_.k.data) + b_ * a_.k.stride[0] +
                       head0_ / (a_.q.size[1] / a_.k.size[1]) * a_.k.stride[1] + span_.key0 * a_.k.stride[2];
    auto load_keys = [&](int64_t key0, int64_t end) {
      probes_.load_keys(key0, end, a_.k.stride[3], [&](int64_t key) { return k + key * a_.k.stride[2]; });
    };
    if (in_parts_) keep_parts(low, high, load_keys);
    else keep_keys(low, high, load_keys);
  }

  // kept: [tile][row][key], tops: [tile][row][lane]
  template <class Load>
  void keep_keys(int64_t low, int64_t high, const Load& load_keys) {
    const int64_t places = probes_.size() * ceil_div(high - low, kTile);
    float *kept = kept_.of(places * kTile), *tops = tops_.of(places * kLanes);
    probes_.each_tile(low, high, load_keys, [&](int row, float* s, int64_t key0) {
      const int64_t at = (key0 - low) / kTile * probes_.size() + row;
      probes_.absorb(row, s, key0, kept + at * kTile);
      store(tops + at * kLanes, probes_.top(row));
    });
    for (int row = 0; row < probes_.size(); ++row) {
      const Peak peak = probes_.join(row);
      probes_.set(row, peak.top, peak.inverse());
    }
    for (int64_t key0 = low, at = 0; key0 < high; key0 += kTile)
      for (int row = 0; row < probes_.size(); ++row, ++at)
        if (probes_[row].low < key0 + kTile && probes_[row].high > key0 && probes_.gives(row))
          spread(row, kept + at * kTile, probes_.rescaled(row, load(tops + at * kLanes)), key0);
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

  // kept: [row][tile][part][farther, nearer], tops: [row][tile]
  template <class Load>
  void keep_parts(int64_t low, int64_t high, const Load& load_keys) {
    const int64_t tiles = ceil_div(high - low, kTile), numbers = 2 * kTile / part_;
    float *kept = kept_.of(probes_.size() * tiles * numbers), *tops = tops_.of(probes_.size() * tiles + kLanes);
    probes_.each_tile(low, high, load_keys, [&](int row, float* s, int64_t key0) {
      const int64_t at = row * tiles + (key0 - low) / kTile;
      // the keys of a part in the block of distances of its first; where a tile has several parts they are whole blocks
      const int64_t farther = std::min<int64_t>(uint32_t(probes_[row].position - key0) % uint32_t(block_) + 1, part_);
      tops[at] = probes_.absorb_parts(row, s, key0, part_, farther, kept + at * numbers);
    });
    for (int row = 0; row < probes_.size(); ++row) spread_parts(row, low, kept + row * tiles * numbers, tops + row * tiles);
  }

  void spread_parts(int row, int64_t low, float* kept, const float* tops) {
    const Probe& probe = probes_[row];
    const int64_t parts = kTile / part_, first = (probe.low - low) / kTile, last = ceil_div(probe.high - low, kTile);
    const F32 top = probes_.top(row);
    double total = 0;
    for (int64_t tile = first; tile < last; tile += kLanes) {
      const F32 factors = exp2_nonpositive(load(tops + tile) - top);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, last - tile); ++i)
        for (int64_t n = (tile + i) * 2 * parts; n < (tile + i + 1) * 2 * parts; ++n) total += kept[n] *= factors[i];
    }
    const float inverse = Peak{top[0], float(total)}.inverse();
    if (inverse == 0) return;
    float *column = columns(probe.head), *diagonal = diagonals(probe.head);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t key0 = low + tile * kTile, back = probe.position - key0;
      const int64_t block = uint32_t(key0) / uint32_t(block_), distance = uint32_t(back) / uint32_t(block_);
      const float* sums = kept + tile * 2 * parts;
      for (int64_t part = 0; part < parts && part * part_ <= back; ++part, sums += 2) {
        const float far = sums[0] * inverse, near = sums[1] * inverse;
        column[block + part] += far + near;
        diagonal[distance - part] += far;
        if (distance > part) diagonal[distance - part - 1] += near;
      }
    }
  }

  void add_blocks() {
    for (int head = 0; head < heads_; ++head)
      for (const auto& [from, to] : {std::pair{columns(head), out(a_.columns, head)}, {diagonals(head), out(a_.diagonals, head)}})
        for (int64_t at = 0; at < n_k(); at += block_)
          to[at / block_] = std::accumulate(from + at, from + std::min(at + block_, n_k()), 0.0f);
  }

  const WindowScore& a_;
  Probes<Logits> probes_;
  const int64_t block_, blocks_, part_;  // no block is longer than the tiles; blocks of an output; what of a tile lies in one
  const bool in_parts_;
  Span span_{};
  int64_t b_ = 0, head0_ = 0;
  int heads_ = 0;
  Room kept_, tops_;
  std::vector<float> tokens_;  // columns and diagonals of single keys and distances
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
