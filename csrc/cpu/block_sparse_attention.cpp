// Attention over block lists, in the transposed form S^T = K Q^T, O^T = V^T P: the lanes of a vector are queries, so the running
// maximum, the sum and the rescale are plain vector operations and nothing is ever summed across a register.
//
// A task is one query block of one head, cut at the first dense row. Its queries are packed once as panels of kPanel lanes; the
// keys it reads are taken in tiles of up to kTileKeys, gathered from what the plan names with keys that no query of the task can
// see left out. The engine knows the number format of the tiles; the loop below knows positions, masks and the softmax.
#include "../checks.h"
#include "../spans.h"
#include "attention_simd.h"
#if defined(SA_AMX)
#include "attention_amx.h"
#endif

#include <limits>
#include <vector>

namespace SA_NAMESPACE {
namespace {

// more query rows than this in one task fall out of L2
constexpr int64_t kMaxRows = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Task {
  int64_t b, h, block, row0, rows;  // rows of the query block, counted from the first real query
  bool dense;
};

// The keys of one tile: runs of consecutive keys, ascending. Positions count from the first real key.
template <int kTileKeys>
struct Tile {
  Run runs[kTileKeys];
  int n_runs, keys;
  int64_t position[kTileKeys];
  int64_t window;  // of these keys, in tokens; 0 for none
};

// keys [start, end)
struct Range {
  int64_t start, end;
};

// Keys named in one way: units of `width` keys each, ascending, and two ranges.
struct Layer {
  const int32_t* units = nullptr;
  int64_t count = 0, width = 1;
  Range ranges[2] = {};
  int64_t unit = 0;  // units before this one were passed

  // its first keys at or after x, without a gap between them; x does not fall from call to call
  Range at(int64_t x) {
    constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
    while (unit < count && (units[unit] + 1) * width <= x) ++unit;
    Range found{kNone, kNone};
    if (unit < count) found = {std::max(units[unit] * width, x), (units[unit] + 1) * width};
    for (const Range& range : ranges) {
      const int64_t start = std::max(range.start, x);
      const bool sooner = start < found.start || (start == found.start && range.end > found.end);
      if (start < range.end && sooner) found = {start, range.end};
    }
    return found;
  }
};

// What a task reads; keys of a layer that an earlier one has are read there. Long runs come first and stay aligned for the
// engine, then single keys, then the edge: keys that are local to some queries of the task but not to all.
struct Reading {
  static constexpr int kLayers = 3;
  Layer layers[kLayers];
  Range keys;            // what any query of the task may see
  const int32_t* order;  // key of each slot, or null; the first layer then names slots
  int64_t slots, window, edge_window;
};

// walks the keys of a task, tile by tile; a tile is of one layer
template <int kTileKeys>
class Reader {
 public:
  explicit Reader(const Reading& reading) : r_(reading), x_(r_.order ? 0 : r_.keys.start) {}

  bool next(Tile<kTileKeys>* tile) {
    tile->n_runs = tile->keys = 0;
    while (layer_ < Reading::kLayers) {
      const Range found = unread();
      if (found.start >= found.end) {
        if (tile->keys) break;
        ++layer_, x_ = r_.keys.start;
        for (Layer& layer : r_.layers) layer.unit = 0;
      } else if (r_.order) {
        gather(found, tile);
      } else {
        const int64_t n = std::min<int64_t>(found.end - found.start, kTileKeys - tile->keys);
        for (int64_t i = 0; i < n; ++i) tile->position[tile->keys + i] = found.start + i;
        append(tile, found.start, n);
        tile->keys += int(n);
        x_ = found.start + n;
      }
      if (tile->keys == kTileKeys) break;
    }
    if (r_.order)
      for (int i = 0; i < tile->keys; ++i) append(tile, tile->position[i], 1);
    tile->window = layer_ < Reading::kLayers - 1 ? r_.window : r_.edge_window;
    return tile->keys > 0;
  }

