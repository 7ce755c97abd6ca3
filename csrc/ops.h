// What a kernel sees: plain structs and one signature per op. No torch here; library.cpp fills these in.
// Field names are the argument names of sparse_attn/ops/<op>.py, where their meaning is written down.
// setup.py compiles every file of cpu/ once per instruction set, those of cuda/ with -DSA_CUDA.
#pragma once
#include <atomic>
#include <cstdint>

#if defined(__CUDACC__)
#define SA_HOST_DEVICE __host__ __device__
#else
#define SA_HOST_DEVICE
#endif

namespace SA_NAMESPACE {

enum class DType { bf16, fp16, fp32 };

// A 4-D tensor; strides in elements.
struct View {
  void* data;
  DType dtype;
  int64_t size[4];
  int64_t stride[4];
};

// Rows of a flat store [S, D], contiguous in D; stride in elements.
struct Rows {
  const void* data;
  int64_t count, width, stride;
};

// Real keys of each batch row; a null pointer means 0 and n_k.
struct Padding {
  const int32_t* first;
  const int32_t* last;
};

// Tokens of sequence b and key head h in a flat store: rows starts <= row < starts + lengths.
struct Runs {
  const int64_t *starts, *lengths;  // [B, kv_heads], contiguous
  int64_t kv_heads;
  Padding queries;  // real rows of q
};

#if defined(SA_CUDA)

// A tensor that the kernels of one call scribble in; its last dimensions, the first ones are 1.
struct Work {
  void* data;
  int64_t size[4];
};

// The device and stream that a call is enqueued on, and the workspaces that Python allocated for it, see sparse_attn/ops/cuda.py.
struct Stream {
  int device;
  void* handle;
  Work work[4];
};
using Where = Stream;

#else

// Runs worker(state) once on every thread that torch would use; library.cpp implements it with at::parallel_for.
struct Parallel {
  void (*run)(void (*worker)(void*), void* state);
};

// Task numbers 0 .. tasks-1, each handed out once, in order.
class TaskQueue {
 public:
  explicit TaskQueue(int64_t tasks) : tasks_(tasks) {}
  bool take(int64_t* task) { return (*task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_; }

 private:
  const int64_t tasks_;
  std::atomic<int64_t> next_{0};
};

// worker(queue) runs on every thread; it sets up its scratch memory once and then takes tasks until there are none.
template <class Worker>
void parallel_tasks(const Parallel& parallel, int64_t tasks, const Worker& worker) {
  struct State {
    TaskQueue queue;
    const Worker& worker;
  } state{TaskQueue(tasks), worker};
  if (tasks <= 0) return;
  parallel.run([](void* s) { static_cast<State*>(s)->worker(static_cast<State*>(s)->queue); }, &state);
}
using Where = Parallel;

#endif

// Read with broadcasting: the stride of a dimension of size 1 is 0; null for none.
template <class T>
struct Strided {
  const T* data;
  int64_t stride[4];
  SA_HOST_DEVICE T at(int64_t b, int64_t h, int64_t i = 0, int64_t j = 0) const {
    return data[b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3]];
  }
};

struct AntidiagonalScore {
  View q, k;
  int64_t block_q, block_k, stride;
  double scale;
  int64_t q_start;
  bool causal;
  int64_t window;
  bool alternate;
  Padding padding;
  float* out;  // [B, H, Qb, Kb], contiguous
};
void antidiagonal_score(const AntidiagonalScore& args, const Where& where);

struct WindowScore {
  View q, k;
  const int32_t* rows;  // [B, n_rows], contiguous
  int64_t n_rows;
  double scale;
  int64_t q_start;
  bool causal;
  int64_t window;
  double softcap;
  Padding padding;
  int64_t block;
  float *columns, *diagonals;  // [B, H, ceil(Nk / block)], contiguous
};
void window_score(const WindowScore& args, const Where& where);

// of the query heads of a group
enum class Reduce { mean, sum, max };

struct KeyMass {
  View q, k;           // k: [1, 1, S, D]
  Strided<float> lse;  // [B, H, Nq]
  Runs runs;
  double scale, softcap;
  int64_t rows;
  Reduce reduce;
  float* out;  // [S], contiguous
};
void key_mass(const KeyMass& args, const Where& where);

struct StridedScore {
  View q, k;
  int64_t block_q, block_k, stride;
  double scale;
  int64_t q_start;
  bool causal;
  int64_t window;
  bool rotate;
  Padding padding;
  float* out;  // [B, H, Qb, Kb], contiguous
};
void strided_score(const StridedScore& args, const Where& where);

struct SelectBlocks {
  View score;               // fp32 [B, H, Qb, Kb]
  const double* threshold;  // [H], or null for top_k
  Strided<int32_t> top_k;   // [B, H, Qb]
  Strided<uint8_t> always;  // [B, H, Qb, Kb]
  bool inclusive;
  int64_t block_q, block_k, n_q, n_k, q_start;
  bool causal;
  int64_t window, sink, recent;
  Padding padding;
  int32_t* counts;   // [B, H, Qb], contiguous
  int32_t* indices;  // [B, H, Qb, Kb], contiguous
};
void select_blocks(const SelectBlocks& args, const Where& where);

enum class Pool { mean, max, min, unit_mean };

struct PoolBlocks {
  View x;
  int64_t block;
  Pool kind;
  Padding padding;
  float* out;  // [B, H, ceil(N / block), D], contiguous
};
void pool_blocks(const PoolBlocks& args, const Where& where);

struct WindowMass {
  View q, k;  // k: [1, 1, S, D]
  Runs runs;
  double scale;
  int64_t window;
  double softcap;
  const float* sinks;  // [H], or null
  int64_t kernel;
  Pool pool;  // mean or max
  Reduce reduce;
  float* out;  // [S], contiguous
};
void window_mass(const WindowMass& args, const Where& where);

struct PooledScore {
  View q_pooled, k_pooled;  // fp32
  Strided<float> scale;     // [B, H]
  int64_t block_q, block_k, n_q, n_k, q_start;
  bool causal;
  int64_t window;
  Padding padding;
  float* out;  // [B, H, Qb, Kb], contiguous
};
void pooled_score(const PooledScore& args, const Where& where);

struct SelectGlobal {
  View score;               // fp32 [B, H, Qb, Kb]
  const double* threshold;  // [H]
  bool all_heads;           // one budget for all heads of a batch row
  int64_t block_q, block_k, n_q, n_k, q_start;
  bool causal;
  int64_t window;
  Padding padding;
  Strided<uint8_t> always;  // [B, H, Qb, Kb]
  bool inclusive;
  int32_t* counts;   // [B, H, Qb], contiguous
  int32_t* indices;  // [B, H, Qb, Kb], contiguous
};
void select_global(const SelectGlobal& args, const Where& where);

struct JsDistance {
  Strided<float> p, q;  // [B, H, N]
  int64_t batch, heads, n;
  float* out;  // [B, H], contiguous
};
void js_distance(const JsDistance& args, const Where& where);

struct KeepTop {
  const float* score;  // [n_rows], contiguous
  int64_t n_rows;
  const int64_t *starts, *lengths;  // [B, Hkv], contiguous
  const int32_t* counts;            // [B, Hkv], contiguous
  int64_t batch, kv_heads, slots;
  int32_t* out;  // [B, Hkv, slots], contiguous
};
void keep_top(const KeepTop& args, const Where& where);

struct MoveRows {
  char* rows;  // contiguous
  int64_t n_rows, row_bytes;
  const int64_t *sources, *targets;  // [n]
  int64_t n;
};
void move_rows(const MoveRows& args, const Where& where);

struct GatherPages {
  char* rows;         // contiguous
  const char* pages;  // contiguous; the device's, or the host's and page-locked
  int64_t n_rows, n_pages, page_bytes;
  const int64_t *sources, *targets;  // [n]
  int64_t n;
};
void gather_pages(const GatherPages& args, const Where& where);

struct PlacePages {
  int32_t *held, *order;  // [runs, slots], contiguous
  int64_t runs, slots;
  const int32_t* ids;  // [runs, m], contiguous
  int64_t m;
  int32_t* out;     // [runs, m], contiguous
  uint8_t* misses;  // [runs, m], contiguous
};
void place_pages(const PlacePages& args, const Where& where);

struct LowrankKeys {
  void* rows;  // [n_rows, D], contiguous, in the factors' dtype
  int64_t n_rows;
  Rows factors;
  View basis;                        // [B, Hkv, r, D], in the factors' dtype
  const int64_t *starts, *targets;   // [B, Hkv, pages], contiguous
  const int32_t* counts;             // [B, Hkv, pages], contiguous
  int64_t pages;
  const int32_t* positions;          // [T]
  const float *far, *near;           // [n_far, 2, pairs] and [n_near, 2, pairs], contiguous
  int64_t n_far, n_near, pairs;
  bool interleaved;
};
void lowrank_keys(const LowrankKeys& args, const Where& where);

struct PageScore {
  View q;
  Rows low, high;  // in q's dtype
  Runs runs;       // of pages
  Reduce reduce;
  float* out;  // [P], contiguous
};
void page_score(const PageScore& args, const Where& where);

struct RowScore {
  View q;
  Rows rows;  // in q's dtype
  Runs runs;
  double scale;
  bool soft;
  Reduce reduce;
  float* out;  // [P], contiguous
};
void row_score(const RowScore& args, const Where& where);

struct BlockSparseAttention {
  View q, k, v;
  const int32_t* counts;   // [B, lists, q_blocks], contiguous
  const int32_t* indices;  // [B, lists, q_blocks, slots], contiguous
  int64_t lists, q_blocks, slots, block_q, block_k;
  double scale;
  int64_t q_start;
  bool causal;
  int64_t window;
  double softcap;
  Padding padding;
  const float* sinks;      // [H], or null
  const int32_t* columns;  // [B, column_lists, column_slots], contiguous, or null
  int64_t column_lists, column_slots;
  const int32_t* near;  // [H, 2], contiguous, or null
  int64_t dense_rows;
  const int32_t* order;  // [B, Hkv, Nk], contiguous, or null
  double pv_threshold;
  View out;    // [B, H, Nq, Dv], in q's dtype
  float* lse;  // [B, H, Nq], contiguous
};
void block_sparse_attention(const BlockSparseAttention& args, const Where& where);

struct PagedAttention {
  View q;
  Rows k, v;              // in q's dtype
  const int64_t* starts;  // [B, Hkv, pages], contiguous
  const int32_t* counts;  // [B, Hkv, pages], contiguous
  int64_t kv_heads, pages;
  double scale;
  bool causal;
  double softcap;
  const float* sinks;  // [H], or null
  Padding queries;     // of rows of q; null means 0 and Nq
  const float* bias;   // [S], or null
  View out;            // [B, H, Nq, Dv], in q's dtype
  float* lse;          // [B, H, Nq], contiguous
};
void paged_attention(const PagedAttention& args, const Where& where);

}  // namespace SA_NAMESPACE
