// What probe rows attend to. Lanes are keys, so a column sum is one addition per register, and so is a diagonal sum: the keys of
// one row, read backwards, are consecutive distances.
//
// Two passes over the keys, a tile at a time: the first finds each row's maximum and sum (lane by lane, joined at its end), the
// second computes the logits again and adds up probabilities. No buffer grows with the keys. A task owns the outputs of its heads
// and adds rows in order, and a row's own sums start at fixed keys: neither threads, nor neighbours, nor the future change a bit.
#include <algorithm>
#include <cfloat>
#include <vector>

#include "../spans.h"
#include "logits.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kTileKeys = 256;
constexpr int kTaskRows = 256;  // of all heads of a task together: what shares one packing of the keys
constexpr int kPiece = 96;      // rows whose logits of one tile exist at a time: whole steps of 6 and of 32
constexpr int kMaxHeads = 4;
constexpr int64_t kEnoughTasks = 16;  // below this, groups of heads are divided

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Task {
  int64_t b, head0;  // heads of one KV head
  int heads;
};

// One probe query of one head.
struct Probe {
  int64_t position, low, high;  // sees keys low <= key < high
  int head;
};

template <class Logits>
class Worker {
 public:
  Worker(const WindowScore& args)
      : a_(args),
        logits_(args.q.size[3]),
        cap_(args.softcap > 0 ? float(args.softcap * kLog2E) : 0.0f),
        factor_(float(args.softcap > 0 ? args.scale / args.softcap : args.scale * double(kLog2E))) {
    const size_t rows = (kTaskRows + kStep) * logits_.row_size(), keys = kTileKeys / kPanel * logits_.panel_size();
    Scratch& scratch = Scratch::mine();
    const auto floats = Scratch::bytes_for<float>;
    scratch.reset(Scratch::bytes_for<Number>(rows) + Scratch::bytes_for<Number>(keys) + floats(kPiece * kTileKeys) +
                  2 * floats(kTaskRows * kLanes));
    rows_ = scratch.take<Number>(rows), keys_ = scratch.take<Number>(keys);
    s_ = scratch.take<float>(kPiece * kTileKeys);
    m_ = scratch.take<float>(kTaskRows * kLanes), l_ = scratch.take<float>(kTaskRows * kLanes);
  }

  void run(const Task& task) {
    b_ = task.b, head0_ = task.head0;
    span_ = span_of(b_, a_.q.size[2], n_k(), a_.q_start, a_.causal, a_.padding);
    std::fill(columns(0), columns(task.heads), 0.0f);
    std::fill(diagonals(0), diagonals(task.heads), 0.0f);
    const int64_t together = kTaskRows / task.heads;
    for (int64_t i = 0; i < a_.n_rows;) {
      probes_.clear();
      for (; i < a_.n_rows && int64_t(probes_.size()) < together * task.heads; ++i)
        add_probe(a_.rows[b_ * a_.n_rows + i], task.heads);
      if (!probes_.empty()) score();
    }
  }