 private:
  // the next keys of this layer that no earlier layer has
  Range unread() {
    const int64_t end = r_.order ? r_.slots : r_.keys.end;
    for (;;) {
      Range found = r_.layers[layer_].at(x_);
      found.end = std::min(found.end, end);
      int64_t covered = found.start;
      for (int i = 0; i < layer_ && found.start < found.end; ++i) {
        const Range before = r_.layers[i].at(found.start);
        if (before.start == found.start)
          covered = std::max(covered, before.end);
        else
          found.end = std::min(found.end, before.start);
      }
      if (covered == found.start) return found;
      x_ = covered;
    }
  }

  // keys of the slots, merged into the tile by position: each block of slots is sorted
  void gather(const Range& slots, Tile<kTileKeys>* tile) {
    const int had = tile->keys;
    for (x_ = slots.start; x_ < slots.end && tile->keys < kTileKeys; ++x_) {
      const int64_t key = r_.order[x_];
      if (key >= r_.keys.start && key < r_.keys.end) tile->position[tile->keys++] = key;
    }
    std::inplace_merge(tile->position, tile->position + had, tile->position + tile->keys);
  }

  static void append(Tile<kTileKeys>* tile, int64_t start, int64_t n) {
    Run* last = tile->runs + tile->n_runs - 1;
    if (tile->n_runs && last->start + last->keys == start)
      last->keys += n;
    else
      tile->runs[tile->n_runs++] = {start, n};
  }

  Reading r_;
  int layer_ = 0;
  int64_t x_;
};

// logits of a tile against one panel, in place: times factor, softcap, then -inf where a query may not see a key
template <int kVecs>
void mask_logits(float* s, int keys, const int64_t* position, int64_t q_position, bool causal, int64_t window, float factor,
                 float softcap) {
  constexpr int kPanel = kVecs * kLanes;
  const float hidden = -std::numeric_limits<float>::infinity();
  for (int i = 0; i < keys; ++i)
    for (int v = 0; v < kVecs; ++v) {
      float* at = s + int64_t(i) * kPanel + v * kLanes;
      F32 x = load(at) * factor;
      if (softcap > 0) x = tanh_lanes(x) * (softcap * kLog2E);
      if (causal) {
        // distance from the key to the panel's first query; lanes are queries, so lane numbers add to it
        const int64_t back = std::clamp<int64_t>(q_position - position[i], -(1 << 30), 1 << 30);
        const I32 distance = lane_numbers() + int32_t(back + v * kLanes);
        x = distance < 0 ? splat(hidden) : x;
        if (window) x = distance >= int32_t(std::min<int64_t>(window, (1 << 30) + kPanel)) ? splat(hidden) : x;
      }
      store(at, x);
    }
}

template <class Engine>
class Attention {
 public:
  Attention(const BlockSparseAttention& a) : a_(a) {}

  void run(const Parallel& parallel) {
    plan();
    if (a_.order) sort_order(parallel);
    const int64_t pad_tasks = a_.q.size[0] * a_.q.size[1];
    Engine::prepare(a_, spans_.data(), run_keys_, parallel, &prepared_);
    parallel_tasks(parallel, int64_t(tasks_.size()) + pad_tasks, [&](TaskQueue& queue) {
      [[maybe_unused]] const typename Engine::Guard guard;
      Engine engine(a_, prepared_, rows_per_task_);
      for (int64_t t; queue.take(&t);) {
        if (t < int64_t(tasks_.size()))
          attend(engine, tasks_[t]);
        else
          fill_padding((t - int64_t(tasks_.size())) / a_.q.size[1], (t - int64_t(tasks_.size())) % a_.q.size[1]);
      }
    });
  }

 private:
  static constexpr int kVecs = Engine::kVecs, kPanel = Engine::kPanel, kTileKeys = Engine::kTileKeys;

  const int32_t* blocks_of(int64_t b, int64_t list, int64_t block, int64_t* count) const {
    const int64_t at = (b * a_.lists + list) * a_.q_blocks + block;
    *count = a_.counts[at];
    return a_.indices + at * a_.slots;
  }

  int64_t list_of(int64_t h) const { return h / (a_.q.size[1] / a_.lists); }

