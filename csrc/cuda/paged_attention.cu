// Attention of few queries over pages of a flat store: the listed rows of a key head are cut into parts that run side by side, then
// joined by their maxima and sums. Every key and value is read once for all queries of a group, so memory sets the pace.
//
// A row is held by a team of 8, 16 or 32 lanes, 16 bytes a lane (32 for float32 beyond 128 channels), and a team works through rows
// of its own: no barrier before the end. The next keys are on their way while some keys and values are computed. The dot
// products of all queries are summed over the team with the lanes halving what they hold, so that a lane ends with the logits of
// one query, and every exponential is taken by few lanes.
//
// What that costs, per listed row with D = Dv = 128 and R queries x heads: 512 bytes of bfloat16 and 256 R multiply-adds. An sm_90
// of 132 multiprocessors at 1.75 GHz that copies 3.35 TB/s has 35 cycles of one of them for a row, which are 140 warp instructions.
// As compiled for sm_90a the main loop has 83 of them for a row with R up to 4 and 128 with R up to 8 (bfloat16, no softcap), of
// which 8 R multiply. float32 rows are twice as long and take as many. So up to 8 the float32 units should keep up with memory;
// beyond, this backend refuses, and the matrix units of Triton's take over. None of this was measured: it has never run on a GPU.
#include <cmath>

#include "pages.h"
#include "warp.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f, kNothing = -__builtin_huge_valf();

// 2^(x - top), where -inf is the top of nothing
SA_DEVICE float weight(float x, float top) { return x == kNothing ? 0.0f : exp2f(x - top); }

// The arguments, and what both kernels make of them.
struct Call {
  PagedAttention a;
  PageTable table;
  int heads, group, n_q, kv_heads;
  int parts;     // that the listed rows of every key head are cut into
  int64_t rows;  // of [B, H, Nq]
  float *sums, *weights;  // [parts, rows, Dv] and [parts, rows, 2]: weighted values; top logit and sum of weights

  SA_HOST_DEVICE int first(int b) const { return a.queries.first ? std::clamp(a.queries.first[b], 0, n_q) : 0; }
  SA_HOST_DEVICE int last(int b) const { return a.queries.last ? std::clamp(a.queries.last[b], 0, n_q) : n_q; }
  SA_HOST_DEVICE bool is_real(int b, int i) const { return i >= first(b) && i < last(b); }
  // so many of `length` listed rows
  SA_HOST_DEVICE int64_t sees(int b, int i, int64_t length) const {
    return !is_real(b, i) ? 0 : a.causal ? std::max<int64_t>(length - (last(b) - 1 - i), 0) : length;
  }
  // listed rows of a part: whole rounds of a block
  SA_HOST_DEVICE int64_t part_rows(int64_t length) const {
    return ((length + parts - 1) / parts + kThreads - 1) / kThreads * kThreads;
  }
  SA_HOST_DEVICE int64_t row_of(int b, int head, int i) const { return (int64_t(b) * heads + head) * n_q + i; }
};

// A team of kTeam lanes holds a row, kVectors of 16 bytes a lane, and meets kQueries queries. Rows that are not aligned to 16
// bytes, !kWhole, are read element by element: right, and slow.
template <class Element_, int kTeam_, int kVectors_, int kQueries_, bool kWhole_>
struct Shape {
  using Element = Element_;
  static constexpr int kTeam = kTeam_, kVectors = kVectors_, kQueries = kQueries_;
  static constexpr bool kWhole = kWhole_;
  static constexpr int kTeams = kWarps * 32 / kTeam;  // of a block
  static constexpr int kPerVector = 16 / int(sizeof(Element));
  static constexpr int kChannels = kVectors * kPerVector;  // of a lane
  static constexpr int kWidth = kTeam * kChannels;         // a row has no more channels
  static constexpr int kLanesPerQuery = kTeam / kQueries;  // of a team, once its dot products are summed
  static constexpr int kAhead = (kWhole ? 4 : 2) / kVectors;  // rows that a team loads and computes together
  static constexpr int kBlocks = kQueries <= 4 ? 3 : 2;    // on a multiprocessor: what registers allow
  static constexpr int64_t kShared = sizeof(float) * kQueries * (kWarps * kWidth + 2 * kTeams);
  // channel of a row that a lane has as its number c
  static SA_HOST_DEVICE int channel(int lane, int c) {
    return (c / kPerVector * kTeam + lane % kTeam) * kPerVector + c % kPerVector;
  }
  static SA_HOST_DEVICE int first_of(int lane) { return lane / kTeam * kTeam; }  // of the lanes of a team
  // the query that a lane has the sums of, and a lane that has those of a query
  static SA_HOST_DEVICE int query_of(int lane) { return lane % kTeam / kLanesPerQuery; }
  static SA_HOST_DEVICE int lane_of(int lane, int query) { return first_of(lane) + query * kLanesPerQuery; }
};

