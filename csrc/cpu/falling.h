// Candidates by falling score without a full sort.
//
// They fall into buckets by the leading bits of their score, counted down from the largest: 8 buckets an octave. Buckets are
// sorted one by one from the top, and only while more is wanted, so the cost is three passes plus a sort of what is visited.
#pragma once
#include <algorithm>
#include <utility>

#include "simd.h"

namespace SA_NAMESPACE {

constexpr int kBuckets = 256;     // 32 octaves; what is smaller shares the last bucket
constexpr int kBucketShift = 20;  // of a float's bits: leaves 3 bits of mantissa

// visit(number) by falling score, ties to the lower number, until it returns false. each(see) calls see(score, number) for every
// candidate in the same order each time: scores are finite and >= 0 (not -0), numbers are below 2^32. sorted has room for all.
template <class Each, class Visit>
void visit_falling(const Each& each, uint64_t* sorted, const Visit& visit) {
  float top = 0;
  each([&](float score, int64_t) { top = std::max(top, score); });
  const int32_t top_bits = static_cast<int32_t>(bits_from_float(top));
  const auto bucket = [&](float score) {
    return std::min(kBuckets - 1, (top_bits - static_cast<int32_t>(bits_from_float(score))) >> kBucketShift);
  };
  uint32_t end_of[kBuckets] = {}, before = 0;
  each([&](float score, int64_t) { ++end_of[bucket(score)]; });
  for (uint32_t& end : end_of) before += std::exchange(end, before);
  // falling score, then rising number, as rising 64-bit numbers
  each([&](float score, int64_t number) {
    sorted[end_of[bucket(score)]++] = uint64_t(~bits_from_float(score)) << 32 | uint32_t(number);
  });
  uint32_t at = 0;
  for (const uint32_t end : end_of) {
    if (at == end) continue;
    std::sort(sorted + at, sorted + end);
    for (; at < end; ++at)
      if (!visit(static_cast<int64_t>(uint32_t(sorted[at])))) return;
  }
}

}  // namespace SA_NAMESPACE
