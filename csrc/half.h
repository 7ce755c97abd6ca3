// Half precision both ways, one number at a time, rounded to the nearest, ties to even.
#pragma once
#include <cstdint>
#include <cstring>

#include "ops.h"

namespace SA_NAMESPACE {

SA_HOST_DEVICE inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
SA_HOST_DEVICE inline uint32_t bits_from_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

SA_HOST_DEVICE inline float bf16_to_float(uint16_t h) { return float_from_bits(uint32_t(h) << 16); }

// round to nearest even; a NaN stays a NaN
SA_HOST_DEVICE inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = bits_from_float(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

SA_HOST_DEVICE inline float fp16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // shifted into place the exponent is 112 too small; a product repairs it, subnormals included
  return float_from_bits(sign | bits_from_float(float_from_bits(rest << 13) * 0x1p112f));
}

SA_HOST_DEVICE inline uint16_t float_to_fp16(float x) {
  const uint32_t bits = bits_from_float(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  if (rest < 0x38800000u) {                                  // subnormal: let the adder round at the right bit
    const uint32_t rounded = bits_from_float(float_from_bits(rest) + 0.5f);
    return uint16_t(sign | (rounded - 0x3f000000u));
  }
  return uint16_t(sign | ((rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13));
}

}  // namespace SA_NAMESPACE
