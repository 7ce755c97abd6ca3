// Tensors -> structs -> kernel, and the table of op names. The only file that includes torch.
// It uses torch's stable ABI: it compiles in seconds, and one build serves every torch from 2.11 on.
// Python has checked shapes and dtypes (sparse_attn/ops/<op>.py) and allocated the outputs before anything arrives here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "../checks.h"
#include "../ops.h"
#include "features.h"

namespace SA_NAMESPACE {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// torch drops arguments whose name it does not know; the schemas below spell the reference's signature after the outputs
const Parallel kParallel{[](void (*worker)(void*), void* state) {
  // one range per thread; a nested call runs inline, and its one worker then takes every task
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1,
                              [&](int64_t, int64_t) { worker(state); });
}};

// its last dimensions, the first ones of a tensor of fewer are 1
View view(const Tensor& t, int dims = 4) {
  View v{t.data_ptr(), {}, {1, 1, 1, 1}, {}};
  SA_CHECK(t.dim() == dims, "needs a ", dims, "-D tensor, got ", t.dim(), " dimensions");
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: v.dtype = DType::bf16; break;
    case ScalarType::Half: v.dtype = DType::fp16; break;
    case ScalarType::Float: v.dtype = DType::fp32; break;
    default: fail("needs bfloat16, float16 or float32, got another dtype");
  }
  for (int i = 0; i < dims; ++i) v.size[4 - dims + i] = t.size(i), v.stride[4 - dims + i] = t.stride(i);
  return v;
}

Rows rows_of(const Tensor& t, const char* name) {
  SA_CHECK(t.size(1) == 1 || t.stride(1) == 1, name, " must be contiguous in its last dimension, got stride ", t.stride(1),
           "; call contiguous()");
  return {t.data_ptr(), t.size(0), t.size(1), t.stride(0)};
}

// a contiguous tensor of the dtype; the copy, where one was needed, lives as long as this object
class Flat {
 public:
  Flat(const OptionalTensor& t, ScalarType dtype) {
    if (t) held_ = torch::stable::contiguous(t->scalar_type() == dtype ? *t : torch::stable::to(*t, dtype));
  }
  template <class T>
  const T* data() const {
    return held_ ? static_cast<const T*>(held_->data_ptr()) : nullptr;
  }

 private:
  OptionalTensor held_;
};

// an output: contiguous and of the dtype, or refused before anything is written
template <class T>
T* output(const Tensor& t, ScalarType dtype, const char* name) {
  SA_CHECK(t.scalar_type() == dtype, "out: ", name, " has the wrong dtype; allocate it like the op does");
  SA_CHECK(t.is_contiguous(), "out: ", name, " must be contiguous");
  return static_cast<T*>(t.data_ptr());
}

// element (b, h, i, j) of a tensor of up to four dimensions that was expanded to them
template <class T>
Strided<T> strided(const Tensor& t) {
  Strided<T> s{static_cast<const T*>(t.data_ptr()), {}};
  for (int i = 0; i < t.dim(); ++i) s.stride[i] = t.size(i) == 1 ? 0 : t.stride(i);
  return s;
}

