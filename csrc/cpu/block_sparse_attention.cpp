// Attention over block lists, in the transposed form S^T = K Q^T, O^T = V^T P: the lanes of a vector are queries, so the running
// maximum, the sum and the rescale are plain vector operations and nothing is ever summed across a register.
//
// A task is one query block of one head. Its queries are packed once as panels of kPanel lanes; the keys it reads are taken in
// tiles of up to kTileKeys, gathered from the listed blocks with keys that no query of the task can see left out. The engine
// knows the number format of the tiles; the loop below knows positions, masks and the softmax.
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
};

// The keys of one tile: runs of consecutive keys, ascending. Positions count from the first real key.
template <int kTileKeys>
struct Tile {
  Run runs[kTileKeys];
  int n_runs, keys;
  int64_t position[kTileKeys];
};

// walks the listed blocks of a task, tile by tile
template <int kTileKeys>
class Reader {
 public:
  Reader(const int32_t* blocks, int64_t count, int64_t block_k, int64_t low, int64_t high)
      : blocks_(blocks), count_(count), block_k_(block_k), low_(low), high_(high) {}

  bool next(Tile<kTileKeys>* tile) {
    tile->n_runs = tile->keys = 0;
    while (slot_ < count_ && tile->keys < kTileKeys) {
      const int64_t start = std::max(blocks_[slot_] * block_k_, low_) + done_;
      const int64_t end = std::min((blocks_[slot_] + 1) * block_k_, high_);
      const int64_t n = std::min<int64_t>(end - start, kTileKeys - tile->keys);
      if (n <= 0) {
        ++slot_, done_ = 0;
        continue;
      }
      if (tile->n_runs && tile->runs[tile->n_runs - 1].start + tile->runs[tile->n_runs - 1].keys == start)
        tile->runs[tile->n_runs - 1].keys += n;
      else
        tile->runs[tile->n_runs++] = {start, n};
      for (int64_t i = 0; i < n; ++i) tile->position[tile->keys + i] = start + i;
      tile->keys += int(n);
      done_ += n;
    }
    return tile->keys > 0;
  }

 private:
  const int32_t* blocks_;
  const int64_t count_, block_k_, low_, high_;
  int64_t slot_ = 0, done_ = 0;
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
    const int64_t pad_tasks = a_.q.size[0] * a_.q.size[1];
    Engine::prepare(a_, spans_.data(), visits_, parallel, &prepared_);
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

  // tasks, longest first, the heads of a group next to each other so that their keys are still in cache
  void plan() {
    const int64_t batch = a_.q.size[0], heads = a_.q.size[1], group = heads / a_.k.size[1];
    const int64_t k_blocks = ceil_div(a_.k.size[2], a_.block_k);
    struct Group {
      int64_t length, b, kv_head, block;
    };
    std::vector<Group> groups;
    for (int64_t b = 0; b < batch; ++b) {
      spans_.push_back(span_of(b, a_.q.size[2], a_.k.size[2], a_.q_start, a_.causal, a_.padding));
      const int64_t real_blocks = ceil_div(spans_[b].n_q, a_.block_q);
      for (int64_t list = 0; list < a_.lists; ++list)
        for (int64_t i = 0; i < real_blocks; ++i) check_list(b, list, i, k_blocks);
      for (int64_t kv_head = 0; kv_head < a_.k.size[1]; ++kv_head)
        for (int64_t i = 0; i < real_blocks; ++i) {
          int64_t length = 0, count = 0;
          for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) blocks_of(b, list_of(h), i, &count), length += count;
          groups.push_back({length, b, kv_head, i});
          visits_ += length;
        }
    }
    std::stable_sort(groups.begin(), groups.end(), [](const Group& x, const Group& y) { return x.length > y.length; });
    rows_per_task_ = std::min({a_.block_q, kMaxRows, std::max<int64_t>(a_.q.size[2], 1)});
    for (const Group& g : groups)
      for (int64_t row = g.block * a_.block_q; row < std::min((g.block + 1) * a_.block_q, spans_[g.b].n_q); row += rows_per_task_)
        for (int64_t h = g.kv_head * group; h < (g.kv_head + 1) * group; ++h) {
          const int64_t end = std::min({row + rows_per_task_, (g.block + 1) * a_.block_q, spans_[g.b].n_q});
          tasks_.push_back({g.b, h, g.block, row, end - row});
        }
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

  void attend(Engine& engine, const Task& task) {
    const Span& span = spans_[task.b];
    const int64_t first_position = span.q_start + task.row0, last_position = first_position + task.rows - 1;
    const int64_t low = a_.causal && a_.window ? std::max<int64_t>(first_position - a_.window + 1, 0) / Engine::kAlign * Engine::kAlign : 0;
    const int64_t high = a_.causal ? std::min(span.n_k, last_position + 1) : span.n_k;
    const int panels = int(ceil_div(task.rows, kPanel));
    int64_t count = 0;
    const int32_t* blocks = blocks_of(task.b, list_of(task.h), task.block, &count);
    // the softmax wants logits in base 2, the softcap s / cap; the mask multiplies where the engine cannot
    double factor = a_.softcap > 0 ? a_.scale / a_.softcap : a_.scale * double(kLog2E);
    const bool by_mask = Engine::kScalesLate && (a_.softcap > 0 || factor <= 0);
    const float mask_factor = by_mask ? float(factor) : 1.0f;
    if (by_mask) factor = 1;
    engine.begin(task.b, task.h, span, task.row0, task.rows, float(factor),
                 a_.sinks ? std::max(a_.sinks[task.h] * kLog2E, kNoSink) : kNoSink);
    Reader<kTileKeys> reader(blocks, count, a_.block_k, low, high);
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
          const bool early = a_.causal && a_.window && tile.position[from] <= last - a_.window;
          if (late || early || by_mask || a_.softcap > 0)
            mask_logits<kVecs>(s, n, tile.position + from, position, a_.causal, a_.window, mask_factor, float(a_.softcap));
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
  int64_t rows_per_task_ = 0, visits_ = 0;
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
