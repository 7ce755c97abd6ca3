// The flat store seen run by run: one sequence and key head, exactly as sparse_attn/ops/runs.py defines them.
#pragma once
#include <algorithm>
#include <vector>

#include "checks.h"
#include "ops.h"

namespace SA_NAMESPACE {

struct TokenRun {
  int64_t b, head0;       // the first of the `group` query heads that read it
  int64_t start, length;  // rows of the store
  int64_t query0, n_q;    // first real row of q, and how many

  // real query r, counted from 0, sees so many rows of the run
  int64_t seen(int64_t r) const { return std::clamp<int64_t>(length - n_q + 1 + r, 0, length); }
};

// every run of a store of `rows` rows, checked
inline std::vector<TokenRun> token_runs(const Runs& runs, const View& q, int64_t rows) {
  std::vector<TokenRun> found;
  const int64_t group = q.size[1] / runs.kv_heads, n_q = q.size[2];
  for (int64_t b = 0; b < q.size[0]; ++b) {
    const int64_t first = runs.queries.first ? std::clamp<int64_t>(runs.queries.first[b], 0, n_q) : 0;
    const int64_t last = runs.queries.last ? std::clamp<int64_t>(runs.queries.last[b], 0, n_q) : n_q;
    for (int64_t h = 0; h < runs.kv_heads; ++h) {
      const int64_t start = runs.starts[b * runs.kv_heads + h], length = runs.lengths[b * runs.kv_heads + h];
      SA_CHECK(start >= 0 && length >= 0 && start <= rows && length <= rows - start, "run [", b, ", ", h, "] has ", length,
               " rows from ", start, " but the store has ", rows, "; it must lie inside");
      found.push_back({b, h * group, start, length, first, std::max<int64_t>(last - first, 0)});
    }
  }
  return found;
}

}  // namespace SA_NAMESPACE