// kAhead rows of a team, as they are stored
template <class S>
struct Held {
  Vec16 of[S::kAhead][S::kVectors];
};

// What a lane reads of a store: channels from its own on, or the row's first where it has none (nothing comes of those).
template <class S>
struct Source {
  using Element = typename S::Element;
  const Element* from[S::kVectors];
  int have[S::kVectors];  // channels

  SA_DEVICE explicit Source(const Rows& store) {
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
      const int channel = S::channel(lane(), v * S::kPerVector);
      have[v] = std::max(int(store.width) - channel, 0);
      from[v] = static_cast<const Element*>(store.data) + (have[v] ? channel : 0);
    }
  }

  // the rows whose first elements lanes `step` and on of the team know
  SA_DEVICE void load(Held<S>& held, int64_t row, int step) const {
#pragma unroll
    for (int u = 0; u < S::kAhead; ++u) {
      const int64_t offset = shuffle(row, S::first_of(lane()) + step + u);
#pragma unroll
      for (int v = 0; v < S::kVectors; ++v) {
        if constexpr (S::kWhole) {
          held.of[u][v] = load16(from[v] + offset);
        } else {
          float some[S::kPerVector] = {};
#pragma unroll
          for (int e = 0; e < S::kPerVector; ++e)
            if (e < have[v]) some[e] = to_float(from[v][offset + e]);
          held.of[u][v] = pack<Element>(some);
        }
      }
    }
  }
};

// dots[u][query], a lane's share each, becomes in dots[u][0] the sum over the team for the lane's own query
template <class S>
SA_DEVICE void sum_over_team(float (&dots)[S::kAhead][S::kQueries]) {
  int distance = S::kTeam / 2;
#pragma unroll
  for (int half = S::kQueries / 2; half > 0; half /= 2, distance /= 2) {
    const bool upper = lane() & distance;
    float sent[S::kAhead * (S::kQueries / 2 + 1)];
#pragma unroll
    for (int u = 0; u < S::kAhead; ++u)
#pragma unroll
      for (int r = 0; r < half; ++r) {
        sent[u * half + r] = upper ? dots[u][r] : dots[u][r + half];
        dots[u][r] = upper ? dots[u][r + half] : dots[u][r];
      }
    const Peers peers(sent);
#pragma unroll
    for (int u = 0; u < S::kAhead; ++u)
#pragma unroll
      for (int r = 0; r < half; ++r) dots[u][r] += peers.read(u * half + r, lane() ^ distance);
  }
#pragma unroll
  for (; distance > 0; distance /= 2) {
    float sent[S::kAhead];
#pragma unroll
    for (int u = 0; u < S::kAhead; ++u) sent[u] = dots[u][0];
    const Peers peers(sent);
#pragma unroll
    for (int u = 0; u < S::kAhead; ++u) dots[u][0] += peers.read(u, lane() ^ distance);
  }
}

// What a team found so far. A lane has every query's sums of its own channels, and top and total of its own query.
template <class S>
struct Found {
  float sums[S::kQueries][S::kChannels];
  float top, total;
};

template <class S>
SA_DEVICE void attend_rows(Found<S>& found, const float (&q)[S::kQueries][S::kChannels], const Held<S>& keys, const Held<S>& values,
                           const float (&shifts)[S::kAhead], int visible, float factor, float cap) {
  float dots[S::kAhead][S::kQueries];
#pragma unroll
  for (int u = 0; u < S::kAhead; ++u) {
    float key[S::kChannels];
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) unpack<typename S::Element>(keys.of[u][v], key + v * S::kPerVector);
#pragma unroll
    for (int r = 0; r < S::kQueries; ++r) {
      dots[u][r] = 0.0f;
#pragma unroll
      for (int c = 0; c < S::kChannels; ++c) dots[u][r] += q[r][c] * key[c];
    }
  }
  sum_over_team<S>(dots);

  float top = found.top, sent[S::kAhead + 1];
