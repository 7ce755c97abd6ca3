// Lanes of floats through GCC vector extensions: one source lowers to AVX-512, AVX2 or SSE by the flags of the library.
// kLanes is what one register holds (16, 8 or 4): GCC 12 keeps wider vectors in memory, not in several registers.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../half.h"
#include "../ops.h"

#define SA_INLINE inline __attribute__((always_inline))

namespace SA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));

// x - 0 is x to the compiler, a broadcast; 0 + x is not (-0) and costs an addition
SA_INLINE F32 splat(float x) { return x - F32{}; }
SA_INLINE I32 splat(int32_t x) { return I32{} + x; }
SA_INLINE I32 lane_numbers() {
  I32 x{};
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

SA_INLINE F32 load(const float* p) {
  F32 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
SA_INLINE void store(float* p, F32 x) { std::memcpy(p, &x, sizeof x); }

// n <= kLanes values, zeros behind them; never touches memory past p + n
SA_INLINE F32 load_first(const float* p, int n) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  F32 x{};
  std::memcpy(&x, p, n * sizeof(float));
  return x;
#endif
}
SA_INLINE void store_first(float* p, F32 x, int n) { std::memcpy(p, &x, n * sizeof(float)); }

SA_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
SA_INLINE F32 min(F32 a, F32 b) { return a < b ? a : b; }
SA_INLINE bool any(I32 mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  typedef int64_t I64 __attribute__((vector_size(4 * kLanes)));
  const I64 m = (I64)mask;
  int64_t all = m[0];
  for (int i = 1; i < kLanes / 2; ++i) all |= m[i];
  return all != 0;
#endif
}
SA_INLINE float sum(F32 x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// every lane the whole of its N lanes, joined by halves; a template, for a shuffle whose pattern is only known at run time is slow
template <int N = kLanes, class Join>
SA_INLINE F32 joined(F32 x, const Join& join) {
  if constexpr (N == 1) {
    return x;
  } else {
    I32 other{};
    for (int i = 0; i < kLanes; ++i) other[i] = i ^ N / 2;
    return joined<N / 2>(join(x, __builtin_shuffle(x, other)), join);
  }
}

// -- half precision: the scalar forms of half.h are the definition, these their twins ----------------------------------------

SA_INLINE F32 widen_bf16(U16 h) {
#if defined(__AVX512F__)
  return (F32)((U32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h) << 16);  // GCC 12 makes two halves of the portable form
#else
  return (F32)(__builtin_convertvector(h, U32) << 16);
#endif
}

SA_INLINE U16 narrow_bf16(F32 x) {
  const U32 bits = (U32)x;
  const U32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const U32 quiet = bits >> 16 | 0x40u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, U16);
}

SA_INLINE F32 widen_fp16(U16 h) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);  // the unmasked form warns in GCC 12
#elif defined(__F16C__)
  return (F32)_mm256_cvtph_ps((__m128i)h);
#else
  const U32 wide = __builtin_convertvector(h, U32), rest = wide & 0x7fffu;
  const U32 finite = (U32)((F32)(rest << 13) * 0x1p112f), special = 0x7f800000u | (rest & 0x3ffu) << 13;
  return (F32)((wide & 0x8000u) << 16 | (rest >= 0x7c00u ? special : finite));
#endif
}

SA_INLINE U16 narrow_fp16(F32 x) {
#if defined(__AVX512F__)
  return (U16)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (U16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  U16 h;
  for (int i = 0; i < kLanes; ++i) h[i] = float_to_fp16(x[i]);
  return h;
#endif
}

// -- transpose -----------------------------------------------------------------------------------------------------------------

// rows become columns, in registers
SA_INLINE void transpose(F32 (&row)[kLanes]) {
  #pragma GCC unroll 4
  for (int s = kLanes / 2; s; s /= 2) {
    I32 low{}, high{};
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i & s ? kLanes + i - s : i;
      high[i] = i & s ? kLanes + i : i + s;
    }
    #pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & s) continue;
      const F32 a = row[i], b = row[i + s];
      row[i] = __builtin_shuffle(a, b, low);
      row[i + s] = __builtin_shuffle(a, b, high);
    }
  }
}

// lane i is the sum of the lanes of row[i]; by halves, each of them a register
template <int N = kLanes / 2>
SA_INLINE F32 sums(const F32* row) {
  if constexpr (N == 0) {
    return *row;
  } else {
    I32 low{}, high{};
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i & N ? kLanes + i - N : i;
      high[i] = i & N ? kLanes + i : i + N;
    }
    F32 half[N];
    #pragma GCC unroll 8
    for (int i = 0; i < N; ++i) half[i] = __builtin_shuffle(row[i], row[i + N], low) + __builtin_shuffle(row[i], row[i + N], high);
    return sums<N / 2>(half);
  }
}

// -- elements: how a dtype is read and written -----------------------------------------------------------------------------------

