// The highest scores of each run in the order in which they stand, one block per run and no sort.
//
// Scores become integers that order alike. Three times the rows that are still in question are counted by their next bits, which
// leaves the bucket of the last kept one: three passes where halving would take 32. A last pass writes what is kept in order.
// A run outside the score, or a negative count, keeps nothing; with too few slots the best that fit are kept.
#include "simt.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
static_assert(kWarps == 32, "a lane stands for a warp below");
constexpr int kBuckets = 2048;
constexpr int kChunk = 4;  // rows of a lane that are under way together

// rises with the score; -0 equals 0, and NaN is -inf
SA_DEVICE uint32_t ordered(float score) {
  const uint32_t bits = score == score ? bits_from_float(score + 0.f) : 0xff800000u;
  return bits ^ (bits >> 31 ? ~0u : 1u << 31);
}

struct Shared {
  int sizes[kBuckets];
  int bucket, above;            // the bucket in question, and how many lie in those above
  int seen[2][2][kWarps];       // of two chunks in turn, per warp: rows above the least kept one, and rows that equal it
};

// by the first warp: the bucket from which `missing` rows are filled from the top
SA_DEVICE void find_bucket(Shared& s, int buckets, int missing) {
  const int each = buckets / 32, top = buckets - 1 - lane() * each;  // lane 0 has the highest
  int mine = 0;
  for (int i = 0; i < each; ++i) mine += s.sizes[top - i];
  int before = mine;
  for (int step = 1; step < 32; step *= 2) {
    const int theirs = shuffle_up(before, step);
    if (lane() >= step) before += theirs;
  }
  before -= mine;
  if (before >= missing || before + mine < missing) return;
  int i = 0;
  for (; before + s.sizes[top - i] < missing; ++i) before += s.sizes[top - i];
  s.bucket = top - i, s.above = before;
}

SA_GLOBAL(kThreads) void keep_of_run(const KeepTop a) {
  Shared& s = *reinterpret_cast<Shared*>(shared_memory());
  const int64_t run = block_x(), start = a.starts[run], length = a.lengths[run];
  const bool inside = start >= 0 && length >= 0 && length <= a.n_rows && start <= a.n_rows - length;
  const int64_t n = inside ? length : 0, count = std::min(std::max<int64_t>(a.counts[run], 0), std::min(n, a.slots));
  int32_t* list = a.out + run * a.slots;
  const float* score = a.score + start;
  for (int64_t j = count + thread(); j < a.slots; j += kThreads) list[j] = -1;
  if (count == n)
    for (int64_t j = thread(); j < n; j += kThreads) list[j] = int32_t(j);
  if (count == n || count == 0) return;

  uint32_t known = 0, least = 0;  // the bits of the least kept key that are known, and what they are
  int missing = int(count);       // of the rows that share them
  for (int shift = 21; shift >= 0; shift -= shift > 10 ? 11 : shift > 0 ? 10 : 1) {  // 21, 10, 0
    const int buckets = shift ? kBuckets : kBuckets / 2;
    for (int i = thread(); i < buckets; i += kThreads) s.sizes[i] = 0;
    barrier();
    for (int64_t j = thread(); j < n; j += kThreads) {
      const uint32_t key = ordered(score[j]);
      if ((key & known) == least) atomic_add(&s.sizes[key >> shift & (buckets - 1)], 1);
    }
    barrier();
    if (warp() == 0) find_bucket(s, buckets, missing);
    barrier();
    least |= uint32_t(s.bucket) << shift, known |= uint32_t(buckets - 1) << shift, missing -= s.above;
  }

  int64_t higher = 0;      // before this chunk: rows above the least kept one
  int ties = 0, turn = 0;  // and those that equal it
  for (int64_t at = 0; at < n && higher + std::min(ties, missing) < count; at += kThreads * kChunk, turn ^= 1) {
    uint32_t above[kChunk], equal[kChunk];
    int n_above = 0, n_equal = 0;
    const int64_t first = at + warp() * 32 * kChunk + lane();
    for (int i = 0; i < kChunk; ++i) {
      const int64_t j = first + i * 32;
      const uint32_t key = j < n ? ordered(score[j]) : 0;
      above[i] = ballot(j < n && key > least), equal[i] = ballot(j < n && key == least);
      n_above += popcount(above[i]), n_equal += popcount(equal[i]);
    }
    if (lane() == 0) s.seen[turn][0][warp()] = n_above, s.seen[turn][1][warp()] = n_equal;
    barrier();
    const int theirs_above = s.seen[turn][0][lane()], theirs_equal = s.seen[turn][1][lane()];  // of the warp with this number
    int64_t place = higher + warp_sum(lane() < warp() ? theirs_above : 0);
    int rank = ties + warp_sum(lane() < warp() ? theirs_equal : 0);
    for (int i = 0; i < kChunk; ++i) {
      const int mine = rank + votes_before(equal[i]);
      const bool stays = above[i] >> lane() & 1 || (equal[i] >> lane() & 1 && mine < missing);
      if (stays) list[place + votes_before(above[i]) + std::min(mine, missing)] = int32_t(first + i * 32);
      place += popcount(above[i]), rank += popcount(equal[i]);
    }
    higher += warp_sum(theirs_above), ties += warp_sum(theirs_equal);
  }
}

}  // namespace

void keep_top(const KeepTop& args, const Stream& stream) {
  launch<keep_of_run>(Grid{args.batch * args.kv_heads}, kThreads, sizeof(Shared), stream, args);
}

}  // namespace SA_NAMESPACE
