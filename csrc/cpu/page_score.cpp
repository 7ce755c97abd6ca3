// Quest's bound: the positive channels of a query meet the largest keys of a page, the negative ones the smallest. That is one dot
// product of twice the channels, so a page is read once for all queries of its group, and memory sets the pace.
//
// A register of scores holds R queries against kLanes / R pages. Tasks are stretches of the pages of a run; nothing is shared
// between them: threads do not change a bit.
#include <limits>

#include "run_probes.h"
#include "simd.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kTile = 64;             // pages, whose scores per head stay in L1
constexpr int64_t kTaskPages = 1024;  // 512 KiB of bfloat16 at 128 channels

template <class Element, int R>
class Worker {
  using Storage = typename Element::Storage;
  static constexpr int kPages = kLanes / R;  // lane r * kPages + j is query r and page j

 public:
  Worker(const PageScore& args, const std::vector<TokenRun>& runs)
      : a_(args),
        runs_(runs),
        d_(args.low.width),
        registers_((d_ + kLanes - 1) / kLanes),
        group_(args.q.size[1] / args.runs.kv_heads),
        panels_((group_ * args.q.size[2] + R - 1) / R) {
    const auto floats = Scratch::bytes_for<float>;
    Scratch& scratch = Scratch::mine();
    scratch.reset(floats(panels_ * R * registers_ * 2 * kLanes) + floats(group_ * kTile) + floats(d_));
    q_ = scratch.take<float>(panels_ * R * registers_ * 2 * kLanes);
    heads_ = scratch.take<float>(group_ * kTile);
    row_ = scratch.take<float>(d_);
  }

  void run(const KeyTask& task) {
    const TokenRun& run = runs_[task.run];
    if (run.n_q == 0) return;
    const int64_t queries = group_ * run.n_q, panels = (queries + R - 1) / R;
    for (int64_t i = 0; i < panels * R && packed_ != task.run; ++i) pack(run, i);
    packed_ = task.run;
    for (int64_t page = task.key0; page < task.end; page += kTile) {
      const int n = int(std::min<int64_t>(kTile, task.end - page));
      std::fill(heads_, heads_ + group_ * kTile, -std::numeric_limits<float>::infinity());
      for (int64_t panel = 0; panel < panels; ++panel) score(run, panel, run.start + page, n);
      reduce_heads(heads_, group_, kTile, n, a_.reduce, a_.out + run.start + page);
    }
  }

 private:
  // row i of a run's queries, its heads one after the other; rows behind the last repeat it
  static int64_t head_of(const TokenRun& run, int64_t group, int64_t i) { return std::min(i, group * run.n_q - 1) / run.n_q; }

  // the first of these lanes are those of the register before, where the last one does not fill up
  SA_INLINE int64_t channel_of(int64_t c) const { return std::min(c * kLanes, d_ - kLanes); }

  void pack(const TokenRun& run, int64_t i) {
    const int64_t head = head_of(run, group_, i), query = std::min(i, group_ * run.n_q - 1) - head * run.n_q;
    read_row<Element>(static_cast<const Storage*>(a_.q.data) + run.b * a_.q.stride[0] + (run.head0 + head) * a_.q.stride[1] +
                          (run.query0 + query) * a_.q.stride[2],
                      a_.q.stride[3], d_, row_);
    float* to = q_ + i / R * R * registers_ * 2 * kLanes + i % R * 2 * kLanes;
    for (int64_t c = 0; c < registers_; ++c, to += R * 2 * kLanes) {
      const int32_t twice = int32_t(c * kLanes - channel_of(c));
      const F32 x = lane_numbers() < twice ? F32{} : load(row_ + channel_of(c));
      store(to, x < 0.0f ? F32{} : x);
      store(to + kLanes, x > 0.0f ? F32{} : x);
    }
  }

  // heads_[head][page] of n pages from `page` on, n <= kTile
  void score(const TokenRun& run, int64_t panel, int64_t page, int n) {
    const float* const q = q_ + panel * R * registers_ * 2 * kLanes;
    for (int at = 0; at < n; at += kPages) {
      F32 totals[kLanes];
      for (int j = 0; j < kPages; ++j) {
        const int64_t row = page + std::min(at + j, n - 1);
        const Storage* low = static_cast<const Storage*>(a_.low.data) + row * a_.low.stride;
        const Storage* high = static_cast<const Storage*>(a_.high.data) + row * a_.high.stride;
        F32 found[R] = {};
        const float* with = q;
        for (int64_t c = 0; c < registers_; ++c, with += R * 2 * kLanes) {
          const F32 most = Element::load(high + channel_of(c)), least = Element::load(low + channel_of(c));
          #pragma GCC unroll 8
          for (int r = 0; r < R; ++r) found[r] += load(with + r * 2 * kLanes) * most + load(with + r * 2 * kLanes + kLanes) * least;
        }
        for (int r = 0; r < R; ++r) totals[r * kPages + j] = found[r];
      }
      float lanes[kLanes];
      store(lanes, sums(totals));
      for (int r = 0; r < R; ++r) {
        float* to = heads_ + head_of(run, group_, panel * R + r) * kTile + at;
        for (int j = 0; j < kPages; ++j) to[j] = std::max(to[j], lanes[r * kPages + j]);
      }
    }
  }

  const PageScore& a_;
  const std::vector<TokenRun>& runs_;
  const int64_t d_, registers_, group_, panels_;
  int packed_ = -1;  // the run whose queries lie in q_
  float* q_;         // [panel][register of channels][R][its positive part, its negative part]
  float* heads_;     // [group][kTile]
  float* row_;       // [d]
};

template <class Element, int R>
void score(const PageScore& args, const std::vector<TokenRun>& runs, const Parallel& parallel) {
  const std::vector<KeyTask> tasks = key_tasks(runs, kTaskPages);
  parallel_tasks(parallel, int64_t(tasks.size()), [&](TaskQueue& queue) {
    Worker<Element, R> worker(args, runs);
    for (int64_t t; queue.take(&t);) worker.run(tasks[t]);
  });
}

}  // namespace

void page_score(const PageScore& args, const Parallel& parallel) {
  const std::vector<TokenRun> runs = token_runs(args.runs, args.q, args.low.count);
  const int64_t queries = args.q.size[1] / args.runs.kv_heads * args.q.size[2];
  std::fill(args.out, args.out + args.low.count, 0.0f);
  with_element(args.q.dtype, [&](auto element) {
    using Element = decltype(element);
    if (queries == 1) score<Element, 1>(args, runs, parallel);
    else if (queries == 2) score<Element, 2>(args, runs, parallel);
    else score<Element, 4>(args, runs, parallel);
  });
}

}  // namespace SA_NAMESPACE