#pragma unroll
  for (int u = 0; u < S::kAhead; ++u) sent[u] = dots[u][0] * factor;
  if (cap > 0)
#pragma unroll
    for (int u = 0; u < S::kAhead; ++u) sent[u] = cap * tanhf(sent[u]);
#pragma unroll
  for (int u = 0; u < S::kAhead; ++u) {
    sent[u] = u < visible ? sent[u] + shifts[u] : kNothing;
    top = fmaxf(top, sent[u]);
  }
  sent[S::kAhead] = weight(found.top, top);
  found.total *= sent[S::kAhead], found.top = top;
#pragma unroll
  for (int u = 0; u < S::kAhead; ++u) found.total += sent[u] = weight(sent[u], top);

  const Peers peers(sent);
#pragma unroll
  for (int r = 0; r < S::kQueries; ++r) {
    const float kept = peers.read(S::kAhead, S::lane_of(lane(), r));
#pragma unroll
    for (int c = 0; c < S::kChannels; ++c) found.sums[r][c] *= kept;
  }
#pragma unroll
  for (int u = 0; u < S::kAhead; ++u) {
    float value[S::kChannels];
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) unpack<typename S::Element>(values.of[u][v], value + v * S::kPerVector);
#pragma unroll
    for (int r = 0; r < S::kQueries; ++r) {
      const float p = peers.read(u, S::lane_of(lane(), r));
#pragma unroll
      for (int c = 0; c < S::kChannels; ++c) found.sums[r][c] += p * value[c];
    }
  }
}