 private:
  using Storage = typename Logits::Storage;
  using Number = typename Logits::Number;
  static constexpr int kPanel = Logits::kPanel, kStep = Logits::kRowStep, kVecs = kPanel / kLanes;
  static_assert(kTileKeys % kPanel == 0 && kPiece % kStep == 0);

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
      logits_.pack_row(from, a_.q.stride[3], rows_ + int64_t(probes_.size()) * logits_.row_size());
      probes_.push_back({at, low, high, h});
    }
  }

  void score() {
    const int n = int(probes_.size());
    std::fill(rows_ + n * logits_.row_size(), rows_ + (n + kStep) * logits_.row_size(), Number{});
    std::fill(m_, m_ + n * kLanes, kNoSink);
    std::fill(l_, l_ + n * kLanes, 0.0f);
    int64_t low = span_.n_k, high = 0;
    for (const Probe& p : probes_) low = std::min(low, p.low), high = std::max(high, p.high);
    low -= low % kTileKeys;
    each_tile(low, high, [&](int row, const Probe& probe, float* s, int64_t key0) { absorb(row, probe, s, key0); });
    for (int row = 0; row < n; ++row) join_lanes(row);
    each_tile(low, high, [&](int row, const Probe& probe, float* s, int64_t key0) {
      if (l_[row * kLanes] > 0) spread(row, probe, s, key0);
    });
  }

  // use(row, probe, logits, key0) for every probe and every tile that it sees a key of
  template <class Use>
  void each_tile(int64_t low, int64_t high, const Use& use) {
    const int n = int(probes_.size());
    for (int64_t key0 = low; key0 < high; key0 += kTileKeys) {
      const int64_t end = std::min(key0 + kTileKeys, high);
      const int panels = int(ceil_div(end - key0, kPanel));
      auto sees = [&](const Probe& p) { return p.low < end && p.high > key0; };
      if (std::none_of(probes_.begin(), probes_.end(), sees)) continue;
      load_keys(key0, panels);
      for (int piece = 0; piece < n; piece += kPiece) {
        const int rows = std::min(n - piece, kPiece);
        for (int panel = 0; panel < panels; ++panel)
          for (int row = 0; row < rows; row += kStep) {
            const Probe* first = probes_.data() + piece + row;
            const int count = std::min(rows - row, kStep);
            if (std::any_of(first, first + count, sees))
              logits_.multiply(rows_ + (piece + row) * logits_.row_size(), count, keys_ + panel * logits_.panel_size(),
                               s_ + (panel * kPiece + row) * kPanel);
          }
        for (int row = 0; row < rows; ++row)
          if (sees(probes_[piece + row])) use(piece + row, probes_[piece + row], s_ + row * kPanel, key0);
      }
    }
  }

  void load_keys(int64_t key0, int panels) {
    const int64_t kv_head = head0_ / (a_.q.size[1] / a_.k.size[1]);
    const Storage* k = static_cast<const Storage*>(a_.k.data) + b_ * a_.k.stride[0] + kv_head * a_.k.stride[1];
    for (int panel = 0; panel < panels; ++panel) {
      const Storage* lanes[kPanel];
      for (int i = 0; i < kPanel; ++i) {
        const int64_t key = key0 + panel * kPanel + i;
        lanes[i] = key < span_.n_k ? k + (span_.key0 + key) * a_.k.stride[2] : nullptr;
      }
      logits_.pack_panel(lanes, a_.k.stride[3], keys_ + panel * logits_.panel_size());
    }
  }

  // register v of a row's logits of a tile
  static SA_INLINE float* part(float* s, int64_t v) { return s + v / kVecs * (kPiece * kPanel) + v % kVecs * kLanes; }

  // registers [from, to) of the tile hold keys that the probe sees
  static SA_INLINE void seen(const Probe& p, int64_t key0, int64_t* from, int64_t* to) {
    *from = std::max<int64_t>(p.low - key0, 0) / kLanes;
    *to = ceil_div(std::min<int64_t>(p.high - key0, kTileKeys), kLanes);
  }

  // logits in base 2, hidden keys at -inf
  SA_INLINE F32 logit(const float* s, const Probe& p, int64_t key) const {
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

  // first pass: the row's running maximum and sum, each lane its own
  void absorb(int row, const Probe& probe, float* s, int64_t key0) {
    int64_t from, to;
    seen(probe, key0, &from, &to);
    const F32 before = load(m_ + row * kLanes);
    F32 top = before;
    for (int64_t v = from; v < to; ++v) {
      const F32 x = logit(part(s, v), probe, key0 + v * kLanes);
      store(part(s, v), x);
      top = max(x, top);
    }
    F32 total = load(l_ + row * kLanes) * exp2_nonpositive(before - top);
    for (int64_t v = from; v < to; ++v) total += exp2_nonpositive(load(part(s, v)) - top);
    store(m_ + row * kLanes, top), store(l_ + row * kLanes, total);
  }

  // the lanes of a row become one: m is its maximum everywhere, l the inverse of its sum, or 0 where nothing can be added:
  // no visible key, or NaN or infinite logits
  void join_lanes(int row) {
    float *m = m_ + row * kLanes, *l = l_ + row * kLanes;
    const F32 top = splat(*std::max_element(m, m + kLanes));
    const float total = sum(load(l) * exp2_nonpositive(load(m) - top));
    store(m, top);
    store(l, splat(total > 0 && total <= FLT_MAX ? 1 / total : 0.0f));
  }

  // second pass: probabilities into the sums of keys and of distances
  void spread(int row, const Probe& probe, float* s, int64_t key0) {
    float *column = columns(probe.head), *diagonal = diagonals(probe.head);
    const F32 top = load(m_ + row * kLanes), inverse = load(l_ + row * kLanes);
    I32 backwards{};
    for (int i = 0; i < kLanes; ++i) backwards[i] = kLanes - 1 - i;
    int64_t from, to;
    seen(probe, key0, &from, &to);
    for (int64_t v = from; v < to; ++v) {
      const int64_t key = key0 + v * kLanes, nearest = probe.position - key - (kLanes - 1);
      const F32 p = exp2_nonpositive(logit(part(s, v), probe, key) - top) * inverse;
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
  const Logits logits_;
  const float cap_, factor_;
  Span span_{};
  int64_t b_ = 0, head0_ = 0;
  std::vector<Probe> probes_;  // of the rows at hand
  Number *rows_, *keys_;       // [probe][channel], panels of keys
  float *s_, *m_, *l_;         // [panel][row of the piece][lane], [probe][lane] twice
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
