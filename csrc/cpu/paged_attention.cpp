// Attention of few queries over pages of a flat store: every key and value is read once, so memory sets the pace.
//
// A register of logits holds R queries of one KV head against kLanes / R rows, each a dot product over channels; one load of a
// key or a value serves them all, and more queries than R go over a tile of rows while it is in cache. While a tile is
// computed the next one is fetched, wherever its pages lie. The listed rows of every KV head are cut into parts of one length, so
// that few or uneven heads fill every thread; parts are joined by their maxima and sums in list order. How they are cut depends
// on shapes and lists alone: threads do not change a bit.
#include <cmath>
#include <memory>
#include <vector>

#include "../checks.h"
#include "attention_simd.h"

namespace SA_NAMESPACE {
namespace {

// Measured on one thread, AVX-512, 128 channels, far beyond the caches: fetching the next tile ahead takes 13% off (bfloat16 and
// float32); tiles of 32 and 128 rows are 0 and 7% slower. A tile and the next one stay in L2.
constexpr int kTileRows = 64;
constexpr int kMaxQueries = 64;  // of a task: their sums stay in L2 beside the tiles
// All the work is cut into about so many tasks, but no part is shorter than kPartRows: it starts without a tile fetched ahead.
constexpr int64_t kTasks = 256, kPartRows = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where a row stands in the pages of a KV head.
struct Place {
  int64_t page, offset;
};

// Up to kMaxQueries queries of one KV head and the parts of its rows that they see; the heads of a token are next to each other.
struct Unit {
  int64_t b, kv_head, query0, queries;
  int64_t part0, parts;
};

// One part of the rows of a unit.
struct Task {
  int64_t unit;
  int64_t row0, rows;  // counted in list order
  Place place;         // of row0
};

// What the queries of a unit found in one part.
struct Part {
  float *o, *m, *l;  // [query][value_lanes], [query], [query]: values weighted by 2^(logit - m), and the sum of the weights
};

// Starts and counts of the pages of a KV head.
struct Pages {
  const int64_t* starts;
  const int32_t* counts;
};

// channels of a row in registers; the last register may overlap the one before it
int64_t registers(int64_t width) { return ceil_div(width, kLanes); }
SA_INLINE int64_t channel_of(int64_t i, int64_t width) { return std::min(i * kLanes, width - kLanes); }

// walks the listed rows of a KV head
class Walk {
 public:
  Walk(const Pages& pages, Place place, int64_t left) : pages_(pages), at_(place), left_(left) {}

  // the next rows of the store, at most a tile; the rest of the tile repeats the last one
  int take(int64_t* rows) {
    const int n = int(std::min<int64_t>(left_, kTileRows));
    for (int have = 0; have < n;) {
      const int64_t start = pages_.starts[at_.page] + at_.offset, end = pages_.counts[at_.page] - at_.offset;
      const int some = int(std::min<int64_t>(end, n - have));
      for (int i = 0; i < some; ++i) rows[have + i] = start + i;
      have += some, at_.offset += some;
      if (some == end) ++at_.page, at_.offset = 0;
    }
    for (int i = n; n && i < kTileRows; ++i) rows[i] = rows[n - 1];
    left_ -= n;
    return n;
  }

 private:
  const Pages pages_;
  Place at_;
  int64_t left_;
};

class Plan {
 public:
  explicit Plan(const PagedAttention& args) : a_(args), group_(args.q.size[1] / std::max<int64_t>(args.kv_heads, 1)) {
    const int64_t batch = a_.q.size[0], n_q = a_.q.size[2];
    int64_t work = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t first = std::clamp<int64_t>(a_.queries.first ? a_.queries.first[b] : 0, 0, n_q);
      const int64_t last = std::clamp<int64_t>(a_.queries.last ? a_.queries.last[b] : n_q, first, n_q);
      first_.push_back(first), n_real_.push_back(last - first);
      most_ = std::max(most_, n_real_[b] * group_);
      for (int64_t h = 0; h < a_.kv_heads; ++h) {
        lengths_.push_back(check_pages(b, h));
        work += lengths_.back() * ceil_div(n_real_[b] * group_, kMaxQueries);
      }
    }
    const int64_t part_rows = std::max(kPartRows, ceil_div(ceil_div(work, kTasks), kTileRows) * kTileRows);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < a_.kv_heads; ++h) cut(b, h, part_rows);
  }

