// What torch calls for each op, in both libraries: tensors -> the op's struct -> the kernel of this library.
// torch drops arguments whose name it does not know; a schema spells the reference's signature behind the outputs.
#pragma once
#include <string>

#include "tensors.h"

// SA_SCHEMA(op, "arguments") becomes kSchema_<op>; SA_FIRST_ARGUMENTS is what a library takes before the outputs
#define SA_SCHEMA(op, arguments) \
  [[maybe_unused]] constexpr const char* kSchema_##op = #op "(" SA_FIRST_ARGUMENTS arguments ") -> ()";

namespace SA_NAMESPACE {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

SA_SCHEMA(antidiagonal_score,
          "Tensor(a!) out, Tensor q, Tensor k, int block_q, int block_k, int stride, float scale, int q_start, "
          "bool causal, int window, bool alternate, Tensor? first, Tensor? last")
[[maybe_unused]] void run_antidiagonal_score(const Where& where, Tensor out, Tensor q, Tensor k, int64_t block_q, int64_t block_k,
                                             int64_t stride, double scale, int64_t q_start, bool causal, int64_t window,
                                             bool alternate, OptionalTensor first, OptionalTensor last) {
  const Flat firsts(first, ScalarType::Int), lasts(last, ScalarType::Int);
  expect_size(out, {q.size(0), q.size(1), ceil_div(q.size(2), block_q), ceil_div(k.size(2), block_k)}, "score");
  antidiagonal_score({view(q), view(k), block_q, block_k, stride, scale, q_start, causal, window, alternate,
                      {firsts.data<int32_t>(), lasts.data<int32_t>()}, output<float>(out, ScalarType::Float, "score")},
                     where);
}

SA_SCHEMA(window_score,
          "Tensor(a!) columns, Tensor(b!) diagonals, Tensor q, Tensor k, Tensor rows, float scale, int q_start, "
          "bool causal, int window, float softcap, Tensor? first, Tensor? last, int block")
[[maybe_unused]] void run_window_score(const Where& where, Tensor columns, Tensor diagonals, Tensor q, Tensor k, Tensor rows,
                                       double scale, int64_t q_start, bool causal, int64_t window, double softcap,
                                       OptionalTensor first, OptionalTensor last, int64_t block) {
  const Flat firsts(first, ScalarType::Int), lasts(last, ScalarType::Int), probes(rows, ScalarType::Int);
  for (const Tensor& sums : {columns, diagonals}) expect_size(sums, {q.size(0), q.size(1), ceil_div(k.size(2), block)}, "sums");
  window_score({view(q), view(k), probes.data<int32_t>(), rows.size(1), scale, q_start, causal, window, softcap,
                {firsts.data<int32_t>(), lasts.data<int32_t>()}, block, output<float>(columns, ScalarType::Float, "columns"),
                output<float>(diagonals, ScalarType::Float, "diagonals")},
               where);
}

Reduce reduce_of(const std::string& name) {
  return name == "max" ? Reduce::max : name == "sum" ? Reduce::sum : Reduce::mean;
}

SA_SCHEMA(key_mass,
          "Tensor(a!) out, Tensor q, Tensor k, Tensor lse, Tensor starts, Tensor lengths, float scale, float softcap, "
          "int rows, str reduce, Tensor? q_first, Tensor? q_last")
[[maybe_unused]] void run_key_mass(const Where& where, Tensor out, Tensor q, Tensor k, Tensor lse, Tensor starts, Tensor lengths,
                                   double scale, double softcap, int64_t rows, std::string reduce, OptionalTensor q_first,
                                   OptionalTensor q_last) {
  const Flat start(starts, ScalarType::Long), length(lengths, ScalarType::Long);
  const Flat first(q_first, ScalarType::Int), last(q_last, ScalarType::Int);
  expect_size(out, {k.size(0)}, "mass");
  key_mass({view(q), view(k, 2), strided<float>(lse),
            {start.data<int64_t>(), length.data<int64_t>(), starts.size(1), {first.data<int32_t>(), last.data<int32_t>()}}, scale,
            softcap, rows, reduce_of(reduce), output<float>(out, ScalarType::Float, "mass")},
           where);
}

SA_SCHEMA(window_mass,
          "Tensor(a!) out, Tensor q, Tensor k, Tensor starts, Tensor lengths, float scale, int window, float softcap, "
          "Tensor? sinks, int kernel, str pool, str reduce, Tensor? q_first, Tensor? q_last")
[[maybe_unused]] void run_window_mass(const Where& where, Tensor out, Tensor q, Tensor k, Tensor starts, Tensor lengths,
                                      double scale, int64_t window, double softcap, OptionalTensor sinks, int64_t kernel,
                                      std::string pool, std::string reduce, OptionalTensor q_first, OptionalTensor q_last) {
  const Flat start(starts, ScalarType::Long), length(lengths, ScalarType::Long), sink_logits(sinks, ScalarType::Float);
  const Flat first(q_first, ScalarType::Int), last(q_last, ScalarType::Int);
  expect_size(out, {k.size(0)}, "mass");
  window_mass({view(q), view(k, 2),
               {start.data<int64_t>(), length.data<int64_t>(), starts.size(1), {first.data<int32_t>(), last.data<int32_t>()}},
               scale, window, softcap, sink_logits.data<float>(), kernel, pool == "max" ? Pool::max : Pool::mean,
               reduce_of(reduce), output<float>(out, ScalarType::Float, "mass")},
              where);
}

SA_SCHEMA(strided_score,
          "Tensor(a!) out, Tensor q, Tensor k, int block_q, int block_k, int stride, float scale, int q_start, "
          "bool causal, int window, bool rotate, Tensor? first, Tensor? last")
[[maybe_unused]] void run_strided_score(const Where& where, Tensor out, Tensor q, Tensor k, int64_t block_q, int64_t block_k,
                                        int64_t stride, double scale, int64_t q_start, bool causal, int64_t window, bool rotate,
                                        OptionalTensor first, OptionalTensor last) {
  const Flat firsts(first, ScalarType::Int), lasts(last, ScalarType::Int);
  expect_size(out, {q.size(0), q.size(1), ceil_div(q.size(2), block_q), ceil_div(k.size(2), block_k)}, "score");
  strided_score({view(q), view(k), block_q, block_k, stride, scale, q_start, causal, window, rotate,
                 {firsts.data<int32_t>(), lasts.data<int32_t>()}, output<float>(out, ScalarType::Float, "score")},
                where);
}

SA_SCHEMA(select_blocks,
          "Tensor(a!) counts, Tensor(b!) indices, Tensor score, Tensor? threshold, Tensor? top_k, int block_q, "
          "int block_k, int n_q, int n_k, int q_start, bool causal, int window, int sink, int recent, Tensor? first, "
          "Tensor? last, Tensor? always, bool inclusive")
[[maybe_unused]] void run_select_blocks(const Where& where, Tensor counts, Tensor indices, Tensor score, OptionalTensor threshold,
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
                where);
}

