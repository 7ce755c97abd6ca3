// A product of gathered rows with the basis of their head, and the rotation of what comes out while it lies in L1.
//
// A task is up to kTaskRows tokens of one sequence and head. The basis is widened once per head that a thread meets, panel by panel
// of kPanel channels, so that a panel and a few rows of factors are what the inner loop reads.
#include <algorithm>
#include <vector>

#include "../checks.h"
#include "logits.h"

namespace SA_NAMESPACE {
namespace {

constexpr int64_t kTaskRows = 128;  // widening the basis of 128 channels costs as much as 4 of them

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
    const int64_t n_turns = 2 * args.pairs;
    Scratch& scratch = Scratch::mine();
    scratch.reset(floats(panels_ * rank_ * kPanel) + floats(kTaskRows * rank_) + floats(kTaskRows * panels_ * kPanel) +
                  floats(kStep * kPanel) + floats(n_turns));
    basis_ = scratch.take<float>(panels_ * rank_ * kPanel);
    factors_ = scratch.take<float>(kTaskRows * rank_);
    keys_ = scratch.take<float>(kTaskRows * panels_ * kPanel);
    product_of_step_ = scratch.take<float>(kStep * kPanel);
    turns_ = scratch.take<float>(n_turns);
  }

  void run(const Task& task) {
    if (widened_ != task.head) widen(task.head);
    widened_ = task.head;
    const int64_t n = task.last - task.first, width = panels_ * kPanel;
    for (int64_t i = 0; i < n; ++i)
      read_row<Element>(static_cast<const Storage*>(a_.factors.data) + task.first[i].source * a_.factors.stride, 1, rank_,
                        factors_ + i * rank_);
    for (int64_t panel = 0; panel < panels_; ++panel)
      for (int64_t i = 0; i < n; i += kStep) {
        const int rows = int(std::min<int64_t>(kStep, n - i));
        product_.multiply(factors_ + i * rank_, rows, basis_ + panel * rank_ * kPanel, product_of_step_);
        for (int r = 0; r < rows; ++r)
          std::copy_n(product_of_step_ + r * kPanel, kPanel, keys_ + (i + r) * width + panel * kPanel);
      }
    for (int64_t i = 0; i < n; ++i) {
      float* const key = keys_ + i * width;
      if (a_.pairs) turn(a_.positions[task.first[i].source], key);
      write_row<Element>(static_cast<Storage*>(a_.rows) + task.first[i].target * d_, 1, d_, key);
    }
  }

 private:
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

  // the angle of a position is the sum of two; so are these loops simple ones that the compiler makes vectors of
  void turn(int64_t position, float* __restrict key) {
    const int64_t pairs = a_.pairs;
    const float* __restrict far = a_.far + position / a_.n_near * 2 * pairs;
    const float* __restrict near = a_.near + position % a_.n_near * 2 * pairs;
    float* __restrict cosines = turns_;
    float* __restrict sines = turns_ + pairs;
    for (int64_t i = 0; i < pairs; ++i) {
      cosines[i] = far[i] * near[i] - far[pairs + i] * near[pairs + i];
      sines[i] = far[pairs + i] * near[i] + far[i] * near[pairs + i];
    }
    if (a_.interleaved)
      for (int64_t i = 0; i < pairs; ++i) {
        const float one = key[2 * i], other = key[2 * i + 1];
        key[2 * i] = one * cosines[i] - other * sines[i];
        key[2 * i + 1] = other * cosines[i] + one * sines[i];
      }
    else
      for (int64_t i = 0; i < pairs; ++i) {
        const float one = key[i], other = key[pairs + i];
        key[i] = one * cosines[i] - other * sines[i];
        key[pairs + i] = other * cosines[i] + one * sines[i];
      }
  }

  const LowrankKeys& a_;
  const int64_t d_, rank_, panels_;
  const Product product_;
  int64_t widened_ = -1;    // the head whose basis lies in basis_
  float* basis_;            // [panel][r][kPanel]
  float* factors_;          // [kTaskRows][r]
  float* keys_;             // [kTaskRows][panels * kPanel]
  float* product_of_step_;  // [kStep][kPanel]
  float* turns_;            // [2][pairs]
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