void expect_size(const Tensor& t, std::initializer_list<int64_t> size, const char* name) {
  SA_CHECK(t.dim() == static_cast<int64_t>(size.size()), "out: ", name, " needs ", size.size(), " dimensions, got ", t.dim());
  int64_t i = 0;
  for (int64_t want : size) {
    SA_CHECK(t.size(i) == want, "out: ", name, " has size ", t.size(i), " at dimension ", i, ", needs ", want);
    ++i;
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

[[maybe_unused]] void run_antidiagonal_score(Tensor out, Tensor q, Tensor k, int64_t block_q, int64_t block_k, int64_t stride,
                                             double scale, int64_t q_start, bool causal, int64_t window, bool alternate,
                                             OptionalTensor first, OptionalTensor last) {
  const Flat firsts(first, ScalarType::Int), lasts(last, ScalarType::Int);
  expect_size(out, {q.size(0), q.size(1), ceil_div(q.size(2), block_q), ceil_div(k.size(2), block_k)}, "score");
  antidiagonal_score({view(q), view(k), block_q, block_k, stride, scale, q_start, causal, window, alternate,
                      {firsts.data<int32_t>(), lasts.data<int32_t>()}, output<float>(out, ScalarType::Float, "score")},
                     kParallel);
}

[[maybe_unused]] void run_window_score(Tensor columns, Tensor diagonals, Tensor q, Tensor k, Tensor rows, double scale,
                                       int64_t q_start, bool causal, int64_t window, double softcap, OptionalTensor first,
                                       OptionalTensor last) {
  const Flat firsts(first, ScalarType::Int), lasts(last, ScalarType::Int), probes(rows, ScalarType::Int);
  expect_size(columns, {q.size(0), q.size(1), k.size(2)}, "columns");
  expect_size(diagonals, {q.size(0), q.size(1), k.size(2)}, "diagonals");
  window_score({view(q), view(k), probes.data<int32_t>(), rows.size(1), scale, q_start, causal, window, softcap,
                {firsts.data<int32_t>(), lasts.data<int32_t>()}, output<float>(columns, ScalarType::Float, "columns"),
                output<float>(diagonals, ScalarType::Float, "diagonals")},
               kParallel);
}

Reduce reduce_of(const std::string& name) {
  return name == "max" ? Reduce::max : name == "sum" ? Reduce::sum : Reduce::mean;
}

[[maybe_unused]] void run_key_mass(Tensor out, Tensor q, Tensor k, Tensor lse, Tensor starts, Tensor lengths, double scale,
                                   double softcap, int64_t rows, std::string reduce, OptionalTensor q_first,
                                   OptionalTensor q_last) {
  const Flat start(starts, ScalarType::Long), length(lengths, ScalarType::Long);
  const Flat first(q_first, ScalarType::Int), last(q_last, ScalarType::Int);
  expect_size(out, {k.size(0)}, "mass");
  key_mass({view(q), view(k, 2), strided<float>(lse),
            {start.data<int64_t>(), length.data<int64_t>(), starts.size(1), {first.data<int32_t>(), last.data<int32_t>()}}, scale,
            softcap, rows, reduce_of(reduce), output<float>(out, ScalarType::Float, "mass")},
           kParallel);
}

[[maybe_unused]] void run_window_mass(Tensor out, Tensor q, Tensor k, Tensor starts, Tensor lengths, double scale, int64_t window,
                                      double softcap, OptionalTensor sinks, int64_t kernel, std::string pool, std::string reduce,
                                      OptionalTensor q_first, OptionalTensor q_last) {
  const Flat start(starts, ScalarType::Long), length(lengths, ScalarType::Long), sink_logits(sinks, ScalarType::Float);
  const Flat first(q_first, ScalarType::Int), last(q_last, ScalarType::Int);
  expect_size(out, {k.size(0)}, "mass");
  window_mass({view(q), view(k, 2),
               {start.data<int64_t>(), length.data<int64_t>(), starts.size(1), {first.data<int32_t>(), last.data<int32_t>()}},
               scale, window, softcap, sink_logits.data<float>(), kernel, pool == "max" ? Pool::max : Pool::mean,
               reduce_of(reduce), output<float>(out, ScalarType::Float, "mass")},
              kParallel);
}

[[maybe_unused]] void run_strided_score(Tensor out, Tensor q, Tensor k, int64_t block_q, int64_t block_k, int64_t stride,
                                        double scale, int64_t q_start, bool causal, int64_t window, bool rotate,
                                        OptionalTensor first, OptionalTensor last) {
  const Flat firsts(first, ScalarType::Int), lasts(last, ScalarType::Int);
  expect_size(out, {q.size(0), q.size(1), ceil_div(q.size(2), block_q), ceil_div(k.size(2), block_k)}, "score");
  strided_score({view(q), view(k), block_q, block_k, stride, scale, q_start, causal, window, rotate,
                 {firsts.data<int32_t>(), lasts.data<int32_t>()}, output<float>(out, ScalarType::Float, "score")},
                kParallel);
}

[[maybe_unused]] void run_select_blocks(Tensor counts, Tensor indices, Tensor score, OptionalTensor threshold,
                                        OptionalTensor top_k, int64_t block_q, int64_t block_k, int64_t n_q, int64_t n_k,
                                        int64_t q_start, bool causal, int64_t window, int64_t sink, int64_t recent,
                                        OptionalTensor first, OptionalTensor last, OptionalTensor always, bool inclusive) {
  const Flat firsts(first, ScalarType::Int), lasts(last, ScalarType::Int), thresholds(threshold, ScalarType::Double);
  expect_size(counts, {score.size(0), score.size(1), score.size(2)}, "counts");
  expect_size(indices, {score.size(0), score.size(1), score.size(2), score.size(3)}, "indices");
  Strided<int32_t> most{};
  Strided<uint8_t> besides{};
  if (top_k) most = strided<int32_t>(*top_k);
  if (always) besides = strided<uint8_t>(*always);
  select_blocks({view(score), thresholds.data<double>(), most, besides, inclusive, block_q, block_k, n_q, n_k, q_start, causal,
                 window, sink, recent, {firsts.data<int32_t>(), lasts.data<int32_t>()},
                 output<int32_t>(counts, ScalarType::Int, "counts"), output<int32_t>(indices, ScalarType::Int, "indices")},
                kParallel);
}

[[maybe_unused]] void run_pool_blocks(Tensor out, Tensor x, int64_t block, std::string kind, OptionalTensor first,
                                      OptionalTensor last) {
  const Flat firsts(first, ScalarType::Int), lasts(last, ScalarType::Int);
  const Pool pool = kind == "max" ? Pool::max : kind == "min" ? Pool::min : kind == "unit_mean" ? Pool::unit_mean : Pool::mean;
  expect_size(out, {x.size(0), x.size(1), ceil_div(x.size(2), block), x.size(3)}, "pooled");
  pool_blocks({view(x), block, pool, {firsts.data<int32_t>(), lasts.data<int32_t>()},
               output<float>(out, ScalarType::Float, "pooled")},
              kParallel);
}

[[maybe_unused]] void run_pooled_score(Tensor out, Tensor q_pooled, Tensor k_pooled, Tensor scale, int64_t block_q,
                                       int64_t block_k, int64_t n_q, int64_t n_k, int64_t q_start, bool causal, int64_t window,
                                       OptionalTensor first, OptionalTensor last) {
  const Flat firsts(first, ScalarType::Int), lasts(last, ScalarType::Int);
  expect_size(out, {q_pooled.size(0), q_pooled.size(1), q_pooled.size(2), k_pooled.size(2)}, "shares");
  pooled_score({view(q_pooled), view(k_pooled), strided<float>(scale), block_q, block_k, n_q, n_k, q_start, causal, window,
                {firsts.data<int32_t>(), lasts.data<int32_t>()}, output<float>(out, ScalarType::Float, "shares")},
               kParallel);
}

[[maybe_unused]] void run_select_global(Tensor counts, Tensor indices, Tensor score, Tensor threshold, std::string scope,
                                        int64_t block_q, int64_t block_k, int64_t n_q, int64_t n_k, int64_t q_start, bool causal,
                                        int64_t window, OptionalTensor first, OptionalTensor last, OptionalTensor always,
                                        bool inclusive) {
  const Flat firsts(first, ScalarType::Int), lasts(last, ScalarType::Int), thresholds(threshold, ScalarType::Double);
  expect_size(counts, {score.size(0), score.size(1), score.size(2)}, "counts");
  expect_size(indices, {score.size(0), score.size(1), score.size(2), score.size(3)}, "indices");
  Strided<uint8_t> besides{};
  if (always) besides = strided<uint8_t>(*always);
  select_global({view(score), thresholds.data<double>(), scope == "all", block_q, block_k, n_q, n_k, q_start, causal, window,
                 {firsts.data<int32_t>(), lasts.data<int32_t>()}, besides, inclusive,
                 output<int32_t>(counts, ScalarType::Int, "counts"), output<int32_t>(indices, ScalarType::Int, "indices")},
                kParallel);
}

[[maybe_unused]] void run_js_distance(Tensor out, Tensor p, Tensor q) {
  expect_size(out, {p.size(0), p.size(1)}, "distance");
  js_distance({strided<float>(p), strided<float>(q), p.size(0), p.size(1), p.size(2),
               output<float>(out, ScalarType::Float, "distance")},
              kParallel);
}

[[maybe_unused]] void run_keep_top(Tensor out, Tensor score, Tensor starts, Tensor lengths, Tensor counts, int64_t slots) {
  const Flat scores(score, ScalarType::Float), begin(starts, ScalarType::Long), size(lengths, ScalarType::Long);
  const Flat wanted(counts, ScalarType::Int);
  expect_size(out, {starts.size(0), starts.size(1), slots}, "offsets");
  keep_top({scores.data<float>(), score.size(0), begin.data<int64_t>(), size.data<int64_t>(), wanted.data<int32_t>(),
            starts.size(0), starts.size(1), slots, output<int32_t>(out, ScalarType::Int, "offsets")},
           kParallel);
}

[[maybe_unused]] void run_move_rows(Tensor rows, Tensor sources, Tensor targets) {
  const Flat from(sources, ScalarType::Long), to(targets, ScalarType::Long);
  SA_CHECK(rows.is_contiguous(), "rows must be contiguous, they are moved whole; pass the tensor that owns the memory");
  const int64_t n_rows = rows.size(0), bytes = rows.numel() * int64_t(rows.element_size());
  move_rows({static_cast<char*>(rows.data_ptr()), n_rows, n_rows ? bytes / n_rows : 0, from.data<int64_t>(), to.data<int64_t>(),
             sources.size(0)},
            kParallel);
}

[[maybe_unused]] void run_block_sparse_attention(Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor counts,
                                                 Tensor indices, int64_t block_q, int64_t block_k, double scale, int64_t q_start,
                                                 bool causal, int64_t window, double softcap, OptionalTensor first,
                                                 OptionalTensor last, OptionalTensor sinks, OptionalTensor columns,
                                                 OptionalTensor near, int64_t dense_rows, OptionalTensor order,
                                                 double pv_threshold) {
  const Flat firsts(first, ScalarType::Int), lasts(last, ScalarType::Int), sink_logits(sinks, ScalarType::Float);
  const Flat count(counts, ScalarType::Int), index(indices, ScalarType::Int), column(columns, ScalarType::Int);
  const Flat nears(near, ScalarType::Int), orders(order, ScalarType::Int);
  expect_size(out, {q.size(0), q.size(1), q.size(2), v.size(3)}, "out");
  expect_size(lse, {q.size(0), q.size(1), q.size(2)}, "lse");
  SA_CHECK(out.scalar_type() == q.scalar_type(), "out: must have q's dtype");
  block_sparse_attention({view(q), view(k), view(v), count.data<int32_t>(), index.data<int32_t>(), counts.size(1), counts.size(2),
                          indices.size(3), block_q, block_k, scale, q_start, causal, window, softcap,
                          {firsts.data<int32_t>(), lasts.data<int32_t>()}, sink_logits.data<float>(), column.data<int32_t>(),
                          columns ? columns->size(1) : 0, columns ? columns->size(2) : 0, nears.data<int32_t>(), dense_rows,
                          orders.data<int32_t>(), pv_threshold, view(out), output<float>(lse, ScalarType::Float, "lse")},
                         kParallel);
}

[[maybe_unused]] void run_paged_attention(Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor starts, Tensor counts,
                                          double scale, bool causal, double softcap, OptionalTensor sinks,
                                          OptionalTensor q_first, OptionalTensor q_last, OptionalTensor bias) {
  const Flat firsts(q_first, ScalarType::Int), lasts(q_last, ScalarType::Int), sink_logits(sinks, ScalarType::Float);
  const Flat start(starts, ScalarType::Long), count(counts, ScalarType::Int), biases(bias, ScalarType::Float);
  expect_size(out, {q.size(0), q.size(1), q.size(2), v.size(1)}, "out");
  expect_size(lse, {q.size(0), q.size(1), q.size(2)}, "lse");
  SA_CHECK(out.scalar_type() == q.scalar_type(), "out: must have q's dtype");
  paged_attention({view(q), rows_of(k, "k"), rows_of(v, "v"), start.data<int64_t>(), count.data<int32_t>(), starts.size(1),
                   starts.size(2), scale, causal, softcap, sink_logits.data<float>(),
                   {firsts.data<int32_t>(), lasts.data<int32_t>()}, biases.data<float>(), view(out),
                   output<float>(lse, ScalarType::Float, "lse")},
                  kParallel);
}

[[maybe_unused]] void run_page_score(Tensor out, Tensor q, Tensor low, Tensor high, Tensor starts, Tensor pages,
                                     std::string reduce, OptionalTensor q_first, OptionalTensor q_last) {
  const Flat start(starts, ScalarType::Long), count(pages, ScalarType::Long);
  const Flat first(q_first, ScalarType::Int), last(q_last, ScalarType::Int);
  expect_size(out, {low.size(0)}, "score");
  page_score({view(q), rows_of(low, "low"), rows_of(high, "high"),
              {start.data<int64_t>(), count.data<int64_t>(), starts.size(1), {first.data<int32_t>(), last.data<int32_t>()}},
              reduce_of(reduce), output<float>(out, ScalarType::Float, "score")},
             kParallel);
}

[[maybe_unused]] void run_row_score(Tensor out, Tensor q, Tensor rows, Tensor starts, Tensor lengths, double scale, bool soft,
                                    std::string reduce, OptionalTensor q_first, OptionalTensor q_last) {
  const Flat start(starts, ScalarType::Long), length(lengths, ScalarType::Long);
  const Flat first(q_first, ScalarType::Int), last(q_last, ScalarType::Int);
  expect_size(out, {rows.size(0)}, "score");
  row_score({view(q), rows_of(rows, "rows"),
             {start.data<int64_t>(), length.data<int64_t>(), starts.size(1), {first.data<int32_t>(), last.data<int32_t>()}}, scale,
             soft, reduce_of(reduce), output<float>(out, ScalarType::Float, "score")},
            kParallel);
}

[[maybe_unused]] void run_lowrank_keys(Tensor rows, Tensor factors, Tensor basis, Tensor starts, Tensor counts, Tensor targets,
                                       Tensor positions, Tensor far, Tensor near, bool interleaved) {
  const Flat start(starts, ScalarType::Long), count(counts, ScalarType::Int), target(targets, ScalarType::Long);
  const Flat position(positions, ScalarType::Int), fars(far, ScalarType::Float), nears(near, ScalarType::Float);
  lowrank_keys({rows.data_ptr(), rows.size(0), rows_of(factors, "factors"), view(basis), start.data<int64_t>(),
                target.data<int64_t>(), count.data<int32_t>(), starts.size(2), position.data<int32_t>(), fars.data<float>(),
                nears.data<float>(), far.size(0), near.size(0), near.size(2), interleaved},
               kParallel);
}

}  // namespace

STABLE_TORCH_LIBRARY(SA_NAMESPACE, m) {
  m.def("missing(str isa) -> str");
  m.impl("missing", TORCH_BOX(&missing_feature));
  m.def("antidiagonal_score(Tensor(a!) out, Tensor q, Tensor k, int block_q, int block_k, int stride, float scale, int q_start, "
        "bool causal, int window, bool alternate, Tensor? first, Tensor? last) -> ()");
  m.impl("antidiagonal_score", TORCH_BOX(&run_antidiagonal_score));
  m.def("window_score(Tensor(a!) columns, Tensor(b!) diagonals, Tensor q, Tensor k, Tensor rows, float scale, int q_start, "
        "bool causal, int window, float softcap, Tensor? first, Tensor? last) -> ()");
  m.impl("window_score", TORCH_BOX(&run_window_score));
  m.def("key_mass(Tensor(a!) out, Tensor q, Tensor k, Tensor lse, Tensor starts, Tensor lengths, float scale, float softcap, "
        "int rows, str reduce, Tensor? q_first, Tensor? q_last) -> ()");
  m.impl("key_mass", TORCH_BOX(&run_key_mass));
  m.def("window_mass(Tensor(a!) out, Tensor q, Tensor k, Tensor starts, Tensor lengths, float scale, int window, float softcap, "
        "Tensor? sinks, int kernel, str pool, str reduce, Tensor? q_first, Tensor? q_last) -> ()");
  m.impl("window_mass", TORCH_BOX(&run_window_mass));
  m.def("strided_score(Tensor(a!) out, Tensor q, Tensor k, int block_q, int block_k, int stride, float scale, int q_start, "
        "bool causal, int window, bool rotate, Tensor? first, Tensor? last) -> ()");
  m.impl("strided_score", TORCH_BOX(&run_strided_score));
  m.def("select_blocks(Tensor(a!) counts, Tensor(b!) indices, Tensor score, Tensor? threshold, Tensor? top_k, int block_q, "
        "int block_k, int n_q, int n_k, int q_start, bool causal, int window, int sink, int recent, Tensor? first, "
        "Tensor? last, Tensor? always, bool inclusive) -> ()");
  m.impl("select_blocks", TORCH_BOX(&run_select_blocks));
  m.def("pool_blocks(Tensor(a!) out, Tensor x, int block, str kind, Tensor? first, Tensor? last) -> ()");
  m.impl("pool_blocks", TORCH_BOX(&run_pool_blocks));
  m.def("pooled_score(Tensor(a!) out, Tensor q_pooled, Tensor k_pooled, Tensor scale, int block_q, int block_k, int n_q, "
        "int n_k, int q_start, bool causal, int window, Tensor? first, Tensor? last) -> ()");
  m.impl("pooled_score", TORCH_BOX(&run_pooled_score));
  m.def("select_global(Tensor(a!) counts, Tensor(b!) indices, Tensor score, Tensor threshold, str scope, int block_q, "
        "int block_k, int n_q, int n_k, int q_start, bool causal, int window, Tensor? first, Tensor? last, Tensor? always, "
        "bool inclusive) -> ()");
  m.impl("select_global", TORCH_BOX(&run_select_global));
  m.def("js_distance(Tensor(a!) out, Tensor p, Tensor q) -> ()");
  m.impl("js_distance", TORCH_BOX(&run_js_distance));
  m.def("keep_top(Tensor(a!) out, Tensor score, Tensor starts, Tensor lengths, Tensor counts, int slots) -> ()");
  m.impl("keep_top", TORCH_BOX(&run_keep_top));
  m.def("lowrank_keys(Tensor(a!) rows, Tensor factors, Tensor basis, Tensor starts, Tensor counts, Tensor targets, "
        "Tensor positions, Tensor far, Tensor near, bool interleaved) -> ()");
  m.impl("lowrank_keys", TORCH_BOX(&run_lowrank_keys));
  m.def("move_rows(Tensor(a!) rows, Tensor sources, Tensor targets) -> ()");
  m.impl("move_rows", TORCH_BOX(&run_move_rows));
  m.def("block_sparse_attention(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices, "
        "int block_q, int block_k, float scale, int q_start, bool causal, int window, float softcap, Tensor? first, Tensor? last, "
        "Tensor? sinks, Tensor? columns, Tensor? near, int dense_rows, Tensor? order, float pv_threshold) -> ()");
  m.impl("block_sparse_attention", TORCH_BOX(&run_block_sparse_attention));
  m.def("paged_attention(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor starts, Tensor counts, float scale, "
        "bool causal, float softcap, Tensor? sinks, Tensor? q_first, Tensor? q_last, Tensor? bias) -> ()");
  m.impl("paged_attention", TORCH_BOX(&run_paged_attention));
  m.def("page_score(Tensor(a!) out, Tensor q, Tensor low, Tensor high, Tensor starts, Tensor pages, str reduce, Tensor? q_first, "
        "Tensor? q_last) -> ()");
  m.impl("page_score", TORCH_BOX(&run_page_score));
  m.def("row_score(Tensor(a!) out, Tensor q, Tensor rows, Tensor starts, Tensor lengths, float scale, bool soft, str reduce, "
        "Tensor? q_first, Tensor? q_last) -> ()");
  m.impl("row_score", TORCH_BOX(&run_row_score));
}

}  // namespace SA_NAMESPACE