  const std::vector<Unit>& units() const { return units_; }
  const std::vector<Task>& tasks() const { return tasks_; }
  int64_t parts() const { return int64_t(tasks_.size()); }
  int64_t most_queries() const { return most_; }  // of a KV head
  int64_t token_of(const Unit& unit, int64_t query) const { return first_[unit.b] + (unit.query0 + query) / group_; }
  int64_t head_of(const Unit& unit, int64_t query) const { return unit.kv_head * group_ + (unit.query0 + query) % group_; }
  bool is_real(int64_t b, int64_t token) const { return token >= first_[b] && token < first_[b] + n_real_[b]; }
  Pages pages_of(int64_t b, int64_t h) const {
    const int64_t at = (b * a_.kv_heads + h) * a_.pages;
    return {a_.starts + at, a_.counts + at};
  }

  // the query sees so many listed rows
  int64_t sees(const Unit& unit, int64_t query) const {
    const int64_t length = lengths_[unit.b * a_.kv_heads + unit.kv_head];
    const int64_t later = n_real_[unit.b] - 1 - (unit.query0 + query) / group_;
    return a_.causal ? std::max<int64_t>(length - later, 0) : length;
  }

 private:
  // how many rows the pages of a KV head hold, once they are known to lie inside the store
  int64_t check_pages(int64_t b, int64_t h) const {
    const Pages pages = pages_of(b, h);
    const int64_t stored = a_.k.count;
    int64_t length = 0, wrong = 0;
    for (int64_t p = 0; p < a_.pages; ++p) {
      const int64_t start = pages.starts[p], count = pages.counts[p];
      wrong |= (count < 0) | ((count > 0) & ((start < 0) | (start > stored - count)));
      length += count;
    }
    for (int64_t p = 0; wrong && p < a_.pages; ++p) {
      const int64_t start = pages.starts[p], count = pages.counts[p];
      SA_CHECK(count == 0 || (count > 0 && start >= 0 && start <= stored - count), "page [", b, ", ", h, ", ", p, "] holds ", count,
               " rows from row ", start, " on, but the store has ", stored, " rows; starts and counts must name stored rows");
    }
    return length;
  }

  void cut(int64_t b, int64_t h, int64_t part_rows) {
    const int64_t queries = n_real_[b] * group_, length = lengths_[b * a_.kv_heads + h];
    const Pages pages = pages_of(b, h);
    std::vector<Place> places{{0, 0}};
    for (int64_t p = 0, before = 0; p < a_.pages && length > part_rows; before += pages.counts[p++])
      for (int64_t row; (row = int64_t(places.size()) * part_rows) < before + pages.counts[p];) places.push_back({p, row - before});
    for (int64_t query = 0; query < queries; query += kMaxQueries) {
      Unit unit{b, h, query, std::min<int64_t>(kMaxQueries, queries - query), parts(), 0};
      const int64_t seen = sees(unit, unit.queries - 1);
      do {
        const int64_t row0 = unit.parts * part_rows;
        tasks_.push_back({int64_t(units_.size()), row0, std::min(part_rows, seen - row0), places[unit.parts]});
      } while (++unit.parts * part_rows < seen);
      units_.push_back(unit);
    }
  }

  const PagedAttention& a_;
  const int64_t group_;
  std::vector<int64_t> first_, n_real_, lengths_;  // [B], [B], [B, Hkv]
  int64_t most_ = 0;
  std::vector<Unit> units_;
  std::vector<Task> tasks_;
};

template <class Element, int R>
class Worker {
  using Storage = typename Element::Storage;
  static constexpr int kRows = kLanes / R;  // a register of logits: lane r * kRows + j is query r and row j
  static constexpr int kGroups = kTileRows / kRows;
  static constexpr int kValueVecs = (kLanes == 16 ? 16 : 8) / R;  // sums in registers beside their operands

 public:
  Worker(const PagedAttention& args, const Plan& plan)
      : a_(args),
        plan_(plan),
        d_(args.k.width),
        dv_(args.v.width),
        q_lanes_(registers(d_) * kLanes),
        o_lanes_(registers(dv_) * kLanes),
        cap_(args.softcap > 0 ? float(args.softcap * kLog2E) : 0.0f),
        factor_(float(args.softcap > 0 ? args.scale / args.softcap : args.scale * double(kLog2E))) {
    const auto floats = Scratch::bytes_for<float>;
    Scratch& scratch = Scratch::mine();
    scratch.reset(floats(kMaxQueries * q_lanes_) + 3 * floats(kMaxQueries / R * kLanes) + 2 * floats(kTileRows * R) +
                  floats(std::max(d_, dv_)));
    q_ = scratch.take<float>(kMaxQueries * q_lanes_);
    m_ = scratch.take<float>(kMaxQueries / R * kLanes);
    l_ = scratch.take<float>(kMaxQueries / R * kLanes);
    sees_ = scratch.take<int32_t>(kMaxQueries / R * kLanes);
    s_ = scratch.take<float>(kTileRows * R);
    bias_ = scratch.take<float>(kTileRows * R);
    row_ = scratch.take<float>(std::max(d_, dv_));
  }

