// The words kernels are written in. Under nvcc they are CUDA; under SA_CUDA_EMULATED they are plain C++ on fibers.h, so that every
// kernel also runs in tests on a CPU. A kernel:
//
//   SA_GLOBAL(128) void double_all(float* x, int64_t n) {
//     const int64_t i = int64_t(block_x()) * threads() + thread();
//     if (i < n) x[i] *= 2;
//   }
//   launch<double_all>(Grid{blocks}, 128, 0, stream, x, n);
//
// Warp words are for all 32 lanes together (blocks are whole warps), and their result holds in every lane unless said otherwise.
// The only shared memory is that of the launch: shared_memory(), whose layout the kernel decides.
#pragma once
#include <algorithm>
#include <type_traits>

#include "../checks.h"
#include "../half.h"
#include "../ops.h"

#if defined(SA_CUDA_EMULATED)
#include "fibers.h"
#define SA_DEVICE [[maybe_unused]] inline
#define SA_GLOBAL(...) [[maybe_unused]] static
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SA_DEVICE __device__ __forceinline__
// threads of a block, and how many blocks a multiprocessor should hold if that matters
#define SA_GLOBAL(...) static __global__ __launch_bounds__(__VA_ARGS__)
#endif

namespace SA_NAMESPACE {

#if defined(SA_CUDA_EMULATED)
constexpr bool kEmulated = true;  // for kernels that take fewer threads then: a fiber costs more than a thread
#else
constexpr bool kEmulated = false;
#endif

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

constexpr int64_t kMostShared = 227 * 1024;  // of a block, sm_90 and sm_100; sm_86, sm_89 and sm_120 have 99 KiB

// -- what differs ---------------------------------------------------------------------------------------------------------------

#if defined(SA_CUDA_EMULATED)

SA_DEVICE int thread() { return fibers::now->thread; }
SA_DEVICE int threads() { return fibers::now->threads; }
SA_DEVICE int block_x() { return fibers::now->block[0]; }
SA_DEVICE int block_y() { return fibers::now->block[1]; }
SA_DEVICE int block_z() { return fibers::now->block[2]; }
SA_DEVICE int grid_x() { return fibers::now->grid[0]; }
SA_DEVICE int grid_y() { return fibers::now->grid[1]; }
SA_DEVICE int grid_z() { return fibers::now->grid[2]; }
SA_DEVICE char* shared_memory() { return fibers::now->shared; }

SA_DEVICE void barrier() { fibers::now->meet_block(); }
SA_DEVICE void warp_barrier() { fibers::now->meet_warp(); }

// every lane shows an object; the table of all 32, which stay alive until warp_part()
SA_DEVICE const void* const* warp_meet(const void* mine) { return fibers::now->show_warp(mine); }
SA_DEVICE void warp_part() { fibers::now->meet_warp(); }

template <class T>
SA_DEVICE T shuffle(T x, int lane) { return fibers::now->exchange(x, lane & 31); }
template <class T>
SA_DEVICE T shuffle_xor(T x, int mask) { return shuffle(x, (thread() & 31) ^ mask); }
template <class T>
SA_DEVICE T shuffle_up(T x, int lanes) { return shuffle(x, std::max((thread() & 31) - lanes, 0)); }

SA_DEVICE uint32_t ballot(bool yes) {
  const void* const* all = warp_meet(&yes);
  uint32_t votes = 0;
  for (int i = 0; i < 32; ++i) votes |= uint32_t(*static_cast<const bool*>(all[i])) << i;
  warp_part();
  return votes;
}

template <class T>
SA_DEVICE T atomic_add(T* at, T x) { const T before = *at; *at += x; return before; }
template <class T>
SA_DEVICE T atomic_max(T* at, T x) { const T before = *at; *at = std::max(before, x); return before; }
template <class T>
SA_DEVICE T atomic_min(T* at, T x) { const T before = *at; *at = std::min(before, x); return before; }
template <class T>
SA_DEVICE T atomic_compare_swap(T* at, T expected, T wanted) {
  const T before = *at;
  if (before == expected) *at = wanted;
  return before;
}

SA_DEVICE int popcount(uint32_t x) { return __builtin_popcount(x); }

SA_DEVICE void copy16_async(void* shared, const void* global, bool there = true) {
  if (there) std::memcpy(shared, global, 16);
  else std::memset(shared, 0, 16);
}
SA_DEVICE void copy_commit() {}
template <int pending>
SA_DEVICE void copy_wait() {}

#else

SA_DEVICE int thread() { return threadIdx.x; }
SA_DEVICE int threads() { return blockDim.x; }
SA_DEVICE int block_x() { return blockIdx.x; }
SA_DEVICE int block_y() { return blockIdx.y; }
SA_DEVICE int block_z() { return blockIdx.z; }
SA_DEVICE int grid_x() { return gridDim.x; }
SA_DEVICE int grid_y() { return gridDim.y; }
SA_DEVICE int grid_z() { return gridDim.z; }
SA_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

SA_DEVICE void barrier() { __syncthreads(); }
SA_DEVICE void warp_barrier() { __syncwarp(); }

template <class T>
SA_DEVICE T shuffle(T x, int lane) { return __shfl_sync(~0u, x, lane); }
template <class T>
SA_DEVICE T shuffle_xor(T x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
// the lowest lanes keep what is lane 0's when emulated and their own on a GPU: they must not use it
template <class T>
SA_DEVICE T shuffle_up(T x, int lanes) { return __shfl_up_sync(~0u, x, lanes); }
SA_DEVICE uint32_t ballot(bool yes) { return __ballot_sync(~0u, yes); }

// what was there before; T as CUDA has it: int, unsigned, unsigned long long, and to add float and double
template <class T>
SA_DEVICE T atomic_add(T* at, T x) { return atomicAdd(at, x); }
template <class T>
SA_DEVICE T atomic_max(T* at, T x) { return atomicMax(at, x); }
template <class T>
SA_DEVICE T atomic_min(T* at, T x) { return atomicMin(at, x); }
template <class T>
SA_DEVICE T atomic_compare_swap(T* at, T expected, T wanted) { return atomicCAS(at, expected, wanted); }

SA_DEVICE int popcount(uint32_t x) { return __popc(x); }

// 16 bytes to shared memory behind the thread's back, zeros where there is nothing; both addresses are multiples of 16
SA_DEVICE void copy16_async(void* shared, const void* global, bool there = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(there ? 16 : 0)
               : "memory");
}
SA_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// until at most `pending` of the thread's committed groups are under way; a barrier shows the bytes to the others
template <int pending>
SA_DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

#endif

// -- what follows from it -------------------------------------------------------------------------------------------------------

SA_DEVICE int lane() { return thread() & 31; }
SA_DEVICE int warp() { return thread() >> 5; }
SA_DEVICE bool any(bool yes) { return ballot(yes) != 0; }
SA_DEVICE bool all(bool yes) { return ballot(yes) == ~0u; }
// of the votes, those of lower lanes
SA_DEVICE int votes_before(uint32_t votes) { return popcount(votes & ((1u << lane()) - 1)); }

// a single instruction for these on a GPU
template <class T>
constexpr bool kReduced = !kEmulated && (std::is_same_v<T, int> || std::is_same_v<T, unsigned>);

template <class T>
SA_DEVICE T warp_sum(T x) {
  if constexpr (kReduced<T>) {
    return __reduce_add_sync(~0u, x);
  } else {
    for (int step = 16; step; step >>= 1) x += shuffle_xor(x, step);
    return x;
  }
}
template <class T>
SA_DEVICE T warp_max(T x) {
  if constexpr (kReduced<T>) {
    return __reduce_max_sync(~0u, x);
  } else {
    for (int step = 16; step; step >>= 1) x = std::max(x, shuffle_xor(x, step));
    return x;
  }
}
template <class T>
SA_DEVICE T warp_min(T x) {
  if constexpr (kReduced<T>) {
    return __reduce_min_sync(~0u, x);
  } else {
    for (int step = 16; step; step >>= 1) x = std::min(x, shuffle_xor(x, step));
    return x;
  }
}

struct alignas(16) Vec16 {
  uint32_t w[4];
};
SA_DEVICE Vec16 load16(const void* from) { return *static_cast<const Vec16*>(from); }
SA_DEVICE void store16(void* to, Vec16 x) { *static_cast<Vec16*>(to) = x; }

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
SA_DEVICE float to_float(float x) { return x; }
SA_DEVICE float to_float(bf16 x) { return bf16_to_float(x.bits); }
SA_DEVICE float to_float(fp16 x) {
#if defined(SA_CUDA_EMULATED)
  return fp16_to_float(x.bits);
#else
  return __half2float(__ushort_as_half(x.bits));
#endif
}
template <class T>
SA_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) return {float_to_bf16(x)};
#if defined(SA_CUDA_EMULATED)
  else if constexpr (std::is_same_v<T, fp16>) return {float_to_fp16(x)};
