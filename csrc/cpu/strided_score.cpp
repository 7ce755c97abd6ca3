// Largest sampled probability of each block pair. Lanes are sampled queries, so maxima and sums over keys are plain vector
// operations, and lanes meet only when the largest of a query block is written.
//
// One pass: a lane keeps its running maximum and sum, and the largest logit of each key block; what that logit is worth is known
// at the end. A task is a few query blocks of one head that sample the same residue; it alone writes their rows. A lane's result
// depends on its own logits alone.
#include <algorithm>
#include <cfloat>
#include <vector>

#include "../spans.h"
#include "logits.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kTileKeys = 96;    // sampled keys: whole steps of 6 and of 32
constexpr int kTaskLanes = 128;  // what shares one packing of the keys

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Task {
  int64_t b, head, block0, block1, step;  // query blocks block0, block0 + step .. below block1
};

// Sampled queries of one panel, and which sampled keys each may see: low <= w < high.
template <int kPanel>
struct Panel {
  int lanes = 0;
  int64_t low, high;          // what any lane sees
  int64_t all_low, all_high;  // what every lane in use sees
  int64_t block[kPanel];      // query block
  int32_t lane_low[kPanel], lane_high[kPanel];
};

template <class Logits>
class Worker {
 public:
  Worker(const StridedScore& args)
      : a_(args),
        k_blocks_(ceil_div(args.k.size[2], args.block_k)),
        logits_(args.q.size[3]),
        factor_(float(args.scale * double(kLog2E))) {
    const size_t queries = kPanels * logits_.panel_size(), keys = kTileKeys * logits_.row_size();
    Scratch& scratch = Scratch::mine();
    const auto floats = Scratch::bytes_for<float>;
    scratch.reset(Scratch::bytes_for<Number>(queries) + Scratch::bytes_for<Number>(keys) + floats(kTileKeys * kPanel) +
                  floats(k_blocks_ * kTaskLanes) + 2 * floats(kTaskLanes));
    queries_ = scratch.take<Number>(queries), keys_ = scratch.take<Number>(keys);
    s_ = scratch.take<float>(kTileKeys * kPanel), peak_ = scratch.take<float>(k_blocks_ * kTaskLanes);
    m_ = scratch.take<float>(kTaskLanes), l_ = scratch.take<float>(kTaskLanes);
  }

  void run(const Task& task) {
    task_ = task;
    span_ = span_of(task.b, a_.q.size[2], a_.k.size[2], a_.q_start, a_.causal, a_.padding);
    panels_ = 0;
    for (int64_t block = task.block0; block < task.block1; block += task.step) {
      std::fill(out(block), out(block) + k_blocks_, 0.0f);
      const int64_t start = block * a_.block_q, end = std::min(start + a_.block_q, span_.n_q);
      if (start >= end || span_.n_k == 0) continue;
      const int64_t residue = a_.rotate ? block % a_.stride : 0;
      residue_k_ = std::min(residue, span_.n_k - 1), samples_k_ = ceil_div(span_.n_k - residue_k_, a_.stride);
      for (int64_t token = start + std::min(residue, end - start - 1); token < end; token += a_.stride) add_lane(block, token);
    }
    score();
  }

 private:
  using Storage = typename Logits::Storage;
  using Number = typename Logits::Number;
  static constexpr int kPanel = Logits::kPanel, kStep = Logits::kRowStep, kVecs = kPanel / kLanes, kPanels = kTaskLanes / kPanel;
  static_assert(kTileKeys % kStep == 0 && kTaskLanes % kPanel == 0);

  float* out(int64_t block) const {
    return a_.out + ((task_.b * a_.q.size[1] + task_.head) * ceil_div(a_.q.size[2], a_.block_q) + block) * k_blocks_;
  }

