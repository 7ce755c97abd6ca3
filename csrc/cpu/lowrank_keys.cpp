// A product of gathered rows with the basis of their head, and the rotation of what comes out while it lies in L1.
//
// A task is up to kTaskRows tokens of one sequence and head. The basis is widened once per head that a thread meets, and stays in
// L2; a few tokens at a time pass from factors to finished keys, so that everything else stays in L1. 2048 tokens of 8 heads, rank
// 160, 128 channels, bfloat16: 94 GFLOP/s on a core where the inner loop alone reaches 146; asking for rows ahead gained nothing.
#include <algorithm>
#include <vector>

#include "../checks.h"
#include "logits.h"

namespace SA_NAMESPACE {
namespace {

constexpr int64_t kTaskRows = 120;  // whole steps of every instruction set

// row `source` of the factors becomes row `target` of the keys
struct Token {
  int64_t source, target;
};
struct Task {
  int64_t head;  // b * Hkv + h
  const Token *first, *last;
};

template <class Element>
class Worker {
  using Storage = typename Element::Storage;
  using Product = SimdLogits<Element>;
  static constexpr int kPanel = Product::kPanel, kStep = Product::kRowStep;

 public:
  explicit Worker(const LowrankKeys& args)
      : a_(args), d_(args.basis.size[3]), rank_(args.factors.width), panels_((d_ + kPanel - 1) / kPanel), product_(rank_) {
    const auto floats = Scratch::bytes_for<float>;
    Scratch& scratch = Scratch::mine();
    scratch.reset(floats(panels_ * rank_ * kPanel) + floats(kStep * rank_) + floats(kStep * kPanel) +
                  floats(kStep * panels_ * kPanel));
    basis_ = scratch.take<float>(panels_ * rank_ * kPanel);
    factors_ = scratch.take<float>(kStep * rank_);
    part_ = scratch.take<float>(kStep * kPanel);
    keys_ = scratch.take<float>(kStep * panels_ * kPanel);
  }

  void run(const Task& task) {
    if (widened_ != task.head) widen(task.head);
    widened_ = task.head;
    const int64_t width = panels_ * kPanel;
    for (const Token* token = task.first; token < task.last; token += kStep) {
      const int n = int(std::min<int64_t>(kStep, task.last - token));
      for (int i = 0; i < n; ++i)
        read_row<Element>(factor(token[i]), 1, rank_, factors_ + i * rank_);
      for (int64_t panel = 0; panel < panels_; ++panel) {
        product_.multiply(factors_, n, basis_ + panel * rank_ * kPanel, part_);
        for (int i = 0; i < n; ++i) std::copy_n(part_ + i * kPanel, kPanel, keys_ + i * width + panel * kPanel);
      }
      for (int i = 0; i < n; ++i) {
        if (a_.pairs) turn(a_.positions[token[i].source], keys_ + i * width);
        write_row<Element>(target(token[i]), 1, d_, keys_ + i * width);
      }
    }
  }

 private:
  const Storage* factor(const Token& token) const {
    return static_cast<const Storage*>(a_.factors.data) + token.source * a_.factors.stride;
  }
  Storage* target(const Token& token) const { return static_cast<Storage*>(a_.rows) + token.target * d_; }

  // basis_[panel][r][channel], zeros behind the last channel
  void widen(int64_t head) {
    const View& basis = a_.basis;
    const Storage* from = static_cast<const Storage*>(basis.data) + head / basis.size[1] * basis.stride[0] +
                          head % basis.size[1] * basis.stride[1];
    for (int64_t panel = 0; panel < panels_; ++panel)
      for (int64_t r = 0; r < rank_; ++r) {
        const int64_t channel = panel * kPanel, have = std::min<int64_t>(kPanel, d_ - channel);
        float* to = basis_ + (panel * rank_ + r) * kPanel;
        read_row<Element>(from + r * basis.stride[2] + channel * basis.stride[3], basis.stride[3], have, to);
        std::fill(to + have, to + kPanel, 0.0f);
      }
  }

  // the angle of a position is the sum of two
  void turn(uint32_t position, float* key) const {
    const uint32_t n_near = uint32_t(a_.n_near);  // dividing 64 bits took a tenth of the time
    const float* far = a_.far + int64_t(position / n_near) * 2 * a_.pairs;
    const float* near = a_.near + int64_t(position % n_near) * 2 * a_.pairs;
    if (a_.interleaved) turn_pairs<2>(far, near, key, key + 1);
    else turn_pairs<1>(far, near, key, key + a_.pairs);
  }

  // simple enough that the compiler makes vectors of it
  template <int kStride>
  SA_INLINE void turn_pairs(const float* __restrict far, const float* __restrict near, float* __restrict one,
                            float* __restrict other) const {
    for (int64_t i = 0; i < a_.pairs; ++i) {
      const float cosine = far[i] * near[i] - far[a_.pairs + i] * near[a_.pairs + i];
      const float sine = far[a_.pairs + i] * near[i] + far[i] * near[a_.pairs + i];
      const float x = one[i * kStride], y = other[i * kStride];
      one[i * kStride] = x * cosine - y * sine;
      other[i * kStride] = y * cosine + x * sine;
    }
  }

  const LowrankKeys& a_;
  const int64_t d_, rank_, panels_;
  const Product product_;
  int64_t widened_ = -1;  // the head whose basis lies in basis_
  float* basis_;          // [panel][r][kPanel]
  float* factors_;        // [kStep][r]
  float* part_;           // [kStep][kPanel]
  float* keys_;           // [kStep][panels * kPanel]
};

// the tokens of each head, page by page, checked
std::vector<Token> tokens_of(const LowrankKeys& a, std::vector<int64_t>& ends) {
  std::vector<Token> tokens;
  for (int64_t head = 0; head < a.basis.size[0] * a.basis.size[1]; ++head) {
    for (int64_t p = head * a.pages; p < (head + 1) * a.pages; ++p) {
      const int64_t source = a.starts[p], target = a.targets[p], n = a.counts[p];
      if (n == 0) continue;
      SA_CHECK(n > 0 && source >= 0 && source <= a.factors.count - n, "a page lies outside the ", a.factors.count, " factors");
      SA_CHECK(target >= 0 && target <= a.n_rows - n, "a page lies outside the ", a.n_rows, " rows");
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = a.positions[source + i];
        SA_CHECK(a.pairs == 0 || (at >= 0 && at < a.n_far * a.n_near), "a position lies outside the ", a.n_far * a.n_near,
                 " that far and near tell of");
        tokens.push_back({source + i, target + i});
      }
    }
    ends.push_back(int64_t(tokens.size()));
  }
  return tokens;
}

}  // namespace

void lowrank_keys(const LowrankKeys& args, const Parallel& parallel) {
  std::vector<int64_t> ends;
  const std::vector<Token> tokens = tokens_of(args, ends);
  std::vector<Task> tasks;
  for (int64_t head = 0, at = 0; head < int64_t(ends.size()); at = ends[head++])
    for (int64_t first = at; first < ends[head]; first += kTaskRows)
      tasks.push_back({head, tokens.data() + first, tokens.data() + std::min(first + kTaskRows, ends[head])});
  parallel_tasks(parallel, int64_t(tasks.size()), [&](TaskQueue& queue) {
    with_element(args.basis.dtype, [&](auto element) {
      Worker<decltype(element)> worker(args);
      for (int64_t t; queue.take(&t);) worker.run(tasks[t]);
    });
  });
}

}  // namespace SA_NAMESPACE