  // the columns of a head and how many there are
  const int32_t* columns_of(int64_t b, int64_t h, int64_t* count) const {
    *count = 0;
    if (!a_.columns) return nullptr;
    const int64_t at = b * a_.column_lists + h / (a_.q.size[1] / a_.column_lists);
    *count = columns_[at];
    return a_.columns + at * a_.column_slots;
  }

  // at most so many keys are read by a task
  int64_t length_of(const Task& task) const {
    const Span& span = spans_[task.b];
    const int64_t reach = a_.causal ? std::min(span.n_k, span.q_start + task.row0 + task.rows) : span.n_k;
    if (task.dense) return reach;
    int64_t blocks = 0, columns = 0, near = 0;
    blocks_of(task.b, list_of(task.h), task.block, &blocks);
    columns_of(task.b, task.h, &columns);
    if (a_.near) near = std::max(a_.near[2 * task.h], 0) + std::max<int64_t>(a_.near[2 * task.h + 1], 0) + task.rows;
    return std::min(blocks * a_.block_k + columns + near, reach);
  }

  // tasks, longest first, the heads of a group next to each other so that their keys are still in cache
  void plan() {
    const int64_t batch = a_.q.size[0], heads = a_.q.size[1], group = heads / a_.k.size[1];
    const int64_t k_blocks = ceil_div(a_.k.size[2], a_.block_k);
    struct Group {
      int64_t length;
      Task first;  // of the group's first head
    };
    std::vector<Group> groups;
    rows_per_task_ = std::min({a_.block_q, kMaxRows, std::max<int64_t>(a_.q.size[2], 1)});
    for (int64_t b = 0; b < batch; ++b) {
      spans_.push_back(span_of(b, a_.q.size[2], a_.k.size[2], a_.q_start, a_.causal, a_.padding));
      const int64_t n_q = spans_[b].n_q, dense_from = std::max<int64_t>(n_q - a_.dense_rows, 0);
      for (int64_t list = 0; list < a_.lists; ++list)
        for (int64_t i = 0; i < ceil_div(n_q, a_.block_q); ++i) check_list(b, list, i, k_blocks);
      for (int64_t list = 0; a_.columns && list < a_.column_lists; ++list) columns_.push_back(check_columns(b, list));
      for (int64_t kv_head = 0; a_.order && kv_head < a_.k.size[1]; ++kv_head) check_order(b, kv_head);
      for (int64_t kv_head = 0; kv_head < a_.k.size[1]; ++kv_head)
        for (int64_t row = 0, end; row < n_q; row = end) {
          const int64_t block = row / a_.block_q;
          end = std::min({row + rows_per_task_, (block + 1) * a_.block_q, row < dense_from ? dense_from : n_q});
          Group g{0, {b, kv_head * group, block, row, end - row, row >= dense_from}};
          for (Task task = g.first; task.h < (kv_head + 1) * group; ++task.h) g.length += length_of(task);
          groups.push_back(g);
          if (g.first.dense || !a_.order) run_keys_ += g.length;
        }
    }
    std::stable_sort(groups.begin(), groups.end(), [](const Group& x, const Group& y) { return x.length > y.length; });
    for (const Group& g : groups)
      for (Task task = g.first; task.h < g.first.h + group; ++task.h) tasks_.push_back(task);
  }

  // before anything is written: a kernel must not follow a bad list
  void check_list(int64_t b, int64_t list, int64_t block, int64_t k_blocks) const {
    int64_t count = 0;
    const int32_t* blocks = blocks_of(b, list, block, &count);
    SA_CHECK(count >= 0 && count <= a_.slots, "counts[", b, ", ", list, ", ", block, "] is ", count, " but there are ", a_.slots,
             " slots; counts must be 0..slots");
    int32_t previous = -1, rising = 1;
    for (int64_t s = 0; s < count; ++s) rising &= blocks[s] > previous, previous = blocks[s];
    if (rising && previous < k_blocks) return;
    previous = -1;
    for (int64_t s = 0; s < count; previous = blocks[s++]) {
      SA_CHECK(blocks[s] >= 0 && blocks[s] < k_blocks, "indices[", b, ", ", list, ", ", block, ", ", s, "] is ", blocks[s], " but ",
               a_.k.size[2], " keys make ", k_blocks, " blocks of ", a_.block_k);
      SA_CHECK(blocks[s] > previous, "indices[", b, ", ", list, ", ", block, ", ", s, "] is ", blocks[s], " after ", previous,
               "; block numbers must ascend");
    }
  }