// A block per part of a key head's rows; query r of a group is head r % group of token r / group.
template <class S>
SA_GLOBAL(kThreads, S::kBlocks) void attend(const Call call) {
  using Element = typename S::Element;
  const PagedAttention& a = call.a;
  const int list = block_x() / call.parts, part = block_x() % call.parts, b = list / call.kv_heads;
  const int group = call.group, head0 = list % call.kv_heads * group, n_queries = group * call.n_q;
  const int64_t length = call.table.length(list), share = call.part_rows(length);

  // a token's heads are next to each other
  const auto next = [&](int& token, int& head) {
    if (++head == group) head = 0, ++token;
  };
  float q[S::kQueries][S::kChannels];
  int token = 0, head = 0;
#pragma unroll
  for (int r = 0; r < S::kQueries; ++r, next(token, head)) {
    const Element* const from = static_cast<const Element*>(a.q.data) + b * a.q.stride[0] + (head0 + head) * a.q.stride[1] +
                                token * a.q.stride[2];
#pragma unroll
    for (int c = 0; c < S::kChannels; ++c) {
      const int channel = S::channel(lane(), c);
      q[r][c] = r < n_queries && channel < a.k.width ? to_float(from[channel * a.q.stride[3]]) : 0.0f;
    }
  }
  const float cap = float(a.softcap * kLog2E), factor = float(a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2E);
  const int mine = S::query_of(lane());
  // the last real query sees all of them
  const int64_t end = call.first(b) < call.last(b) ? std::min(length, (part + 1) * share) : 0;
  const int64_t visible = mine < n_queries ? std::min(end, call.sees(b, mine / group, length)) : 0;

  Found<S> found{};
  found.top = kNothing;
  // a lane finds the row at `at` + its number, for its team to read; behind the end it repeats the last one, which is then hidden
  const Source<S> key_source(a.k), value_source(a.v);
  float shift = 0.0f, next_shift = 0.0f;
  const auto find = [&](int64_t at, float& shift) {
    const int64_t row = call.table.place(list, std::min(at + lane(), end - 1)).source;
    if (a.bias) shift = a.bias[row] * kLog2E;
    return row;
  };
  int64_t at = part * share + warp() * 32, row = 0;
  Held<S> keys, values;
  if (at < end) {
    row = find(at, shift);
    key_source.load(keys, row * a.k.stride, 0);
  }
  while (at < end) {
    const int64_t next_row = find(at + kThreads, next_shift), key_row = row * a.k.stride, value_row = row * a.v.stride;
    const int64_t next_key_row = next_row * a.k.stride;
    const int seen = int(std::clamp<int64_t>(visible - at, 0, 32)) - S::first_of(lane());
    for (int step = 0; step < S::kTeam; step += S::kAhead) {
      value_source.load(values, value_row, step);
      const int next_step = (step + S::kAhead) % S::kTeam;
      Held<S> next_keys;
      key_source.load(next_keys, next_step ? key_row : next_key_row, next_step);
      float shifts[S::kAhead] = {};
      if (a.bias)
#pragma unroll
        for (int u = 0; u < S::kAhead; ++u) shifts[u] = shuffle(shift, S::first_of(lane()) + step + u);
      attend_rows(found, q, keys, values, shifts, seen - step, factor, cap);
      keys = next_keys;
    }
    at += kThreads, row = next_row, shift = next_shift;
  }

  // the teams of the block become one
  float* const sums = reinterpret_cast<float*>(shared_memory());         // [warp][query][channel]
  float* const tops = sums + kWarps * S::kQueries * S::kWidth;           // [query][team]
  float* const totals = tops + S::kQueries * S::kTeams;
  const int team = thread() / S::kTeam;
  if (lane() == S::lane_of(lane(), mine)) {
    tops[mine * S::kTeams + team] = found.top;
    totals[mine * S::kTeams + team] = found.total;
  }
  barrier();
  const int64_t to_part = part * call.rows;
  if (thread() < n_queries) {
    const float *const mine_tops = tops + thread() * S::kTeams, *const mine_totals = totals + thread() * S::kTeams;
    float top = kNothing, total = 0.0f;
    for (int t = 0; t < S::kTeams; ++t) top = fmaxf(top, mine_tops[t]);
    for (int t = 0; t < S::kTeams; ++t) total += weight(mine_tops[t], top) * mine_totals[t];
    float* const to = call.weights + 2 * (to_part + call.row_of(b, head0 + thread() % group, thread() / group));
    to[0] = top, to[1] = total;
  }
#pragma unroll
  for (int r = 0; r < S::kQueries; ++r) {
    float top = kNothing;
    for (int t = 0; t < S::kTeams; ++t) top = fmaxf(top, tops[r * S::kTeams + t]);
    const float kept = weight(tops[r * S::kTeams + team], top);
#pragma unroll
    for (int c = 0; c < S::kChannels; ++c) found.sums[r][c] *= kept;
  }
#pragma unroll
  for (int distance = S::kTeam; distance < 32; distance *= 2)
#pragma unroll
    for (int r = 0; r < S::kQueries; ++r) {
      float sent[S::kChannels];
#pragma unroll
      for (int c = 0; c < S::kChannels; ++c) sent[c] = found.sums[r][c];
      const Peers peers(sent);
#pragma unroll
      for (int c = 0; c < S::kChannels; ++c) found.sums[r][c] += peers.read(c, lane() ^ distance);
    }
  if (lane() < S::kTeam)
#pragma unroll
    for (int r = 0; r < S::kQueries; ++r)
#pragma unroll
      for (int c = 0; c < S::kChannels; ++c)
        sums[(warp() * S::kQueries + r) * S::kWidth + S::channel(lane(), c)] = found.sums[r][c];
  barrier();
  token = head = 0;
#pragma unroll 1
  for (int r = 0; r < n_queries; ++r, next(token, head)) {
    float* const to = call.sums + (to_part + call.row_of(b, head0 + head, token)) * a.v.width;
    for (int channel = thread(); channel < a.v.width; channel += kThreads) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += sums[(w * S::kQueries + r) * S::kWidth + channel];
      to[channel] = sum;
    }
  }
}

