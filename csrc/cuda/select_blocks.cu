// Block lists from block scores, one warp per row and no barrier: a row's keys stay in shared memory while the warp halves the
// range of keys (selection.h), then the row is walked once more in order and what is kept is written where it belongs.
// A row costs at most 31 passes over its keys in shared memory; without ties fewer, for it ends when one key is left in question.
// A row with a score that is no mass keeps all it can reach, and so does a head whose threshold is no share.
#include <climits>

#include "../spans.h"
#include "selection.h"
#include "simt.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kRows = 4;                    // of a block, where shared memory allows
constexpr int64_t kKeyBytes = 48 * 1024;    // of a block, unless one row needs more

// Sum over the candidates from a key up: their mass, or how many they are.
SA_DEVICE double weigh(const Share&, uint32_t key) { return mass_of(key); }
SA_DEVICE int64_t weigh(const Count&, uint32_t) { return 1; }

// What a warp found: keys from `from` up, and the first `ties` that equal `tie`.
struct Kept {
  uint32_t from, tie;
  int64_t ties;
};

// the budget's choice among keys in [least, kKeys); `before` is taken already
template <class Budget, class Sum>
SA_DEVICE Kept choose(const Budget& budget, const uint32_t* keys, int64_t n, uint32_t least, Sum before) {
  if (!budget.fits(before)) return {kKeys, 0, 0};
  uint32_t top = 0;
  for (int64_t j = lane(); j < n; j += 32) top = std::max(top, keys[j]);
  Search search{least - 1, std::max(warp_max(top) + 1, least)};
  Sum taken = before;
  int n_fits = 0, n_unfit = INT_MAX;  // keys from there up
  while (!search.done() && n_unfit - n_fits > 1) {
    const uint32_t middle = search.middle();
    Sum sum = 0;
    int from_middle = 0;
    for (int64_t j = lane(); j < n; j += 32)
      if (keys[j] >= middle) sum += weigh(budget, keys[j]), ++from_middle;
    sum = before + warp_sum(sum), from_middle = warp_sum(from_middle);
    const bool fits = budget.fits(sum);
    if (fits) taken = sum;
    (fits ? n_fits : n_unfit) = from_middle;
    search.tell(fits);
  }
  uint32_t tie = 0;
  for (int64_t j = lane(); j < n; j += 32)
    if (keys[j] < search.fits) tie = std::max(tie, keys[j]);
  tie = warp_max(tie);
  if (tie < least) return {search.fits, 0, 0};
  int64_t equal = 0;
  for (int64_t j = lane(); j < n; j += 32) equal += keys[j] == tie;
  return {search.fits, tie, budget.ties(taken, mass_of(tie), warp_sum(equal))};
}

SA_GLOBAL(32 * kRows) void select_rows(const SelectBlocks a, int64_t rows, int64_t keys_of_row) {
  const int64_t row = int64_t(block_x()) * (threads() / 32) + warp();
  if (row >= rows) return;
  const View& v = a.score;
  const int64_t block = row % v.size[2], head = row / v.size[2] % v.size[1], b = row / v.size[2] / v.size[1], k_blocks = v.size[3];
  const Span span = span_of(b, a.n_q, a.n_k, a.q_start, a.causal, a.padding);
  int32_t* list = a.indices + row * k_blocks;
  int64_t count = 0;
  if (block * a.block_q < span.n_q) {
    const Reach found = reach(a, span, block);
    const int64_t low = std::max<int64_t>(0, found.low), end = std::max(low, std::min(found.high + 1, k_blocks));
    // the candidates lie between the leading and the trailing forced blocks
    const int64_t first = std::clamp(a.sink, low, end);
    const int64_t last = a.recent ? std::clamp(found.own - (a.recent - 1), first, end) : end;
    const float* score = static_cast<const float*>(v.data) + b * v.stride[0] + head * v.stride[1] + block * v.stride[2];
    uint32_t* keys = reinterpret_cast<uint32_t*>(shared_memory()) + warp() * keys_of_row - low;
    double total = 0, forced = 0;
    bool good = true;
    for (int64_t j = low + lane(); j < end; j += 32) {
      const float mass = score[j * v.stride[3]];
      const bool candidate = j >= first && j < last;
      good &= is_mass(mass);
      total += mass;
      forced += candidate ? 0.f : mass;
      keys[j] = candidate ? key_of(mass) : 0;
    }
    warp_barrier();
    const double share = a.threshold ? a.threshold[head] : 0;
    const int64_t most = a.threshold ? 0 : a.top_k.at(b, head, block) - (first - low) - (end - last);
    Kept kept{kZeroKey, 0, 0};
    if (!all(good) || !(share >= 0 && share < 1)) {
    } else if (a.threshold) {
      const Share budget{share * warp_sum(total), a.inclusive};
      kept = choose(budget, keys + first, last - first, kZeroKey + 1, warp_sum(forced));
    } else {
      kept = choose(Count{std::max<int64_t>(most, 0)}, keys + first, last - first, kZeroKey, int64_t(0));
    }
    int64_t ties = 0;
    for (int64_t at = low; at < end; at += 32) {
      const int64_t j = at + lane();
      const uint32_t key = j < end ? keys[j] : 0;
      const bool tie = key && key == kept.tie;
      const uint32_t tied = ballot(tie);
      bool stays = j < end && (key == 0 || key >= kept.from || (tie && ties + votes_before(tied) < kept.ties));
      if (j < end && a.always.data) stays |= a.always.at(b, head, block, j) != 0;
      const uint32_t staying = ballot(stays);
      if (stays) list[count + votes_before(staying)] = int32_t(j);
      ties += popcount(tied), count += popcount(staying);
    }
  }
  for (int64_t j = count + lane(); j < k_blocks; j += 32) list[j] = -1;
  if (lane() == 0) a.counts[row] = int32_t(count);
}

}  // namespace

void select_blocks(const SelectBlocks& args, const Stream& stream) {
  const View& v = args.score;
  const int64_t rows = v.size[0] * v.size[1] * v.size[2], keys_of_row = round_up(v.size[3], 32);
  const int64_t rows_of_block = std::clamp<int64_t>(kKeyBytes / (4 * std::max<int64_t>(keys_of_row, 1)), 1, kRows);
  launch<select_rows>(Grid{(rows + rows_of_block - 1) / rows_of_block}, int(32 * rows_of_block), 4 * keys_of_row * rows_of_block,
                      stream, args, rows, keys_of_row);
}

}  // namespace SA_NAMESPACE