  void run(const Task& task, const Part& part) {
    const Unit& unit = plan_.units()[task.unit];
    const int panels = int(ceil_div(unit.queries, R));
    for (int i = 0; i < panels * R; ++i) pack(task, unit, i);
    std::memset(part.o, 0, panels * R * o_lanes_ * sizeof(float));
    std::fill(m_, m_ + panels * kLanes, kNoSink);
    std::fill(l_, l_ + panels * kLanes, 0.0f);
    Walk walk(plan_.pages_of(unit.b, unit.kv_head), task.place, task.rows);
    int64_t tiles[2][kTileRows];
    int n = walk.take(tiles[0]);
    for (int64_t row = 0, tile = 0; n; row += kTileRows, tile ^= 1) {
      const int next = walk.take(tiles[tile ^ 1]);
      if (a_.bias) load_bias(tiles[tile]);
      for (int panel = 0; panel < panels; ++panel)
        attend(panel, row, n, tiles[tile], panel == 0 && next ? tiles[tile ^ 1] : nullptr, part.o + panel * R * o_lanes_);
      n = next;
    }
    for (int64_t i = 0; i < unit.queries; ++i) {
      const int64_t lane = i / R * kLanes + i % R * kRows;
      part.m[i] = m_[lane], part.l[i] = 0;
      for (int j = 0; j < kRows; ++j) part.l[i] += l_[lane + j];
    }
  }

  // the parts of a unit become its output
  void finish(const Unit& unit, const Part* parts) {
    Storage* out = static_cast<Storage*>(a_.out.data) + unit.b * a_.out.stride[0];
    for (int64_t i = 0; i < unit.queries; ++i) {
      const int64_t head = plan_.head_of(unit, i), token = plan_.token_of(unit, i);
      const float sink = a_.sinks ? std::max(a_.sinks[head] * kLog2E, kNoSink) : kNoSink;
      float m = sink, l, factor;
      for (int64_t p = 0; p < unit.parts; ++p) m = std::max(m, parts[p].m[i]);
      l = sink == kNoSink ? 0.0f : std::exp2(sink - m);
      for (int64_t p = 0; p < unit.parts; ++p) {
        parts[p].m[i] = std::exp2(parts[p].m[i] - m);  // from here on the weight of the part
        l += parts[p].m[i] * parts[p].l[i];
      }
      finish_lanes(&m, &l, 1, &factor, a_.lse + (unit.b * a_.q.size[1] + head) * a_.q.size[2] + token);
      for (int64_t c = 0; c < registers(dv_); ++c) {
        F32 total{};
        for (int64_t p = 0; p < unit.parts; ++p) total += load(parts[p].o + i * o_lanes_ + c * kLanes) * parts[p].m[i];
        store(row_ + channel_of(c, dv_), total * factor);
      }
      write_row<Element>(out + head * a_.out.stride[1] + token * a_.out.stride[2], a_.out.stride[3], dv_, row_);
    }
  }

 private:
  // query i of a unit: scaled, by registers of channels next to the other queries of its panel; what stands twice is 0 once
  void pack(const Task& task, const Unit& unit, int64_t i) {
    float* to = q_ + i / R * R * q_lanes_ + i % R * kLanes;
    const int64_t query = std::min(i, unit.queries - 1);
    read_row<Element>(static_cast<const Storage*>(a_.q.data) + unit.b * a_.q.stride[0] +
                          plan_.head_of(unit, query) * a_.q.stride[1] + plan_.token_of(unit, query) * a_.q.stride[2],
                      a_.q.stride[3], d_, row_);
    for (int64_t c = 0; c < registers(d_); ++c) {
      const int32_t twice = int32_t(c * kLanes - channel_of(c, d_));
      store(to + c * R * kLanes, lane_numbers() < twice ? F32{} : load(row_ + channel_of(c, d_)) * factor_);
    }
    const int64_t sees = std::clamp<int64_t>(plan_.sees(unit, query) - task.row0, 0, task.rows);
    std::fill_n(sees_ + i / R * kLanes + i % R * kRows, kRows, int32_t(sees));
  }