#else
  else if constexpr (std::is_same_v<T, fp16>) return {__half_as_ushort(__float2half_rn(x))};
#endif
  else return x;
}

// the 16 / sizeof(T) elements of 16 bytes
template <class T>
SA_DEVICE void unpack(Vec16 from, float* to) {
  T parts[16 / sizeof(T)];
  std::memcpy(parts, &from, 16);
  for (int i = 0; i < int(16 / sizeof(T)); ++i) to[i] = to_float(parts[i]);
}
template <class T>
SA_DEVICE Vec16 pack(const float* from) {
  T parts[16 / sizeof(T)];
  for (int i = 0; i < int(16 / sizeof(T)); ++i) parts[i] = from_float<T>(from[i]);
  Vec16 to;
  std::memcpy(&to, parts, 16);
  return to;
}

// f(element) for the element type of a dtype; on the host
template <class F>
auto by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::bf16: return f(bf16{});
    case DType::fp16: return f(fp16{});
    default: return f(float{});
  }
}

SA_HOST_DEVICE constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// -- launching ------------------------------------------------------------------------------------------------------------------

// on the stream, unless there is nothing to do
template <auto kernel, class... Args>
void launch(Grid grid, int threads, int64_t shared_bytes, const Stream& stream, const Args&... args);

namespace launching {

inline void check(Grid grid, int threads, int64_t shared_bytes) {
  SA_CHECK(grid.x < int64_t(1) << 31 && grid.y < 65536 && grid.z < 65536, "CUDA: a grid of ", grid.x, " x ", grid.y, " x ", grid.z,
           " blocks is too large; use smaller inputs");
  SA_CHECK(threads > 0 && threads <= 1024 && threads % 32 == 0, "CUDA: a block cannot have ", threads, " threads");
  SA_CHECK(shared_bytes <= kMostShared, "CUDA: a block cannot have ", shared_bytes, " bytes of shared memory");
}

template <class... P>
void launch_as(void (*kernel)(P...), Grid grid, int threads, int64_t shared_bytes, const Stream& stream,
               std::type_identity_t<P>... args) {
  if (grid.x <= 0 || grid.y <= 0 || grid.z <= 0) return;
  check(grid, threads, shared_bytes);
#if defined(SA_CUDA_EMULATED)
  static_cast<void>(stream);
  const char* fault = fibers::run(int(grid.x), int(grid.y), int(grid.z), threads, shared_bytes, [&] { kernel(args...); });
  SA_CHECK(!fault, "CUDA: ", fault);
#else
  const auto must = [](cudaError_t error, const char* what) {
    SA_CHECK(error == cudaSuccess, "CUDA: ", what, " failed: ", cudaGetErrorString(error));
  };
  int device = -1;
  must(cudaGetDevice(&device), "asking for the device");
  if (device != stream.device) must(cudaSetDevice(stream.device), "choosing the device");
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024)
    must(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
         "asking for shared memory");
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))..., nullptr};
  must(cudaLaunchKernel(function, dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z)), dim3(threads), pointers,
                        size_t(shared_bytes), static_cast<cudaStream_t>(stream.handle)),
       "a launch");
#endif
}

}  // namespace launching

template <auto kernel, class... Args>
void launch(Grid grid, int threads, int64_t shared_bytes, const Stream& stream, const Args&... args) {
  launching::launch_as(kernel, grid, threads, shared_bytes, stream, args...);
}

}  // namespace SA_NAMESPACE
