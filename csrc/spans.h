// One batch row seen alone: its real queries and keys, exactly as sparse_attn/ops/spans.py defines them.
#pragma once
#include <algorithm>

#include "ops.h"

namespace SA_NAMESPACE {

struct Span {
  int64_t row0, n_q;  // first real query row of the tensor, and how many
  int64_t key0, n_k;  // first real key of the tensor, and how many
  int64_t q_start;    // position of the first real query, counted from the first real key; 0 without causality
};

SA_HOST_DEVICE inline Span span_of(int64_t b, int64_t n_q, int64_t n_k, int64_t q_start, bool causal, const Padding& padding) {
  const int64_t first = std::max<int64_t>(padding.first ? padding.first[b] : 0, 0);
  int64_t end = std::min<int64_t>(padding.last ? padding.last[b] : n_k, n_k);
  int64_t r0 = 0, r1 = n_q;
  if (causal) {
    r0 = std::clamp<int64_t>(first - q_start, 0, n_q);
    r1 = std::clamp<int64_t>(end - q_start, 0, n_q);
  }
  r1 = std::max(r0, r1);
  end = std::max(first, end);
  return {r0, r1 - r0, first, end - first, causal ? q_start + r0 - first : 0};
}

// Key blocks of a query block: [low, high] is reachable, [own, high] its own diagonal; as reach() in sparse_attn/ops/spans.py.
struct Reach {
  int64_t low, own, high;
};

// Args is an op's struct with block_q, block_k, causal and window
template <class Args>
SA_HOST_DEVICE Reach reach(const Args& a, const Span& span, int64_t block) {
  const int64_t start = block * a.block_q, end = std::min(start + a.block_q, span.n_q);
  if (!a.causal) {
    const int64_t blocks = (span.n_k + a.block_k - 1) / a.block_k;
    return {0, blocks, blocks - 1};
  }
  const int64_t oldest = a.window ? std::max<int64_t>(0, span.q_start + start - a.window + 1) : 0;
  return {oldest / a.block_k, (span.q_start + start) / a.block_k, (span.q_start + end - 1) / a.block_k};
}

}  // namespace SA_NAMESPACE