SA_SCHEMA(pool_blocks,
          "Tensor(a!) out, Tensor x, int block, str kind, Tensor? first, Tensor? last")
[[maybe_unused]] void run_pool_blocks(const Where& where, Tensor out, Tensor x, int64_t block, std::string kind,
                                      OptionalTensor first, OptionalTensor last) {
  const Flat firsts(first, ScalarType::Int), lasts(last, ScalarType::Int);
  const Pool pool = kind == "max" ? Pool::max : kind == "min" ? Pool::min : kind == "unit_mean" ? Pool::unit_mean : Pool::mean;
  expect_size(out, {x.size(0), x.size(1), ceil_div(x.size(2), block), x.size(3)}, "pooled");
  pool_blocks({view(x), block, pool, {firsts.data<int32_t>(), lasts.data<int32_t>()},
               output<float>(out, ScalarType::Float, "pooled")},
              where);
}

SA_SCHEMA(pooled_score,
          "Tensor(a!) out, Tensor q_pooled, Tensor k_pooled, Tensor scale, int block_q, int block_k, int n_q, int n_k, "
          "int q_start, bool causal, int window, Tensor? first, Tensor? last")
[[maybe_unused]] void run_pooled_score(const Where& where, Tensor out, Tensor q_pooled, Tensor k_pooled, Tensor scale,
                                       int64_t block_q, int64_t block_k, int64_t n_q, int64_t n_k, int64_t q_start, bool causal,
                                       int64_t window, OptionalTensor first, OptionalTensor last) {
  const Flat firsts(first, ScalarType::Int), lasts(last, ScalarType::Int);
  expect_size(out, {q_pooled.size(0), q_pooled.size(1), q_pooled.size(2), k_pooled.size(2)}, "shares");
  pooled_score({view(q_pooled), view(k_pooled), strided<float>(scale), block_q, block_k, n_q, n_k, q_start, causal, window,
                {firsts.data<int32_t>(), lasts.data<int32_t>()}, output<float>(out, ScalarType::Float, "shares")},
               where);
}

