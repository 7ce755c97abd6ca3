// Block lists from one budget per head or per batch row: the halving of selection.h over the whole device, a launch per step and no
// synchronisation. A step sums its part of every pool; the next one adds the parts up, in the same order each time, and goes on.
//
// 1. read_pools: total mass, highest key. 2. step_pools, 31 times, reads every reachable score. 3. tie_pools: the highest key that
// does not fit whole. 4. count_ties, then rank_ties: of how many such pairs stand before each row. 5. write_rows: lists in order.
// A pool with a score that is no mass, or without a share, keeps all it can reach.
#include "../spans.h"
#include "selection.h"
#include "simt.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kThreads = kEmulated ? 64 : 256, kWarps = kThreads / 32;
constexpr int kSteps = 31;  // halve all keys

// What is known of a pool after a step.
struct State {
  double target, taken;  // the mass of the keys that fit
  Search search;
  uint32_t tie, whole;
};

// The pools of a call and what is written down about them.
struct Pools {
  SelectGlobal a;
  int64_t together, count, rows, parts;  // heads of a pool; rows of a pool; blocks that share a pool
  double* sums;    // [2, count, parts], of this step and the one before
  uint32_t* tops;  // [count, parts]
  State* states;   // [2, count]
  int32_t* ties;   // [count * rows]
};

struct Row {
  int64_t low, end;
  const float* score;
  int64_t stride;
  int64_t b, head, block;
};

// row i of a pool; nothing is reachable from padding
SA_DEVICE Row row_of(const Pools& p, int64_t pool, int64_t i) {
  const SelectGlobal& a = p.a;
  const View& v = a.score;
  const int64_t heads = pool * p.together + i / v.size[2], b = heads / v.size[1], head = heads % v.size[1], block = i % v.size[2];
  const float* score = static_cast<const float*>(v.data) + b * v.stride[0] + head * v.stride[1] + block * v.stride[2];
  Row row{0, 0, score, v.stride[3], b, head, block};
  const Span span = span_of(b, a.n_q, a.n_k, a.q_start, a.causal, a.padding);
  if (block * a.block_q >= span.n_q) return row;
  const Reach found = reach(a, span, block);
  row.low = std::max<int64_t>(0, found.low), row.end = std::min(found.high + 1, v.size[3]);
  return row;
}

// f(score) for every reachable pair of this block's part of its pool
template <class F>
SA_DEVICE void each_of_part(const Pools& p, const F& f) {
  for (int64_t i = block_x(); i < p.rows; i += p.parts) {
    const Row row = row_of(p, block_y(), i);
    for (int64_t j = row.low + thread(); j < row.end; j += kThreads) f(row.score[j * row.stride]);
  }
}

// of all threads, in thread 0
template <class T, class Join>
SA_DEVICE T joined(T x, const Join& join) {
  T* of_warps = reinterpret_cast<T*>(shared_memory());
  for (int step = 16; step; step >>= 1) x = join(x, shuffle_xor(x, step));
  barrier();
  if (lane() == 0) of_warps[warp()] = x;
  barrier();
  for (int i = 1; i < kWarps && thread() == 0; ++i) x = join(x, of_warps[i]);
  return x;
}
SA_DEVICE double summed(double x) { return joined(x, [](double u, double v) { return u + v; }); }
SA_DEVICE uint32_t highest(uint32_t x) { return joined(x, [](uint32_t u, uint32_t v) { return std::max(u, v); }); }

// of the pool's parts, in every thread
SA_DEVICE double sum_of_parts(const Pools& p, int turn) {
  const double* parts = p.sums + (turn * p.count + block_y()) * p.parts;
  double sum = 0;
  for (int64_t i = lane(); i < p.parts; i += 32) sum += parts[i];
  return warp_sum(sum);
}
SA_DEVICE uint32_t top_of_parts(const Pools& p) {
  uint32_t top = 0;
  for (int64_t i = lane(); i < p.parts; i += 32) top = std::max(top, p.tops[block_y() * p.parts + i]);
  return warp_max(top);
}