  void add_lane(int64_t block, int64_t token) {
    if (panels_ == 0 || panel_[panels_ - 1].lanes == kPanel) {
      if (panels_ == kPanels) score();
      Panel<kPanel>& fresh = panel_[panels_++];
      fresh.lanes = 0, fresh.low = samples_k_, fresh.high = 0, fresh.all_low = 0, fresh.all_high = samples_k_;
      std::fill(fresh.lane_high, fresh.lane_high + kPanel, 0);
      std::fill(fresh.lane_low, fresh.lane_low + kPanel, 0);
    }
    Panel<kPanel>& p = panel_[panels_ - 1];
    const int64_t at = span_.q_start + token, stride = a_.stride;
    int64_t high = samples_k_, low = 0;
    if (a_.causal) high = at < residue_k_ ? 0 : std::min(high, (at - residue_k_) / stride + 1);
    if (a_.window) low = std::min(high, ceil_div(std::max<int64_t>(at - a_.window + 1 - residue_k_, 0), stride));
    const int lane = p.lanes++;
    p.block[lane] = block, p.lane_low[lane] = int32_t(low), p.lane_high[lane] = int32_t(high);
    p.all_low = std::max(p.all_low, low), p.all_high = std::min(p.all_high, high);
    if (low < high) p.low = std::min(p.low, low), p.high = std::max(p.high, high);
    lane_query_[(panels_ - 1) * kPanel + lane] = static_cast<const Storage*>(a_.q.data) + task_.b * a_.q.stride[0] +
                                                task_.head * a_.q.stride[1] + (span_.row0 + token) * a_.q.stride[2];
  }

  // all lanes at hand against the keys they see; empties the panels
  void score() {
    if (panels_ == 0) return;
    int64_t low = samples_k_, high = 0;
    for (int p = 0; p < panels_; ++p) {
      std::fill(lane_query_ + p * kPanel + panel_[p].lanes, lane_query_ + (p + 1) * kPanel, nullptr);
      logits_.pack_panel(lane_query_ + p * kPanel, a_.q.stride[3], queries_ + p * logits_.panel_size());
      low = std::min(low, panel_[p].low), high = std::max(high, panel_[p].high);
    }
    const int64_t per_block = a_.block_k / a_.stride;
    block0_ = low / per_block, block1_ = low < high ? ceil_div(high, per_block) : block0_;
    std::fill(m_, m_ + kTaskLanes, kNoSink);
    std::fill(l_, l_ + kTaskLanes, 0.0f);
    std::fill(peak_, peak_ + (block1_ - block0_) * kTaskLanes, kNoSink);
    // tiles start at fixed keys, so that a lane's sum has the same order whatever its neighbours see
    for (int64_t w = low - low % kTileKeys; w < high; w += kTileKeys) {
      load_keys(w, int(std::min<int64_t>(kTileKeys, high - w)));
      for (int p = 0; p < panels_; ++p) {
        const int n = int(std::min<int64_t>(kTileKeys, panel_[p].high - w));
        if (n <= 0 || w + n <= panel_[p].low) continue;
        for (int i = 0; i < n; i += kStep)
          logits_.multiply(keys_ + i * logits_.row_size(), std::min(n - i, kStep), queries_ + p * logits_.panel_size(),
                           s_ + i * kPanel);
        absorb(p, w, n);
      }
    }
    for (int p = 0; p < panels_; ++p) collect(p);
    panels_ = 0;
  }

  // rows up to a whole step are read by the product, so those past the last one are made 0
  void load_keys(int64_t w0, int n) {
    const int64_t kv_head = task_.head / (a_.q.size[1] / a_.k.size[1]);
    const Storage* k = static_cast<const Storage*>(a_.k.data) + task_.b * a_.k.stride[0] + kv_head * a_.k.stride[1] +
                       (span_.key0 + residue_k_) * a_.k.stride[2];
    for (int i = 0; i < n; ++i)
      logits_.pack_row(k + (w0 + i) * a_.stride * a_.k.stride[2], a_.k.stride[3], keys_ + i * logits_.row_size());
    std::fill(keys_ + n * logits_.row_size(), keys_ + ceil_div(n, kStep) * kStep * logits_.row_size(), Number{});
  }

