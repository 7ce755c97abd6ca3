// The highest scores of each run, in the order in which they stand, without a sort.
//
// Scores become integers that order alike. Counting them by their leading bits finds the bucket in which the last kept one lies;
// only that bucket is looked at more closely. Then one walk over the run keeps what lies above the last kept one, and of its equals
// as many as are missing.
#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

#include "../checks.h"
#include "../ops.h"
#include "simd.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kBuckets = 2048;  // sign, exponent and 2 bits of mantissa
constexpr int kBucketShift = 21;

// rises with the score; -0 equals 0, and NaN is -inf
SA_INLINE uint32_t ordered(float score) {
  const uint32_t bits = bits_from_float(score == score ? score + 0.f : -std::numeric_limits<float>::infinity());
  return bits ^ (bits >> 31 ? ~0u : 1u << 31);
}

class Worker {
 public:
  explicit Worker(const KeepTop& args) : a_(args) {
    const size_t longest = *std::max_element(args.lengths, args.lengths + args.batch * args.kv_heads) + 1;
    Scratch& scratch = Scratch::mine();
    scratch.reset(2 * Scratch::bytes_for<uint32_t>(longest) + Scratch::bytes_for<uint32_t>(kBuckets));
    keys_ = scratch.take<uint32_t>(longest), close_ = scratch.take<uint32_t>(longest), sizes_ = scratch.take<uint32_t>(kBuckets);
  }

  void run(int64_t i) const {
    const int64_t n = a_.lengths[i], count = std::min<int64_t>(a_.counts[i], n);
    int32_t* list = a_.out + i * a_.slots;
    std::fill(list + count, list + a_.slots, -1);
    if (count == n) std::iota(list, list + n, 0);
    else if (count > 0) choose(a_.score + a_.starts[i], n, count, list);
  }

 private:
  // 0 < count < n
  void choose(const float* score, int64_t n, int64_t count, int32_t* list) const {
    for (int64_t j = 0; j < n; ++j) keys_[j] = ordered(score[j]);
    std::fill(sizes_, sizes_ + kBuckets, 0);
    for (int64_t j = 0; j < n; ++j) ++sizes_[keys_[j] >> kBucketShift];
    int64_t missing = count;  // of the bucket at hand, those above it kept whole
    uint32_t bucket = kBuckets - 1;
    for (; sizes_[bucket] < missing; --bucket) missing -= sizes_[bucket];
    int64_t n_close = 0;
    for (int64_t j = 0; j < n; ++j) {
      close_[n_close] = keys_[j];
      n_close += keys_[j] >> kBucketShift == bucket;
    }
    std::nth_element(close_, close_ + missing - 1, close_ + n_close, std::greater<>());
    const uint32_t least = close_[missing - 1];
    // all that lie above the least kept one stand before it now
    int64_t ties = missing - std::count_if(close_, close_ + missing, [&](uint32_t key) { return key > least; });
    for (int64_t j = 0, kept = 0; kept < count; ++j) {
      // no branch: what is kept cannot be foreseen (8 runs of 8192, half kept: twice as fast as with one)
      const bool tie = keys_[j] == least;
      list[kept] = int32_t(j);
      kept += (keys_[j] > least) | (tie & (ties > 0));
      ties -= tie;
    }
  }

  const KeepTop& a_;
  uint32_t *keys_, *close_, *sizes_;
};

}  // namespace

void keep_top(const KeepTop& args, const Parallel& parallel) {
  const int64_t heads = args.kv_heads, n_runs = args.batch * heads;
  for (int64_t i = 0; i < n_runs; ++i) {
    const int64_t start = args.starts[i], length = args.lengths[i], count = args.counts[i], kept = std::min(count, length);
    SA_CHECK(start >= 0 && length >= 0 && length <= args.n_rows && start <= args.n_rows - length, "run [", i / heads, ", ",
             i % heads, "] has ", length, " rows from ", start, " but the store has ", args.n_rows, "; it must lie inside");
    SA_CHECK(count >= 0, "counts has ", count, " for run [", i / heads, ", ", i % heads, "]; it is the number of rows to keep");
    SA_CHECK(kept <= args.slots, "run [", i / heads, ", ", i % heads, "] keeps ", kept, " rows but there are ", args.slots,
             " slots; give more");
  }
  parallel_tasks(parallel, n_runs, [&](TaskQueue& queue) {
    const Worker worker(args);
    for (int64_t task; queue.take(&task);) worker.run(task);
  });
}

}  // namespace SA_NAMESPACE