SA_SCHEMA(select_global,
          "Tensor(a!) counts, Tensor(b!) indices, Tensor score, Tensor threshold, str scope, int block_q, int block_k, "
          "int n_q, int n_k, int q_start, bool causal, int window, Tensor? first, Tensor? last, Tensor? always, "
          "bool inclusive")
[[maybe_unused]] void run_select_global(const Where& where, Tensor counts, Tensor indices, Tensor score, Tensor threshold,
                                        std::string scope, int64_t block_q, int64_t block_k, int64_t n_q, int64_t n_k,
                                        int64_t q_start, bool causal, int64_t window, OptionalTensor first, OptionalTensor last,
                                        OptionalTensor always, bool inclusive) {
  const Flat firsts(first, ScalarType::Int), lasts(last, ScalarType::Int), thresholds(threshold, ScalarType::Double);
  expect_size(counts, {score.size(0), score.size(1), score.size(2)}, "counts");
  expect_size(indices, {score.size(0), score.size(1), score.size(2), score.size(3)}, "indices");
  Strided<uint8_t> besides{};
  if (always) besides = strided<uint8_t>(*always);
  select_global({view(score), thresholds.data<double>(), scope == "all", block_q, block_k, n_q, n_k, q_start, causal, window,
                 {firsts.data<int32_t>(), lasts.data<int32_t>()}, besides, inclusive,
                 output<int32_t>(counts, ScalarType::Int, "counts"), output<int32_t>(indices, ScalarType::Int, "indices")},
                where);
}

SA_SCHEMA(js_distance,
          "Tensor(a!) out, Tensor p, Tensor q")
[[maybe_unused]] void run_js_distance(const Where& where, Tensor out, Tensor p, Tensor q) {
  expect_size(out, {p.size(0), p.size(1)}, "distance");
  js_distance({strided<float>(p), strided<float>(q), p.size(0), p.size(1), p.size(2),
               output<float>(out, ScalarType::Float, "distance")},
              where);
}

SA_SCHEMA(keep_top,
          "Tensor(a!) out, Tensor score, Tensor starts, Tensor lengths, Tensor counts, int slots")
[[maybe_unused]] void run_keep_top(const Where& where, Tensor out, Tensor score, Tensor starts, Tensor lengths, Tensor counts,
                                   int64_t slots) {
  const Flat scores(score, ScalarType::Float), begin(starts, ScalarType::Long), size(lengths, ScalarType::Long);
  const Flat wanted(counts, ScalarType::Int);
  expect_size(out, {starts.size(0), starts.size(1), slots}, "offsets");
  keep_top({scores.data<float>(), score.size(0), begin.data<int64_t>(), size.data<int64_t>(), wanted.data<int32_t>(),
            starts.size(0), starts.size(1), slots, output<int32_t>(out, ScalarType::Int, "offsets")},
           where);
}

SA_SCHEMA(move_rows,
          "Tensor(a!) rows, Tensor sources, Tensor targets")
[[maybe_unused]] void run_move_rows(const Where& where, Tensor rows, Tensor sources, Tensor targets) {
  const Flat from(sources, ScalarType::Long), to(targets, ScalarType::Long);
  SA_CHECK(rows.is_contiguous(), "rows must be contiguous, they are moved whole; pass the tensor that owns the memory");
  const int64_t n_rows = rows.size(0), bytes = rows.numel() * int64_t(rows.element_size());
  move_rows({static_cast<char*>(rows.data_ptr()), n_rows, n_rows ? bytes / n_rows : 0, from.data<int64_t>(), to.data<int64_t>(),
             sources.size(0)},
            where);
}

SA_SCHEMA(gather_pages,
          "Tensor(a!) rows, Tensor pages, Tensor sources, Tensor targets")
[[maybe_unused]] void run_gather_pages(const Where& where, Tensor rows, Tensor pages, Tensor sources, Tensor targets) {
  const Flat from(sources, ScalarType::Long), to(targets, ScalarType::Long);
  gather_pages({static_cast<char*>(rows.data_ptr()), static_cast<const char*>(pages.data_ptr()), rows.size(0), pages.size(0),
                rows.size(1) * int64_t(rows.element_size()), from.data<int64_t>(), to.data<int64_t>(), sources.numel()},
               where);
}

SA_SCHEMA(place_pages,
          "Tensor(a!) slots, Tensor(b!) misses, Tensor(c!) held, Tensor(d!) order, Tensor ids")