  // logits of sampled keys [w0, w0 + n) into the lanes' maxima and sums, and into the peaks of their key blocks
  void absorb(int p, int64_t w0, int n) {
    const Panel<kPanel>& panel = panel_[p];
    const bool edge = w0 < panel.all_low || w0 + n > panel.all_high;
    const int64_t per_block = a_.block_k / a_.stride;
    for (int v = 0; v < kVecs && v * kLanes < panel.lanes; ++v) {
      float* x = s_ + v * kLanes;
      I32 low, high;
      std::memcpy(&low, panel.lane_low + v * kLanes, sizeof low), std::memcpy(&high, panel.lane_high + v * kLanes, sizeof high);
      const int lane = p * kPanel + v * kLanes;
      const F32 before = load(m_ + lane);
      F32 top = before;
      for (int i = 0; i < n;) {
        const int64_t block = (w0 + i) / per_block;
        const int end = int(std::min<int64_t>(n, (block + 1) * per_block - w0));
        F32 highest = splat(kNoSink);
        for (; i < end; ++i) {
          F32 y = load(x + i * kPanel) * factor_;
          if (edge) {
            const I32 w = splat(int32_t(w0 + i));
            y = (w >= low) & (w < high) ? y : splat(kHiddenLogit);
          }
          store(x + i * kPanel, y);
          highest = max(y, highest);
        }
        if (block >= block0_) {
          float* peak = peak_ + (block - block0_) * kTaskLanes + lane;
          store(peak, max(highest, load(peak)));
        }
        top = max(highest, top);
      }
      F32 total = load(l_ + lane) * exp2_nonpositive(before - top);
      for (int i = 0; i < n; ++i) total += exp2_nonpositive(load(x + i * kPanel) - top);
      store(m_ + lane, top), store(l_ + lane, total);
    }
  }

  // the largest probability of each key block, over the panel's lanes of each query block
  void collect(int p) {
    const Panel<kPanel>& panel = panel_[p];
    float *m = m_ + p * kPanel, *l = l_ + p * kPanel;
    // a query without any visible key, or with NaN or infinite logits, has no probabilities
    for (int lane = 0; lane < kPanel; ++lane) l[lane] = l[lane] > 0 && l[lane] <= FLT_MAX ? 1 / l[lane] : 0.0f;
    alignas(64) float share[kPanel];
    for (int64_t b = block0_; b < block1_; ++b) {
      const float* peak = peak_ + (b - block0_) * kTaskLanes + p * kPanel;
      for (int v = 0; v < kPanel; v += kLanes) store(share + v, exp2_nonpositive(load(peak + v) - load(m + v)) * load(l + v));
      for (int lane = 0; lane < panel.lanes;) {
        const int64_t block = panel.block[lane];
        float largest = 0;
        for (; lane < panel.lanes && panel.block[lane] == block; ++lane)
          if (l[lane] > 0) largest = std::max(largest, share[lane]);
        float* cell = out(block) + b;
        *cell = std::max(*cell, largest);
      }
    }
  }

  const StridedScore& a_;
  const int64_t k_blocks_;
  const Logits logits_;
  const float factor_;
  Task task_{};
  Span span_{};
  int64_t residue_k_ = 0, samples_k_ = 0;  // sampled keys of the blocks at hand: first one, and how many
  int64_t block0_ = 0, block1_ = 0;        // key blocks that any lane sees
  int panels_ = 0;
  Panel<kPanel> panel_[kPanels];
  const Storage* lane_query_[kTaskLanes];
  Number *queries_, *keys_;        // panels, [key][channel]
  float *s_, *peak_, *m_, *l_;     // [key][lane], [key block][lane], [lane] twice
};

}  // namespace

void strided_score(const StridedScore& args, const Parallel& parallel) {
  const int64_t heads = args.q.size[1], q_blocks = ceil_div(args.q.size[2], args.block_q);
  const int64_t classes = args.rotate ? std::min(args.stride, q_blocks) : 1;
  const int64_t together = std::max<int64_t>(1, kTaskLanes / (args.block_q / args.stride));
  std::vector<Task> tasks;
  // the keys of a head stay in cache for all its tasks; its longest come first
  for (int64_t bh = 0; bh < args.q.size[0] * heads; ++bh)
    for (int64_t chunk = ceil_div(q_blocks, together * classes) - 1; chunk >= 0; --chunk)
      for (int64_t residue = 0; residue < classes; ++residue) {
        const int64_t block0 = chunk * together * classes + residue;
        tasks.push_back({bh / heads, bh % heads, block0, std::min(q_blocks, block0 + together * classes), classes});
      }
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