  void load_bias(const int64_t* rows) {
    for (int i = 0; i < kTileRows; ++i)
      for (int r = 0; r < R; ++r) bias_[i / kRows * kLanes + r * kRows + i % kRows] = a_.bias[rows[i]] * kLog2E;
  }

  // R queries against the n rows of a tile, which begins `row` rows into the part; next: rows to fetch meanwhile, or null
  void attend(int panel, int64_t row, int n, const int64_t* rows, const int64_t* next, float* o) {
    const int32_t *sees = sees_ + panel * kLanes, last = sees[kLanes - 1];
    if (last <= row) return;
    const int groups = int(ceil_div(std::min<int64_t>(n, last - row), kRows));
    float *m = m_ + panel * kLanes, *l = l_ + panel * kLanes, keep[kLanes];
    scores(q_ + panel * R * q_lanes_, rows, groups, next);
    F32 top = load(m);
    for (int g = 0; g < groups; ++g) {
      F32 x = load(s_ + g * kLanes);
      if (cap_ > 0) x = tanh_lanes(x) * cap_;
      if (a_.bias) x += load(bias_ + g * kLanes);
      if (row + (g + 1) * kRows > sees[0]) x = hide(x, row + g * kRows, sees);
      store(s_ + g * kLanes, x);
      top = max(x, top);
    }
    top = joined<kRows>(top, [](F32 a, F32 b) { return max(a, b); });
    const F32 kept = exp2_nonpositive(load(m) - top);
    F32 total = load(l) * kept;
    for (int g = 0; g < groups; ++g) {
      const F32 p = exp2_nonpositive(load(s_ + g * kLanes) - top);
      store(s_ + g * kLanes, p);
      total += p;
    }
    store(m, top), store(l, total), store(keep, kept);
    values_from<kValueVecs>(0, rows, groups, keep, next, o);
  }

  // lanes whose query does not see row `row` of the part, or whichever follows it in the group, become -inf
  static SA_INLINE F32 hide(F32 x, int64_t row, const int32_t* sees) {
    I32 limit;
    std::memcpy(&limit, sees, sizeof limit);
    return (lane_numbers() & (kRows - 1)) + int32_t(row) < limit ? x : splat(-std::numeric_limits<float>::infinity());
  }

  // the rows of a group in the next tile; to L2, where the hardware takes over
  static SA_INLINE void fetch(const Storage* base, const int64_t* next, int64_t stride, int64_t width) {
    for (int j = 0; j < kRows; ++j) {
      const char* at = reinterpret_cast<const char*>(base + next[j] * stride);
      for (int64_t byte = 0; byte < width * int64_t(sizeof(Storage)); byte += 64) __builtin_prefetch(at + byte, 0, 2);
    }
  }

  // s[group][lane]: dot products of R queries and the rows
  void scores(const float* q, const int64_t* rows, int groups, const int64_t* next) {
    const Storage* keys = static_cast<const Storage*>(a_.k.data);
    for (int g = 0; g < groups; ++g, rows += kRows) {
      const Storage* key[kRows];
      for (int j = 0; j < kRows; ++j) key[j] = keys + rows[j] * a_.k.stride;
      if (next) fetch(keys, next + g * kRows, a_.k.stride, d_);
      F32 c[kLanes] = {};
      const float* from = q;
      for (int64_t i = 0; i < d_; i += kLanes, from += R * kLanes) {
        const int64_t at = std::min(i, d_ - kLanes);
        F32 y[R];
        #pragma GCC unroll 4
        for (int r = 0; r < R; ++r) y[r] = load(from + r * kLanes);
        #pragma GCC unroll 16
        for (int j = 0; j < kRows; ++j) {
          const F32 x = Element::load(key[j] + at);
          #pragma GCC unroll 4
          for (int r = 0; r < R; ++r) c[r * kRows + j] += x * y[r];
        }
      }
      store(s_ + g * kLanes, sums(c));
    }
  }

  // o[query][lane] = o * keep + sum of values by their probabilities; C registers of channels at a time
  template <int C>
  void values_from(int64_t c, const int64_t* rows, int groups, const float* keep, const int64_t* next, float* o) {
    for (; c + C <= registers(dv_); c += C) values<C>(c, rows, groups, keep, c ? nullptr : next, o);
    if constexpr (C > 1) values_from<C / 2>(c, rows, groups, keep, c ? nullptr : next, o);
  }