  // how many columns the list has, once they are known to be good
  int64_t check_columns(int64_t b, int64_t list) const {
    const int32_t* columns = a_.columns + (b * a_.column_lists + list) * a_.column_slots;
    int64_t count = 0;
    for (int32_t i = 0, before = -1; i < a_.column_slots; before = columns[i++]) {
      const bool ends = columns[i] == -1, goes_on = count == i && columns[i] > before && columns[i] < spans_[b].n_k;
      SA_CHECK(ends || goes_on, "columns[", b, ", ", list, ", ", i, "] is ", columns[i], "; columns must ascend below the ",
               spans_[b].n_k, " real keys of batch row ", b, " and be -1 after the last");
      count += !ends;
    }
    return count;
  }

  void check_order(int64_t b, int64_t kv_head) const {
    const int32_t* order = a_.order + (b * a_.k.size[1] + kv_head) * a_.k.size[2];
    const int64_t n_k = spans_[b].n_k;
    std::vector<bool> found(n_k);
    for (int64_t s = 0; s < n_k; ++s) {
      const bool fresh = order[s] >= 0 && order[s] < n_k && !found[order[s]];
      SA_CHECK(fresh, "order is not a permutation of the ", n_k, " real keys of batch row ", b, "; each must stand in one slot");
      found[order[s]] = true;
    }
  }

  // a copy of the order with the keys of each block ascending: which slot of its block holds a key says nothing
  void sort_order(const Parallel& parallel) {
    const int64_t batch = a_.k.size[0], kv_heads = a_.k.size[1], n_k = a_.k.size[2];
    order_.assign(a_.order, a_.order + batch * kv_heads * n_k);
    parallel_tasks(parallel, batch * kv_heads, [&](TaskQueue& queue) {
      for (int64_t t; queue.take(&t);) {
        int32_t* slots = order_.data() + t * n_k;
        const int64_t real = spans_[t / kv_heads].n_k;
        for (int64_t at = 0; at < real; at += a_.block_k) std::sort(slots + at, slots + std::min(at + a_.block_k, real));
      }
    });
  }

  Reading reading_of(const Task& task, int64_t first_position, int64_t last_position) const {
    constexpr int64_t kAlign = Engine::kAlign;
    const Span& span = spans_[task.b];
    Reading reading{};
    auto& [runs, single, edge] = reading.layers;
    reading.window = a_.window;
    reading.keys.start = a_.causal && a_.window ? std::max<int64_t>(first_position - a_.window + 1, 0) / kAlign * kAlign : 0;
    reading.keys.end = a_.causal ? std::min(span.n_k, last_position + 1) : span.n_k;
    if (task.dense) {
      runs.ranges[0] = {0, span.n_k};
      return reading;
    }
    runs.units = blocks_of(task.b, list_of(task.h), task.block, &runs.count), runs.width = a_.block_k;
    single.units = columns_of(task.b, task.h, &single.count);
    if (a_.order) {
      reading.order = order_.data() + (task.b * a_.k.size[1] + task.h / (a_.q.size[1] / a_.k.size[1])) * a_.k.size[2];
      reading.slots = span.n_k;
    }
    if (a_.near) {
      const int64_t sink = std::max(a_.near[2 * task.h], 0), local = std::max(a_.near[2 * task.h + 1], 0);
      // every query of the task is local to the keys from here on
      const int64_t oldest = std::max<int64_t>(last_position - local + 1, 0);
      const int64_t common = std::min(ceil_div(oldest, kAlign) * kAlign, last_position + 1);
      runs.ranges[0] = {0, sink / kAlign * kAlign}, single.ranges[0] = {sink / kAlign * kAlign, sink};
      if (local) {
        runs.ranges[1] = {common, last_position + 1};
        edge.ranges[0] = {std::max<int64_t>(first_position - local + 1, 0) / kAlign * kAlign, common};
        reading.edge_window = a_.window ? std::min(a_.window, local) : local;
      }
    }
    return reading;
  }

