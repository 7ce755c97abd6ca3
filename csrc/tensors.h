// Tensors -> what kernels see. Included by the two libraries only; it uses torch's stable ABI, which compiles in seconds, and one
// build serves every torch from 2.11 on.
// Python has checked shapes and dtypes (sparse_attn/ops/<op>.py) and allocated the outputs before anything arrives here.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"
#include "ops.h"

namespace SA_NAMESPACE {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// its last dimensions, the first ones of a tensor of fewer are 1
[[maybe_unused]] View view(const Tensor& t, int dims = 4) {
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

[[maybe_unused]] Rows rows_of(const Tensor& t, const char* name) {
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

[[maybe_unused]] void expect_size(const Tensor& t, std::initializer_list<int64_t> size, const char* name) {
  SA_CHECK(t.dim() == static_cast<int64_t>(size.size()), "out: ", name, " needs ", size.size(), " dimensions, got ", t.dim());
  int64_t i = 0;
  for (int64_t want : size) {
    SA_CHECK(t.size(i) == want, "out: ", name, " has size ", t.size(i), " at dimension ", i, ", needs ", want);
    ++i;
  }
}

}  // namespace
}  // namespace SA_NAMESPACE