// A block per row of [B, H, Nq]: its parts become its output.
template <class Element>
SA_GLOBAL(kThreads) void join(const Call call) {
  const PagedAttention& a = call.a;
  float* const kept = reinterpret_cast<float*>(shared_memory());  // [parts]: what a part's sums count
  float* const warps = kept + call.parts;                         // [2][warps]
  const int row = block_x(), i = row % call.n_q, head = row / call.n_q % call.heads, b = row / call.n_q / call.heads;
  const float sink = a.sinks && call.is_real(b, i) ? a.sinks[head] * kLog2E : kNothing;
  float top = sink;
  for (int p = thread(); p < call.parts; p += kThreads) top = fmaxf(top, call.weights[2 * (p * call.rows + row)]);
  top = warp_max(top);
  if (lane() == 0) warps[warp()] = top;
  barrier();
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, warps[w]);
  float total = 0.0f;
  for (int p = thread(); p < call.parts; p += kThreads) {
    const float* const of = call.weights + 2 * (p * call.rows + row);
    kept[p] = weight(of[0], top);
    total += kept[p] * of[1];
  }
  total = warp_sum(total);
  if (lane() == 0) warps[kWarps + warp()] = total;
  barrier();
  total = weight(sink, top);
  for (int w = 0; w < kWarps; ++w) total += warps[kWarps + w];
  const float factor = total > 0 ? 1.0f / total : 0.0f;
  if (thread() == 0) a.lse[row] = total > 0 ? (top + log2f(total)) * kLn2 : kNothing;
  Element* const out = static_cast<Element*>(a.out.data) + b * a.out.stride[0] + head * a.out.stride[1] + i * a.out.stride[2];
  for (int64_t channel = thread(); channel < a.v.width; channel += kThreads) {
    float sum = 0.0f;
#pragma unroll 8
    for (int p = 0; p < call.parts; ++p) sum += kept[p] * call.sums[(p * call.rows + row) * a.v.width + channel];
    out[channel * a.out.stride[3]] = from_float<Element>(sum * factor);
  }
}

// can be read 16 bytes at a time
template <class Element>
bool whole(const Rows& rows) {
  constexpr int64_t bytes = sizeof(Element);
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride * bytes % 16 == 0 && rows.width * bytes % 16 == 0;
}

template <class S>
void attend_with(const Call& call, const Stream& stream) {
  launch<attend<S>>({call.table.lists * call.parts}, kThreads, S::kShared, stream, call);
}

// few shapes, for each takes its time to compile
template <class Element, int kTeam>
void attend_few(const Call& call, const Stream& stream) {
  if (call.group * call.n_q <= 4) attend_with<Shape<Element, kTeam, 1, 4, true>>(call, stream);
  else attend_with<Shape<Element, kTeam, 1, 8, true>>(call, stream);
}

template <class Element>
void run(const Call& call, const Stream& stream) {
  const int64_t channels = std::max(call.a.k.width, call.a.v.width);
  constexpr int kLanes = sizeof(Element) == 4 ? 16 : 8;  // that hold 64 channels
  if (!whole<Element>(call.a.k) || !whole<Element>(call.a.v))
    attend_with<Shape<Element, 32, kLanes / 8, 8, false>>(call, stream);
  else if (channels <= 64) attend_few<Element, kLanes>(call, stream);
  else if (channels <= 128) attend_few<Element, 2 * kLanes>(call, stream);
  else attend_with<Shape<Element, 32, kLanes / 8, 8, true>>(call, stream);
  launch<join<Element>>({call.rows}, kThreads, (call.parts + 2 * kWarps) * sizeof(float), stream, call);
}

}  // namespace

// stream.work: ends, sums and weights, as in PageTable and Call
void paged_attention(const PagedAttention& args, const Stream& stream) {
  const int64_t batch = args.q.size[0], heads = args.q.size[1], n_q = args.q.size[2], rows = batch * heads * n_q;
  if (rows == 0) return;
  Call call{args,
            {args.starts, nullptr, args.counts, batch * args.kv_heads, args.pages, args.k.count, 0,
             static_cast<int64_t*>(stream.work[0].data)},
            int(heads),
            int(heads / args.kv_heads),
            int(n_q),
            int(args.kv_heads),
            int(stream.work[2].size[1]),
            rows,
            static_cast<float*>(stream.work[1].data),
            static_cast<float*>(stream.work[2].data)};
  launch_list_pages(call.table, stream);
  switch (args.q.dtype) {
    case DType::bf16: return run<bf16>(call, stream);
    case DType::fp16: return run<fp16>(call, stream);
    case DType::fp32: return run<float>(call, stream);
  }
}

}  // namespace SA_NAMESPACE