// keys from kKeys up say that something was no mass
SA_GLOBAL(kThreads) void read_pools(const Pools p) {
  double sum = 0;
  uint32_t top = 0;
  each_of_part(p, [&](float x) {
    sum += x;
    top = std::max(top, is_mass(x) ? key_of(x) : kKeys);
  });
  sum = summed(sum), top = highest(top);
  if (thread()) return;
  p.sums[block_y() * p.parts + block_x()] = sum;
  p.tops[block_y() * p.parts + block_x()] = top;
}

// what the sums of the step before say; every block finds the same
SA_DEVICE State state_after(const Pools& p, int step) {
  const double sum = sum_of_parts(p, step & 1);
  if (step > 0) {
    State state = p.states[(~step & 1) * p.count + block_y()];
    if (state.whole || state.search.done()) return state;
    const bool fits = Share{state.target, p.a.inclusive}.fits(sum);
    if (fits) state.taken = sum;
    state.search.tell(fits);
    return state;
  }
  const int64_t heads = int64_t(block_y()) * p.together % p.a.score.size[1];
  double share = p.a.threshold[heads];
  bool shares = true;
  for (int64_t h = heads; h < heads + p.together; ++h)
    shares &= p.a.threshold[h] >= 0 && p.a.threshold[h] <= 1, share = std::max(share, p.a.threshold[h]);
  const uint32_t top = top_of_parts(p);
  State state{share * sum, 0, {kZeroKey, std::max(top + 1, kZeroKey + 1)}, 0, !shares || share >= 1 || top >= kKeys};
  if (!state.whole && !Share{state.target, p.a.inclusive}.fits(0)) state.search = {kKeys - 1, kKeys};
  return state;
}

// reads the sums of step - 1, leaves those of this one
SA_GLOBAL(kThreads) void step_pools(const Pools p, int step) {
  const State state = state_after(p, step);
  if (block_x() == 0 && thread() == 0) p.states[(step & 1) * p.count + block_y()] = state;
  if (state.whole || state.search.done()) return;
  const uint32_t middle = state.search.middle();
  double sum = 0;
  each_of_part(p, [&](float x) { sum += key_of(x) >= middle ? x : 0.f; });
  sum = summed(sum);
  if (thread() == 0) p.sums[((~step & 1) * p.count + block_y()) * p.parts + block_x()] = sum;
}

SA_GLOBAL(kThreads) void tie_pools(const Pools p) {
  const State state = p.states[(kSteps & 1) * p.count + block_y()];
  uint32_t top = 0;
  if (!state.whole)
    each_of_part(p, [&](float x) {
      const uint32_t key = key_of(x);
      if (key < state.search.fits && key > kZeroKey) top = std::max(top, key);
    });
  top = highest(top);
  if (thread() == 0) p.tops[block_y() * p.parts + block_x()] = top;
}

SA_GLOBAL(kThreads) void count_ties(const Pools p) {
  const uint32_t tie = top_of_parts(p);
  for (int64_t i = int64_t(block_x()) * kWarps + warp(); i < p.rows; i += p.parts * kWarps) {
    const Row row = row_of(p, block_y(), i);
    int32_t ties = 0;
    for (int64_t j = row.low + lane(); j < row.end; j += 32) ties += tie && key_of(row.score[j * row.stride]) == tie;
    ties = warp_sum(ties);
    if (lane() == 0) p.ties[block_y() * p.rows + i] = ties;
  }
}