  void attend(Engine& engine, const Task& task) {
    const Span& span = spans_[task.b];
    const int64_t first_position = span.q_start + task.row0, last_position = first_position + task.rows - 1;
    const int panels = int(ceil_div(task.rows, kPanel));
    // the softmax wants logits in base 2, the softcap s / cap; the mask multiplies where the engine cannot
    double factor = a_.softcap > 0 ? a_.scale / a_.softcap : a_.scale * double(kLog2E);
    const bool by_mask = Engine::kScalesLate && (a_.softcap > 0 || factor <= 0);
    const float mask_factor = by_mask ? float(factor) : 1.0f;
    if (by_mask) factor = 1;
    engine.begin(task.b, task.h, span, task.row0, task.rows, float(factor),
                 a_.sinks ? std::max(a_.sinks[task.h] * kLog2E, kNoSink) : kNoSink);
    Reader<kTileKeys> reader(reading_of(task, first_position, last_position));
    Tile<kTileKeys> tile;
    while (reader.next(&tile)) {
      engine.load_tile(tile.runs, tile.n_runs, tile.keys);
      for (int panel = 0; panel < panels; ++panel) {
        const int64_t position = first_position + panel * kPanel;
        const int64_t last = std::min(position + kPanel - 1, last_position);
        int keys = tile.keys;
        if (a_.causal)
          while (keys && tile.position[keys - 1] > last) --keys;
        if (!keys) continue;
        engine.attend(panel, keys, [&](float* s, int from, int n) {
          const bool late = a_.causal && tile.position[from + n - 1] > position;
          const bool early = a_.causal && tile.window && tile.position[from] <= last - tile.window;
          if (late || early || by_mask || a_.softcap > 0)
            mask_logits<kVecs>(s, n, tile.position + from, position, a_.causal, tile.window, mask_factor, float(a_.softcap));
        });
      }
    }
    engine.finish(span.row0 + task.row0, task.rows, a_.lse + (task.b * a_.q.size[1] + task.h) * a_.q.size[2]);
  }

  // rows of the tensor that are padding: out 0, lse -inf
  void fill_padding(int64_t b, int64_t h) {
    const Span& span = spans_[b];
    const size_t item = a_.out.dtype == DType::fp32 ? 4 : 2;
    float* lse = a_.lse + (b * a_.q.size[1] + h) * a_.q.size[2];
    for (int64_t row = 0; row < a_.q.size[2]; ++row) {
      if (row == span.row0 && span.n_q) row += span.n_q;
      if (row >= a_.q.size[2]) break;
      lse[row] = -std::numeric_limits<float>::infinity();
      char* at = static_cast<char*>(a_.out.data) + (b * a_.out.stride[0] + h * a_.out.stride[1] + row * a_.out.stride[2]) * item;
      for (int64_t d = 0; d < a_.out.size[3]; ++d) std::memset(at + d * a_.out.stride[3] * item, 0, item);
    }
  }

  const BlockSparseAttention& a_;
  std::vector<Span> spans_;
  std::vector<Task> tasks_;
  std::vector<int64_t> columns_;  // how many each list of columns has
  std::vector<int32_t> order_;
  int64_t rows_per_task_ = 0, run_keys_ = 0;
  typename Engine::Prepared prepared_;
};

}  // namespace

void block_sparse_attention(const BlockSparseAttention& args, const Parallel& parallel) {
#if defined(SA_AMX)
  switch (args.q.dtype) {
    case DType::bf16: return Attention<AmxEngine<Bf16, 1>>(args).run(parallel);
    case DType::fp16: return Attention<AmxEngine<Fp16, 2>>(args).run(parallel);
    case DType::fp32: return Attention<AmxEngine<Fp32, 3>>(args).run(parallel);
  }
#else
  with_element(args.q.dtype, [&](auto element) { Attention<SimdEngine<decltype(element)>>(args).run(parallel); });
#endif
}

}  // namespace SA_NAMESPACE