  template <int C>
  void values(int64_t c0, const int64_t* rows, int groups, const float* keep, const int64_t* next, float* o) {
    const Storage* base = static_cast<const Storage*>(a_.v.data);
    int64_t channel[C];
    F32 c[R][C];
    #pragma GCC unroll 16
    for (int i = 0; i < C; ++i) {
      channel[i] = channel_of(c0 + i, dv_);
      #pragma GCC unroll 4
      for (int r = 0; r < R; ++r) c[r][i] = load(o + r * o_lanes_ + (c0 + i) * kLanes) * keep[r * kRows];
    }
    const float* p = s_;
    for (int g = 0; g < groups; ++g, rows += kRows, p += kLanes) {
      if (next) fetch(base, next + g * kRows, a_.v.stride, dv_);
      #pragma GCC unroll 16
      for (int j = 0; j < kRows; ++j) {
        const Storage* value = base + rows[j] * a_.v.stride;
        F32 x[C];
        #pragma GCC unroll 16
        for (int i = 0; i < C; ++i) x[i] = Element::load(value + channel[i]);
        #pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          #pragma GCC unroll 16
          for (int i = 0; i < C; ++i) c[r][i] += x[i] * p[r * kRows + j];
      }
    }
    #pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      #pragma GCC unroll 16
      for (int i = 0; i < C; ++i) store(o + r * o_lanes_ + (c0 + i) * kLanes, c[r][i]);
  }

  const PagedAttention& a_;
  const Plan& plan_;
  const int64_t d_, dv_, q_lanes_, o_lanes_;
  const float cap_, factor_;
  float *q_, *m_, *l_;  // [panel][channels][R][lane], [panel][lane] twice
  int32_t* sees_;       // [panel][lane] rows of the part that the query sees
  float *s_, *bias_;    // [group][lane] of a tile
  float* row_;          // of q or of the output
};

template <class Element>
void clear_padding(const PagedAttention& a, const Plan& plan) {
  const std::vector<float> zeros(a.out.size[3]);
  for (int64_t b = 0; b < a.q.size[0]; ++b)
    for (int64_t token = 0; token < a.q.size[2]; ++token)
      for (int64_t h = 0; h < a.q.size[1] && !plan.is_real(b, token); ++h) {
        a.lse[(b * a.q.size[1] + h) * a.q.size[2] + token] = -std::numeric_limits<float>::infinity();
        write_row<Element>(static_cast<typename Element::Storage*>(a.out.data) + b * a.out.stride[0] + h * a.out.stride[1] +
                               token * a.out.stride[2],
                           a.out.stride[3], a.out.size[3], zeros.data());
      }
}

template <class Element, int R>
void attend(const PagedAttention& args, const Plan& plan, const Parallel& parallel) {
  // what the queries of a task may need; whole panels
  const int64_t queries = std::min<int64_t>(ceil_div(plan.most_queries(), R) * R, kMaxQueries);
  const int64_t lanes = registers(args.v.width) * kLanes, size = queries * (lanes + 2);
  const std::unique_ptr<float[]> found(new float[plan.parts() * size]);
  std::vector<Part> parts(plan.parts());
  for (int64_t i = 0; i < plan.parts(); ++i) {
    float* o = found.get() + i * size;
    parts[i] = {o, o + queries * lanes, o + queries * (lanes + 1)};
  }
  parallel_tasks(parallel, plan.parts(), [&](TaskQueue& queue) {
    Worker<Element, R> worker(args, plan);
    for (int64_t t; queue.take(&t);) worker.run(plan.tasks()[t], parts[t]);
  });
  parallel_tasks(parallel, int64_t(plan.units().size()), [&](TaskQueue& queue) {
    Worker<Element, R> worker(args, plan);
    for (int64_t u; queue.take(&u);) worker.finish(plan.units()[u], parts.data() + plan.units()[u].part0);
  });
}

}  // namespace

void paged_attention(const PagedAttention& args, const Parallel& parallel) {
  const Plan plan(args);
  with_element(args.q.dtype, [&](auto element) {
    using Element = decltype(element);
    clear_padding<Element>(args, plan);
    if (plan.most_queries() == 1) attend<Element, 1>(args, plan, parallel);
    else if (plan.most_queries() == 2) attend<Element, 2>(args, plan, parallel);
    else attend<Element, 4>(args, plan, parallel);
  });
}

}  // namespace SA_NAMESPACE