struct Bf16 {
  using Storage = uint16_t;
  static float get(uint16_t h) { return bf16_to_float(h); }
  static uint16_t put(float x) { return float_to_bf16(x); }
  static SA_INLINE F32 load(const uint16_t* p) {
    U16 h;
    std::memcpy(&h, p, sizeof h);
    return widen_bf16(h);
  }
  static SA_INLINE void store(uint16_t* p, F32 x) {
    const U16 h = narrow_bf16(x);
    std::memcpy(p, &h, sizeof h);
  }
};

struct Fp16 {
  using Storage = uint16_t;
  static float get(uint16_t h) { return fp16_to_float(h); }
  static uint16_t put(float x) { return float_to_fp16(x); }
  static SA_INLINE F32 load(const uint16_t* p) {
    U16 h;
    std::memcpy(&h, p, sizeof h);
    return widen_fp16(h);
  }
  static SA_INLINE void store(uint16_t* p, F32 x) {
    const U16 h = narrow_fp16(x);
    std::memcpy(p, &h, sizeof h);
  }
};

struct Fp32 {
  using Storage = float;
  static float get(float x) { return x; }
  static float put(float x) { return x; }
  static SA_INLINE F32 load(const float* p) { return SA_NAMESPACE::load(p); }
  static SA_INLINE void store(float* p, F32 x) { SA_NAMESPACE::store(p, x); }
};

// f(Element{}) with the element type of a dtype
template <class F>
auto with_element(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f(Bf16{});
    case DType::fp16: return f(Fp16{});
    default: return f(Fp32{});
  }
}

// row[0..n) of a tensor, its elements `stride` apart, as floats; writes exactly n floats
template <class Element>
SA_INLINE void read_row(const typename Element::Storage* row, int64_t stride, int64_t n, float* to) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes <= n; i += kLanes) store(to + i, Element::load(row + i));
  for (; i < n; ++i) to[i] = Element::get(row[i * stride]);
}

template <class Element>
SA_INLINE void write_row(typename Element::Storage* row, int64_t stride, int64_t n, const float* from) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes <= n; i += kLanes) Element::store(row + i, load(from + i));
  for (; i < n; ++i) row[i * stride] = Element::put(from[i]);
}

// -- exp ---------------------------------------------------------------------------------------------------------------------------

// 2^x for x <= 0 to float32 accuracy; -inf and anything below -126 give 0, so a hidden key costs no branch; NaN stays NaN
SA_INLINE F32 exp2_nonpositive(F32 x) {
  const F32 clipped = max(splat(-127.0f), x);  // this order returns x when it is NaN
  constexpr float kRound = 0x1.8p23f;          // adding it leaves the nearest integer in the low mantissa bits
  const F32 shifted = clipped + kRound;
  const F32 r = clipped - (shifted - kRound);  // in [-0.5, 0.5]
  // Taylor terms of 2^r to degree 7, ln(2)^k / k!; the first one left out is below 6e-9 there
  F32 p = splat(0x1.ffcbfcp-17f);
  p = p * r + 0x1.430912p-13f;
  p = p * r + 0x1.5d87fep-10f;
  p = p * r + 0x1.3b2ab6p-7f;
  p = p * r + 0x1.c6b08ep-5f;
  p = p * r + 0x1.ebfbep-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
  const F32 scaled = (F32)((I32)p + ((I32)shifted << 23));
  return x < -126.0f ? F32{} : scaled;
}

constexpr float kLog2E = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;

// tanh to float32 accuracy in absolute terms; |x| below 0.25 by its series, where the other form cancels
SA_INLINE F32 tanh_lanes(F32 x) {
  const F32 a = x < 0.0f ? -x : x;
  const F32 e = exp2_nonpositive(a * (-2 * kLog2E));
  const F32 far = (1.0f - e) / (1.0f + e);
  const F32 y = x * x;
  const F32 near = a + a * y * (-0x1.555556p-2f + y * (0x1.111112p-3f + y * (-0x1.ba1ba2p-5f + y * 0x1.664f48p-6f)));
  const F32 t = a < 0.25f ? near : far;
  return x < 0.0f ? -t : t;
}

// -- scratch memory ----------------------------------------------------------------------------------------------------------------

// Aligned memory that a thread keeps between calls, so that a short call does not pay for page faults.
// One Scratch per kernel at a time: take() pieces in order, reset() at the start of the worker.
class Scratch {
 public:
  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }
  // room for everything that take() will be asked for
  void reset(size_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(base_);
    size_ = 0;
    bytes = (bytes + 4095) / 4096 * 4096;
    base_ = static_cast<char*>(std::aligned_alloc(4096, bytes));
    if (base_ == nullptr) throw std::bad_alloc();
    size_ = bytes;
  }
  template <class T>
  T* take(size_t count) {
    char* at = base_ + used_;
    used_ += bytes_for<T>(count);
    if (used_ > size_) throw std::bad_alloc();
    return reinterpret_cast<T*>(at);
  }
  // bytes that take<T>(count) uses
  template <class T>
  static constexpr size_t bytes_for(size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }
  ~Scratch() { std::free(base_); }

 private:
  char* base_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

}  // namespace SA_NAMESPACE
