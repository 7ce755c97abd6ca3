// Products of a few queries with the rows of runs. A softmax over a run needs all of its products first: they are kept, float32,
// and met a second time, which reads 4 bytes per row and query head where the row itself has 16 (8 channels) to 256 (128).
#include "row_scan.h"

namespace SA_NAMESPACE {
namespace {

constexpr int64_t kKept = 8 << 20;  // products that are kept at a time, 32 MiB; those of one run at the least

template <class E>
class Dots {
  using Storage = typename E::Storage;

 public:
  using Element = E;
  static constexpr int kParts = 1;

  explicit Dots(const Rows& rows) : rows_(rows), tile_(rows.width < kLanes ? kScanTile * kLanes : 0) {}

  int64_t width() const { return std::max<int64_t>(rows_.width, kLanes); }
  static SA_INLINE void split(F32 x, F32* parts) { parts[0] = x; }

  // rows narrower than a register get zeros behind them
  void stage(int64_t row, int n) {
    at_ = static_cast<const Storage*>(rows_.data) + row * rows_.stride;
    stride_ = rows_.stride;
    if (tile_.empty()) return;
    for (int i = 0; i < n; ++i) std::copy_n(at_ + i * stride_, rows_.width, tile_.data() + i * kLanes);
    at_ = tile_.data();
    stride_ = kLanes;
  }
  SA_INLINE void load(int64_t i, int64_t channel, F32* parts) const { parts[0] = E::load(at_ + i * stride_ + channel); }

 private:
  const Rows rows_;
  std::vector<Storage> tile_;  // [kScanTile][kLanes], or empty
  const Storage* at_ = nullptr;
  int64_t stride_ = 0;
};

// n lanes, as many as there are at the most, -inf behind them
SA_INLINE F32 load_lanes(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
  return lane_numbers() < int32_t(n) ? load_first(p, int(n)) : splat(-std::numeric_limits<float>::infinity());
}

// of the products of one query with a stretch of rows, in powers of two
struct Stretch {
  float top, sum;
};

// The softmax of runs [begin, end), whose products fit in what may be kept.
template <class Element, int R>
void score_soft(const RowScore& args, const std::vector<TokenRun>& runs, size_t begin, size_t end, const Parallel& parallel) {
  const int64_t group = args.q.size[1] / args.runs.kv_heads;
  const std::vector<TokenRun> some(runs.begin() + begin, runs.begin() + end);
  const std::vector<KeyTask> tasks = key_tasks(some, scan_rows(args.rows.width * sizeof(typename Element::Storage)));
  std::vector<int64_t> base(some.size() + 1, 0);  // products of each run: [query][row]
  for (size_t i = 0; i < some.size(); ++i) base[i + 1] = base[i] + group * some[i].n_q * some[i].length;
  static thread_local Scratch scratch;  // not the workers' own, this thread being one of them
  scratch.reset(Scratch::bytes_for<float>(base.back()));
  float* const products = scratch.take<float>(base.back());
  const int64_t most = group * args.q.size[2];
  std::vector<Stretch> stretches(tasks.size() * most);

  parallel_tasks(parallel, int64_t(tasks.size()), [&](TaskQueue& queue) {
    RowScan<Dots<Element>, R> scan(args.q, args.runs.kv_heads, float(args.scale * kLog2E), Dots<Element>(args.rows));
    for (int64_t t; queue.take(&t);) {
      const KeyTask& task = tasks[t];
      const TokenRun& run = some[task.run];
      if (run.n_q == 0) continue;
      scan.meet(run, task.run);
      float* const mine = products + base[task.run];
      for (int64_t row = task.key0; row < task.end; row += kScanTile) {
        const int n = int(std::min<int64_t>(kScanTile, task.end - row));
        scan.tile(run.start + row, n,
                  [&](int64_t query, const float* found) { std::copy_n(found, n, mine + query * run.length + row); });
      }
      for (int64_t query = 0; query < group * run.n_q; ++query) {
        const float* from = mine + query * run.length;
        F32 top = splat(-std::numeric_limits<float>::infinity()), sum{};
        const auto each = [&](const auto& what) {
          for (int64_t row = task.key0; row < task.end; row += kLanes) what(load_lanes(from + row, task.end - row));
        };
        each([&](F32 x) { top = max(top, x); });
        float best = top[0];
        for (int i = 1; i < kLanes; ++i) best = std::max(best, top[i]);
        each([&](F32 x) { sum += exp2_nonpositive(x - best); });
        stretches[t * most + query] = {best, SA_NAMESPACE::sum(sum)};
      }
    }
  });

  std::vector<Stretch> whole(some.size() * most, {-std::numeric_limits<float>::infinity(), 0.0f});
  for (size_t t = 0; t < tasks.size(); ++t)
    for (int64_t query = 0; query < group * some[tasks[t].run].n_q; ++query) {
      Stretch& all = whole[tasks[t].run * most + query];
      const Stretch& part = stretches[t * most + query];
      const float top = std::max(all.top, part.top);
      all = {top, all.sum * std::exp2(all.top - top) + part.sum * std::exp2(part.top - top)};
    }

  parallel_tasks(parallel, int64_t(tasks.size()), [&](TaskQueue& queue) {
    std::vector<float> heads(group * kScanTile);
    for (int64_t t; queue.take(&t);) {
      const KeyTask& task = tasks[t];
      const TokenRun& run = some[task.run];
      for (int64_t row = task.key0; row < task.end && run.n_q; row += kScanTile) {
        const int n = int(std::min<int64_t>(kScanTile, task.end - row));
        std::fill(heads.begin(), heads.end(), 0.0f);
        for (int64_t query = 0; query < group * run.n_q; ++query) {
          const Stretch& all = whole[task.run * most + query];
          const float* from = products + base[task.run] + query * run.length + row;
          float* to = heads.data() + query / run.n_q * kScanTile;
          for (int i = 0; i < n; i += kLanes) {
            const F32 share = exp2_nonpositive(load_lanes(from + i, n - i) - all.top) / all.sum;
            store(to + i, max(load(to + i), share));
          }
        }
        reduce_heads(heads.data(), group, kScanTile, n, args.reduce, args.out + run.start + row);
      }
    }
  });
}

template <class Element, int R>
void score(const RowScore& args, const std::vector<TokenRun>& runs, const Parallel& parallel) {
  if (!args.soft) {
    scan_largest<Dots<Element>, R>(args.q, args.runs, runs, float(args.scale), Dots<Element>(args.rows),
                                       args.rows.width * sizeof(typename Element::Storage), args.reduce, args.out, parallel);
    return;
  }
  const int64_t group = args.q.size[1] / args.runs.kv_heads;
  for (size_t begin = 0, end; begin < runs.size(); begin = end) {
    int64_t kept = 0;
    for (end = begin; end < runs.size(); ++end) {
      kept += group * runs[end].n_q * runs[end].length;
      if (end > begin && kept > kKept) break;
    }
    score_soft<Element, R>(args, runs, begin, end, parallel);
  }
}

}  // namespace

void row_score(const RowScore& args, const Parallel& parallel) {
  const std::vector<TokenRun> runs = token_runs(args.runs, args.q, args.rows.count);
  std::fill(args.out, args.out + args.rows.count, 0.0f);
  with_element(args.q.dtype, [&](auto element) {
    with_panel(args.q.size[1] / args.runs.kv_heads * args.q.size[2],
               [&](auto panel) { score<decltype(element), panel>(args, runs, parallel); });
  });
}

}  // namespace SA_NAMESPACE
