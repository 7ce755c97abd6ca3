// Column sums of the attention matrix, rebuilt from q, k and the log-sum-exp of each query. A task is a tile of keys of one run:
// the keys are packed once, the queries that see them pass by, and sums per head stay in L1. No task writes what another does, and
// a tile starts at fixed keys and adds its queries in order: threads do not change a bit.
#include <cmath>

#include "run_probes.h"

namespace SA_NAMESPACE {

void key_mass(const KeyMass& args, const Parallel& parallel) {
  const std::vector<TokenRun> runs = token_runs(args.runs, args.q, args.k.size[2]);
  const int64_t group = args.q.size[1] / args.runs.kv_heads;
  std::fill(args.out, args.out + args.k.size[2], 0.0f);
  with_element(args.q.dtype, [&](auto element) {
    using Logits = typename LogitsOf<decltype(element)>::type;
    using Queries = RunProbes<Logits>;
    const std::vector<KeyTask> tasks = key_tasks(runs, Queries::kTileKeys);
    parallel_tasks(parallel, int64_t(tasks.size()), [&](TaskQueue& queue) {
      [[maybe_unused]] const typename Logits::Guard guard{};
      Queries queries(args.q, args.k, args.scale, args.softcap);
      std::vector<float> sums(group * Queries::kTileKeys);
      for (int64_t t; queue.take(&t);) {
        const auto& [at, key0, end] = tasks[t];
        const TokenRun& run = runs[at];
        const int64_t first = args.rows ? std::max<int64_t>(run.n_q - args.rows, 0) : 0;
        auto weight = [&](int head, int64_t query, float* top, float* inverse) {
          const float lse = args.lse.at(run.b, run.head0 + head, run.query0 + query);
          // what rounding takes from the exponent, the factor gives back
          const double exponent = double(lse) / kLn2;
          *top = float(exponent);
          *inverse = float(1 + kLn2 * (double(*top) - exponent));
          return std::isfinite(lse);
        };
        queries.sum_queries(run, key0, end, first, group, weight, sums.data());
        reduce_heads(sums.data(), group, Queries::kTileKeys, end - key0, args.reduce, args.out + run.start + key0);
      }
    });
  });
}

}  // namespace SA_NAMESPACE