[[maybe_unused]] void run_place_pages(const Where& where, Tensor slots, Tensor misses, Tensor held, Tensor order, Tensor ids) {
  const Flat wanted(ids, ScalarType::Int);
  expect_size(slots, {held.size(0), ids.size(1)}, "slots");
  expect_size(misses, {held.size(0), ids.size(1)}, "misses");
  place_pages({output<int32_t>(held, ScalarType::Int, "held"), output<int32_t>(order, ScalarType::Int, "order"), held.size(0),
               held.size(1), wanted.data<int32_t>(), ids.size(1), output<int32_t>(slots, ScalarType::Int, "slots"),
               output<uint8_t>(misses, ScalarType::Bool, "misses")},
              where);
}

SA_SCHEMA(block_sparse_attention,
          "Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices, int block_q, "
          "int block_k, float scale, int q_start, bool causal, int window, float softcap, Tensor? first, Tensor? last, "
          "Tensor? sinks, Tensor? columns, Tensor? near, int dense_rows, Tensor? order, float pv_threshold")
[[maybe_unused]] void run_block_sparse_attention(const Where& where, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
                                                 Tensor counts, Tensor indices, int64_t block_q, int64_t block_k, double scale,
                                                 int64_t q_start, bool causal, int64_t window, double softcap, OptionalTensor first,
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
                         where);
}

SA_SCHEMA(paged_attention,
          "Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor starts, Tensor counts, float scale, "
          "bool causal, float softcap, Tensor? sinks, Tensor? q_first, Tensor? q_last, Tensor? bias")
[[maybe_unused]] void run_paged_attention(const Where& where, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor starts,
                                          Tensor counts, double scale, bool causal, double softcap, OptionalTensor sinks,
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
                  where);
}

SA_SCHEMA(page_score,
          "Tensor(a!) out, Tensor q, Tensor low, Tensor high, Tensor starts, Tensor pages, str reduce, Tensor? q_first, "
          "Tensor? q_last")
[[maybe_unused]] void run_page_score(const Where& where, Tensor out, Tensor q, Tensor low, Tensor high, Tensor starts, Tensor pages,
                                     std::string reduce, OptionalTensor q_first, OptionalTensor q_last) {
  const Flat start(starts, ScalarType::Long), count(pages, ScalarType::Long);
  const Flat first(q_first, ScalarType::Int), last(q_last, ScalarType::Int);
  expect_size(out, {low.size(0)}, "score");
  page_score({view(q), rows_of(low, "low"), rows_of(high, "high"),
              {start.data<int64_t>(), count.data<int64_t>(), starts.size(1), {first.data<int32_t>(), last.data<int32_t>()}},
              reduce_of(reduce), output<float>(out, ScalarType::Float, "score")},
             where);
}

SA_SCHEMA(row_score,
          "Tensor(a!) out, Tensor q, Tensor rows, Tensor starts, Tensor lengths, float scale, bool soft, str reduce, "
          "Tensor? q_first, Tensor? q_last")
[[maybe_unused]] void run_row_score(const Where& where, Tensor out, Tensor q, Tensor rows, Tensor starts, Tensor lengths,
                                    double scale, bool soft, std::string reduce, OptionalTensor q_first, OptionalTensor q_last) {
  const Flat start(starts, ScalarType::Long), length(lengths, ScalarType::Long);
  const Flat first(q_first, ScalarType::Int), last(q_last, ScalarType::Int);
  expect_size(out, {rows.size(0)}, "score");
  row_score({view(q), rows_of(rows, "rows"),
             {start.data<int64_t>(), length.data<int64_t>(), starts.size(1), {first.data<int32_t>(), last.data<int32_t>()}}, scale,
             soft, reduce_of(reduce), output<float>(out, ScalarType::Float, "score")},
            where);
}

SA_SCHEMA(lowrank_keys,
          "Tensor(a!) rows, Tensor factors, Tensor basis, Tensor starts, Tensor counts, Tensor targets, Tensor positions,"
          " Tensor far, Tensor near, bool interleaved")
[[maybe_unused]] void run_lowrank_keys(const Where& where, Tensor rows, Tensor factors, Tensor basis, Tensor starts, Tensor counts,
                                       Tensor targets, Tensor positions, Tensor far, Tensor near, bool interleaved) {
  const Flat start(starts, ScalarType::Long), count(counts, ScalarType::Int), target(targets, ScalarType::Long);
  const Flat position(positions, ScalarType::Int), fars(far, ScalarType::Float), nears(near, ScalarType::Float);
  lowrank_keys({rows.data_ptr(), rows.size(0), rows_of(factors, "factors"), view(basis), start.data<int64_t>(),
                target.data<int64_t>(), count.data<int32_t>(), starts.size(2), position.data<int32_t>(), fars.data<float>(),
                nears.data<float>(), far.size(0), near.size(0), near.size(2), interleaved},
               where);
}

}  // namespace
}  // namespace SA_NAMESPACE
