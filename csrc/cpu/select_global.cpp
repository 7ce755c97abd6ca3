// Block lists from one budget per head or per batch row, without a full sort.
//
// 1. Every score is looked at: it must be a mass. 2. Each pool marks what it keeps in the output, one int per pair: pairs are
// visited by falling score only until the budget is spent, see falling.h. 3. Each row packs its marks into a list in place.
// Mass is summed in double in exactly the reference's order: the total by rising, the budget by falling rank.
#include <algorithm>
#include <cfloat>
#include <memory>

#include "../checks.h"
#include "../ops.h"
#include "../spans.h"
#include "falling.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kRows = 16;  // rows per task

class Selection {
 public:
  explicit Selection(const SelectGlobal& args)
      : a_(args), heads_(args.score.size[1]), q_blocks_(args.score.size[2]), k_blocks_(args.score.size[3]) {}

  // looks at blocks out of reach and at padding too, as the reference does
  bool is_mass(int64_t row) const {
    bool good = true;
    const float* from = scores(row);
    for (int64_t j = 0; j < k_blocks_; ++j, from += a_.score.stride[3]) good &= *from >= 0 && *from <= FLT_MAX;
    return good;
  }

  // marks the pairs of heads [head0, head1) of a batch row; sorted has room for all of them
  void choose(int64_t b, int64_t head0, int64_t head1, uint64_t* sorted) const {
    const double share = *std::max_element(a_.threshold + head0, a_.threshold + head1);
    const int64_t row0 = (b * heads_ + head0) * q_blocks_, rows = (head1 - head0) * q_blocks_;
    int32_t* marks = a_.indices + row0 * k_blocks_;
    std::fill(marks, marks + rows * k_blocks_, 0);
    // f(score, number) for every pair in reach that has a score
    const auto each = [&](const auto& f) {
      for (int64_t row = 0; row < rows; ++row) {
        const float* from = scores(row0 + row);
        reachable(row0 + row, [&](int64_t j) {
          if (const float x = from[j * a_.score.stride[3]]; x > 0) f(x, row * k_blocks_ + j);
        });
      }
    };
    double total = 0, before = 0;
    each([&](float x, int64_t) { total += x; });
    const double target = share * total;
    if (share >= 1) {
      for (int64_t row = 0; row < rows; ++row) reachable(row0 + row, [&](int64_t j) { marks[row * k_blocks_ + j] = 1; });
      return;
    }
    visit_falling(each, sorted, [&](int64_t number) {
      const double after = before + scores(row0 + number / k_blocks_)[number % k_blocks_ * a_.score.stride[3]];
      if (!(a_.inclusive ? before < target : after <= target)) return false;
      before = after;
      marks[number] = 1;
      return true;
    });
  }

  // marks, and what is kept besides, become an ascending list
  void pack(int64_t row) const {
    int32_t* list = a_.indices + row * k_blocks_;
    int64_t count = 0;
    reachable(row, [&](int64_t j) {
      const bool besides = a_.always.data && a_.always.at(row / q_blocks_ / heads_, row / q_blocks_ % heads_, row % q_blocks_, j);
      if (list[j] || besides) list[count++] = static_cast<int32_t>(j);
    });
    a_.counts[row] = static_cast<int32_t>(count);
    std::fill(list + count, list + k_blocks_, -1);
  }

 private:
  const float* scores(int64_t row) const {
    const View& v = a_.score;
    return static_cast<const float*>(v.data) + row / q_blocks_ / heads_ * v.stride[0] + row / q_blocks_ % heads_ * v.stride[1] +
           row % q_blocks_ * v.stride[2];
  }

  // f(j) for the key blocks that a row reaches, rising
  template <class F>
  SA_INLINE void reachable(int64_t row, const F& f) const {
    const Span span = span_of(row / q_blocks_ / heads_, a_.n_q, a_.n_k, a_.q_start, a_.causal, a_.padding);
    const int64_t block = row % q_blocks_;
    if (block * a_.block_q >= span.n_q) return;
    const Reach found = reach(a_, span, block);
    for (int64_t j = found.low; j < std::min(found.high + 1, k_blocks_); ++j) f(j);
  }

  const SelectGlobal& a_;
  const int64_t heads_, q_blocks_, k_blocks_;
};

}  // namespace

void select_global(const SelectGlobal& args, const Parallel& parallel) {
  const View& v = args.score;
  const int64_t batch = v.size[0], heads = v.size[1], q_blocks = v.size[2], rows = batch * heads * q_blocks;
  for (int64_t h = 0; h < heads; ++h)
    SA_CHECK(args.threshold[h] >= 0 && args.threshold[h] <= 1, "threshold has an entry outside [0, 1]: head ", h, " got ",
             args.threshold[h], "; it is a share of the score");
  const Selection selection(args);
  const auto each_row = [&](const auto& f) {
    parallel_tasks(parallel, (rows + kRows - 1) / kRows, [&](TaskQueue& queue) {
      for (int64_t task; queue.take(&task);)
        for (int64_t row = task * kRows; row < std::min(rows, (task + 1) * kRows); ++row) f(row);
    });
  };
  std::atomic<int64_t> bad{rows};
  each_row([&](int64_t row) {
    if (!selection.is_mass(row)) bad = row;
  });
  SA_CHECK(bad == rows, "score has a NaN, infinite or negative entry for batch row ", bad / q_blocks / heads, ", head ",
           bad / q_blocks % heads, ", query block ", bad % q_blocks, "; mass is finite and not negative");
  const int64_t together = args.all_heads ? heads : 1, pools = rows ? batch * heads / together : 0;
  parallel_tasks(parallel, pools, [&](TaskQueue& queue) {
    // not kept between calls: a pool may be every pair of a batch row
    const auto sorted = std::make_unique_for_overwrite<uint64_t[]>(together * q_blocks * v.size[3]);
    for (int64_t task; queue.take(&task);) {
      const int64_t head0 = task * together % heads;
      selection.choose(task * together / heads, head0, head0 + together, sorted.get());
    }
  });
  each_row([&](int64_t row) { selection.pack(row); });
}

}  // namespace SA_NAMESPACE
