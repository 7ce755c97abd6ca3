// Block lists from block scores, row by row and without a full sort.
//
// Candidates are visited by falling score only until the rule is satisfied, see falling.h. Mass is summed in double in exactly
// the reference's order.
#include <algorithm>
#include <cfloat>
#include <cstring>

#include "../checks.h"
#include "../ops.h"
#include "../spans.h"
#include "falling.h"
#include "simd.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kRows = 16;  // rows per task

class Worker {
 public:
  explicit Worker(const SelectBlocks& args) : a_(args), k_blocks_(args.score.size[3]) {
    Scratch& scratch = Scratch::mine();
    scratch.reset(Scratch::bytes_for<float>(k_blocks_) + Scratch::bytes_for<uint64_t>(k_blocks_) + Scratch::bytes_for<uint8_t>(k_blocks_));
    score_ = scratch.take<float>(k_blocks_);
    sorted_ = scratch.take<uint64_t>(k_blocks_);
    kept_ = scratch.take<uint8_t>(k_blocks_);
  }

  // looks at blocks out of reach and at padding too, as the reference does
  bool is_mass(int64_t row) {
    read(row, 0, k_blocks_);
    bool good = true;
    for (int64_t j = 0; j < k_blocks_; ++j) good &= score_[j] >= 0 && score_[j] <= FLT_MAX;
    return good;
  }

  void select(int64_t row) {
    const int64_t q_blocks = a_.score.size[2], block = row % q_blocks, head = row / q_blocks % a_.score.size[1];
    const Span span = span_of(row / q_blocks / a_.score.size[1], a_.n_q, a_.n_k, a_.q_start, a_.causal, a_.padding);
    int32_t* list = a_.indices + row * k_blocks_;
    const int64_t count = block * a_.block_q < span.n_q ? choose(row, head, block, reach(a_, span, block), list) : 0;
    a_.counts[row] = static_cast<int32_t>(count);
    std::fill(list + count, list + k_blocks_, -1);
  }

 private:
  // score_[low, end) of a row; adding 0 turns -0 into 0, whose bits are in order
  void read(int64_t row, int64_t low, int64_t end) {
    const View& v = a_.score;
    const int64_t b = row / (v.size[1] * v.size[2]), head = row / v.size[2] % v.size[1], block = row % v.size[2];
    const float* from = static_cast<const float*>(v.data) + b * v.stride[0] + head * v.stride[1] + block * v.stride[2];
    read_row<Fp32>(from + low * v.stride[3], v.stride[3], end - low, score_ + low);
    for (int64_t j = low; j < end; ++j) score_[j] += 0.f;
  }

  int64_t choose(int64_t row, int64_t head, int64_t block, Reach reach, int32_t* list) {
    const int64_t b = row / a_.score.size[2] / a_.score.size[1];
    const int64_t low = std::max<int64_t>(0, reach.low), end = std::min(reach.high + 1, k_blocks_);
    if (low >= end) return 0;
    // the candidates lie between the leading and the trailing forced blocks
    const int64_t first = std::clamp(a_.sink, low, end);
    const int64_t last = a_.recent ? std::clamp(reach.own - (a_.recent - 1), first, end) : end;
    std::memset(kept_ + low, 1, first - low), std::memset(kept_ + first, 0, last - first), std::memset(kept_ + last, 1, end - last);
    read(row, low, end);
    if (a_.threshold) cover(low, first, last, end, a_.threshold[head]);
    else take(first, last, a_.top_k.at(b, head, block) - (first - low) - (end - last));
    if (a_.always.data)
      for (int64_t j = low; j < end; ++j) kept_[j] |= a_.always.at(b, head, block, j);
    int64_t count = 0;
    for (int64_t j = low; j < end; ++j) {
      list[count] = static_cast<int32_t>(j);
      count += kept_[j];
    }
    return count;
  }

  // top-p over [low, end), whose ends outside [first, last) are forced and count
  void cover(int64_t low, int64_t first, int64_t last, int64_t end, double share) {
    if (share >= 1) return static_cast<void>(std::memset(kept_ + first, 1, last - first));
    double total = 0, before = 0;
    for (int64_t j = low; j < end; ++j) total += score_[j];
    for (int64_t j = low; j < first; ++j) before += score_[j];
    for (int64_t j = last; j < end; ++j) before += score_[j];
    const double target = share * total;
    falling(first, last, [&](int64_t j) {
      const double after = before + score_[j];
      if (!(a_.inclusive ? before < target : after <= target) || !(score_[j] > 0)) return false;
      before = after;
      kept_[j] = 1;
      return true;
    });
  }

  void take(int64_t first, int64_t last, int64_t count) {
    if (count >= last - first) return static_cast<void>(std::memset(kept_ + first, 1, last - first));
    falling(first, last, [&](int64_t j) { return count-- > 0 && (kept_[j] = 1); });
  }

  // visit(j) for j in [first, last) by falling score, ties to the lower j, until it returns false
  template <class Visit>
  void falling(int64_t first, int64_t last, const Visit& visit) {
    if (first >= last) return;
    visit_falling([&](const auto& see) {
      for (int64_t j = first; j < last; ++j) see(score_[j], j);
    }, sorted_, visit);
  }

  const SelectBlocks& a_;
  const int64_t k_blocks_;
  float* score_;
  uint64_t* sorted_;
  uint8_t* kept_;
};

}  // namespace

void select_blocks(const SelectBlocks& args, const Parallel& parallel) {
  const View& v = args.score;
  const int64_t heads = v.size[1], q_blocks = v.size[2], rows = v.size[0] * heads * q_blocks, tasks = (rows + kRows - 1) / kRows;
  for (int64_t h = 0; args.threshold && h < heads; ++h)
    SA_CHECK(args.threshold[h] >= 0 && args.threshold[h] <= 1, "threshold has an entry outside [0, 1]: head ", h, " got ",
             args.threshold[h], "; it is a share of attention mass");
  std::atomic<int64_t> bad{rows};
  parallel_tasks(parallel, tasks, [&](TaskQueue& queue) {
    Worker worker(args);
    for (int64_t task; queue.take(&task);)
      for (int64_t row = task * kRows; row < std::min(rows, (task + 1) * kRows); ++row)
        if (!worker.is_mass(row)) bad = row;
  });
  SA_CHECK(bad == rows, "score has a NaN, infinite or negative entry for batch row ", bad / q_blocks / heads, ", head ",
           bad / q_blocks % heads, ", query block ", bad % q_blocks, "; mass is finite and not negative");
  parallel_tasks(parallel, tasks, [&](TaskQueue& queue) {
    Worker worker(args);
    for (int64_t task; queue.take(&task);)
      for (int64_t row = task * kRows; row < std::min(rows, (task + 1) * kRows); ++row) worker.select(row);
  });
}

}  // namespace SA_NAMESPACE
