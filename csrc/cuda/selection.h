// Which scores a budget keeps, without sorting: the arithmetic, for one thread.
//
// Scores become integers that order alike. The least one at which everything from there up still fits the budget is found by
// halving; of the equal scores just below it the budget keeps the first few. Sums are in double, in another order than the
// reference's: sets differ only where the budget is met to the last bit of a sum that is not exact.
#pragma once
#include <cfloat>
#include <cstdint>

#include "../half.h"
#include "../ops.h"

namespace SA_NAMESPACE {

constexpr uint32_t kZeroKey = 1;                                     // of a score of 0; 0 is for what is no candidate
constexpr uint32_t kKeys = 0x7f7fffffu + kZeroKey + 1;               // all keys are below
SA_HOST_DEVICE inline bool is_mass(float x) { return x >= 0 && x <= FLT_MAX; }
SA_HOST_DEVICE inline uint32_t key_of(float mass) { return bits_from_float(mass + 0.f) + kZeroKey; }  // -0 is 0
SA_HOST_DEVICE inline float mass_of(uint32_t key) { return float_from_bits(key - kZeroKey); }

// Everything from `fits` up is kept, what is at `unfit` and below not all of it.
struct Search {
  uint32_t unfit, fits;
  SA_HOST_DEVICE bool done() const { return fits - unfit <= 1; }
  SA_HOST_DEVICE uint32_t middle() const { return unfit + (fits - unfit) / 2; }
  SA_HOST_DEVICE void tell(bool middle_fits) { (middle_fits ? fits : unfit) = middle(); }
};

// A share of mass: while what came before is below the target, or while the sum with it is not above.
struct Share {
  double target;
  bool inclusive;
  SA_HOST_DEVICE bool fits(double mass) const { return inclusive ? mass < target : mass <= target; }
  // of n candidates with the same mass, behind those that make up `before`
  SA_HOST_DEVICE int64_t ties(double before, double each, int64_t n) const {
    const auto keeps = [&](int64_t i) { return fits(before + double(inclusive ? i : i + 1) * each); };
    const double guess = (target - before) / each;
    int64_t kept = guess >= double(n) ? n : guess > 0 ? int64_t(guess) : 0;
    while (kept < n && keeps(kept)) ++kept;
    while (kept > 0 && !keeps(kept - 1)) --kept;
    return kept;
  }
};

// As many as that.
struct Count {
  int64_t count;
  SA_HOST_DEVICE bool fits(int64_t taken) const { return taken <= count; }
  SA_HOST_DEVICE int64_t ties(int64_t before, double, int64_t n) const { return count - before < n ? count - before : n; }
};

}  // namespace SA_NAMESPACE