// how many each row keeps of its ties; one block per pool
SA_GLOBAL(kThreads) void rank_ties(const Pools p) {
  int64_t* of_warps = reinterpret_cast<int64_t*>(shared_memory());
  int32_t* ties = p.ties + block_y() * p.rows;
  State& state = p.states[(kSteps & 1) * p.count + block_y()];
  const uint32_t tie = top_of_parts(p);
  int64_t all = 0;
  for (int64_t i = thread(); i < p.rows; i += kThreads) all += ties[i];
  all = joined(all, [](int64_t u, int64_t v) { return u + v; });
  barrier();
  if (thread() == 0) {
    of_warps[0] = tie ? Share{state.target, p.a.inclusive}.ties(state.taken, mass_of(tie), all) : 0;
    state.tie = tie;
  }
  barrier();
  int64_t left = of_warps[0];
  for (int64_t at = 0; at < p.rows; at += kThreads) {
    const int64_t i = at + thread();
    const int64_t mine = i < p.rows ? ties[i] : 0;
    int64_t before = mine;
    for (int step = 1; step < 32; step *= 2) {
      const int64_t theirs = shuffle_up(before, step);
      if (lane() >= step) before += theirs;
    }
    barrier();
    if (lane() == 31) of_warps[warp()] = before;
    barrier();
    int64_t chunk = 0;
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp() ? of_warps[w] : 0;
      chunk += of_warps[w];
    }
    if (i < p.rows) ties[i] = int32_t(std::clamp<int64_t>(left - (before - mine), 0, mine));
    left -= chunk;
  }
}

SA_GLOBAL(kThreads) void write_rows(const Pools p) {
  const SelectGlobal& a = p.a;
  const int64_t number = int64_t(block_x()) * kWarps + warp();
  if (number >= p.count * p.rows) return;
  const Row row = row_of(p, number / p.rows, number % p.rows);
  const State state = p.states[(kSteps & 1) * p.count + number / p.rows];
  const int64_t k_blocks = a.score.size[3];
  int32_t* list = a.indices + number * k_blocks;
  int64_t count = 0;
  int32_t left = p.ties[number];
  for (int64_t at = row.low; at < row.end; at += 32) {
    const int64_t j = at + lane();
    const uint32_t key = j < row.end ? key_of(row.score[j * row.stride]) : 0;
    const bool tie = j < row.end && state.tie && key == state.tie;
    const uint32_t tied = ballot(tie);
    bool stays = j < row.end && (state.whole || key >= state.search.fits || (tie && votes_before(tied) < left));
    if (j < row.end && a.always.data) stays |= a.always.at(row.b, row.head, row.block, j) != 0;
    const uint32_t staying = ballot(stays);
    if (stays) list[count + votes_before(staying)] = int32_t(j);
    left -= popcount(tied), count += popcount(staying);
  }
  for (int64_t j = count + lane(); j < k_blocks; j += 32) list[j] = -1;
  if (lane() == 0) a.counts[number] = int32_t(count);
}

}  // namespace

void select_global(const SelectGlobal& args, const Stream& stream) {
  const int64_t batch = args.score.size[0], heads = args.score.size[1], together = args.all_heads ? heads : 1;
  const int64_t count = heads ? batch * heads / together : 0, rows = together * args.score.size[2];
  const Work &sums = stream.work[0], &tops = stream.work[1], &states = stream.work[2], &ties = stream.work[3];
  const Pools pools{args,
                    together,
                    count,
                    rows,
                    sums.size[3],
                    static_cast<double*>(sums.data),
                    static_cast<uint32_t*>(tops.data),
                    static_cast<State*>(states.data),
                    static_cast<int32_t*>(ties.data)};
  static_assert(sizeof(State) == 32);
  SA_CHECK(states.size[3] == 2 * count * int64_t(sizeof(State)) && ties.size[3] == count * rows,
           "CUDA: workspaces of another shape");
  if (rows == 0) return;
  const Grid grid{pools.parts, count};
  constexpr int64_t kShared = kWarps * 8;
  launch<read_pools>(grid, kThreads, kShared, stream, pools);
  for (int step = 0; step <= kSteps; ++step) launch<step_pools>(grid, kThreads, kShared, stream, pools, step);
  launch<tie_pools>(grid, kThreads, kShared, stream, pools);
  launch<count_ties>(grid, kThreads, 0, stream, pools);
  launch<rank_ties>(Grid{1, count}, kThreads, kShared, stream, pools);
  launch<write_rows>(Grid{(count * rows + kWarps - 1) / kWarps}, kThreads, 0, stream, pools);
}

}  // namespace SA_NAMESPACE
