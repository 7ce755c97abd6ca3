// The ops that a CPU library serves.
#define SA_FIRST_ARGUMENTS ""
#include "../bindings.h"
#include "features.h"

namespace SA_NAMESPACE {
namespace {

const Parallel kParallel{[](void (*worker)(void*), void* state) {
  // one range per thread; a nested call runs inline, and its one worker then takes every task
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1,
                              [&](int64_t, int64_t) { worker(state); });
}};

template <auto run>
struct On;
template <class... Args, void (*run)(const Where&, Args...)>
struct On<run> {
  static void call(Args... args) { run(kParallel, args...); }
};

}  // namespace

#define SA_SERVE(op)    \
  m.def(kSchema_##op); \
  m.impl(#op, TORCH_BOX(&On<&run_##op>::call))

STABLE_TORCH_LIBRARY(SA_LIBRARY, m) {
  m.def("missing(str isa) -> str");
  m.impl("missing", TORCH_BOX(&missing_feature));
  SA_SERVE(antidiagonal_score);
  SA_SERVE(window_score);
  SA_SERVE(key_mass);
  SA_SERVE(window_mass);
  SA_SERVE(strided_score);
  SA_SERVE(select_blocks);
  SA_SERVE(pool_blocks);
  SA_SERVE(pooled_score);
  SA_SERVE(select_global);
  SA_SERVE(js_distance);
  SA_SERVE(keep_top);
  SA_SERVE(lowrank_keys);
  SA_SERVE(move_rows);
  SA_SERVE(block_sparse_attention);
  SA_SERVE(paged_attention);
  SA_SERVE(page_score);
  SA_SERVE(row_score);
}

}  // namespace SA_NAMESPACE
