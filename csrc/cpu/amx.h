// AMX: eight registers of 16 rows x 64 bytes and a bf16 product of two of them. With SA_AMX_EMULATE the same calls run on any
// AVX-512 CPU, so that the kernels above can be held to the reference on machines without AMX.
#pragma once
#include "simd.h"

namespace SA_NAMESPACE {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 1024;

#if defined(SA_AMX_EMULATE)

struct alignas(64) EmulatedTile {
  char row[kTileRows][64];
};
inline thread_local EmulatedTile emulated_tiles[8];

class TileGuard {};

template <int T>
SA_INLINE void tile_zero() {
  std::memset(&emulated_tiles[T], 0, kTileBytes);
}
template <int T>
SA_INLINE void tile_load(const void* from, int64_t stride_bytes) {
  for (int r = 0; r < kTileRows; ++r) std::memcpy(emulated_tiles[T].row[r], static_cast<const char*>(from) + r * stride_bytes, 64);
}
template <int T>
SA_INLINE void tile_store(void* to, int64_t stride_bytes) {
  for (int r = 0; r < kTileRows; ++r) std::memcpy(static_cast<char*>(to) + r * stride_bytes, emulated_tiles[T].row[r], 64);
}
// c[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1]
inline void emulated_product(EmulatedTile& c, const EmulatedTile& a, const EmulatedTile& b) {
  for (int m = 0; m < kTileRows; ++m) {
    float row[16];
    uint16_t left[32], right[32];
    std::memcpy(row, c.row[m], 64);
    std::memcpy(left, a.row[m], 64);
    for (int k = 0; k < 16; ++k) {
      std::memcpy(right, b.row[k], 64);
      for (int n = 0; n < 16; ++n) {
        row[n] += bf16_to_float(left[2 * k]) * bf16_to_float(right[2 * n]);
        row[n] += bf16_to_float(left[2 * k + 1]) * bf16_to_float(right[2 * n + 1]);
      }
    }
    std::memcpy(c.row[m], row, 64);
  }
}
template <int C, int A, int B>
SA_INLINE void tile_product() {
  emulated_product(emulated_tiles[C], emulated_tiles[A], emulated_tiles[B]);
}

#else

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Full tiles while it lives; afterwards whatever the thread had configured before.
// Own assembly: GCC 12 declares 8 of the 64 bytes as read and drops the stores to the rest, and its tile intrinsics take
// literal numbers only, no template arguments.
class TileGuard {
 public:
  TileGuard() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    const TileConfig full;
    asm volatile("ldtilecfg %0" ::"m"(full) : "memory");
  }
  ~TileGuard() {
    if (before_.palette)
      asm volatile("ldtilecfg %0" ::"m"(before_) : "memory");
    else
      asm volatile("tilerelease" ::: "memory");
  }
  TileGuard(const TileGuard&) = delete;

 private:
  TileConfig before_;
};

template <int T>
SA_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
SA_INLINE void tile_load(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(T) : "memory");
}
template <int T>
SA_INLINE void tile_store(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(T) : "memory");
}
template <int C, int A, int B>
SA_INLINE void tile_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// 2 x 2 accumulators are tiles 0..3, A operands 4 and 5, B operands 6 and 7
SA_INLINE void tiles_2x2_zero() { tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(); }

SA_INLINE void tiles_2x2_product(const void* a0, const void* a1, int64_t a_stride, const void* b0, const void* b1) {
  tile_load<6>(b0, 64);
  tile_load<4>(a0, a_stride);
  tile_product<0, 4, 6>();
  tile_load<7>(b1, 64);
  tile_product<1, 4, 7>();
  tile_load<5>(a1, a_stride);
  tile_product<2, 5, 6>();
  tile_product<3, 5, 7>();
}

// rows 0..31 x 32 floats of a matrix
SA_INLINE void tiles_2x2_load(const float* c, int64_t stride_bytes) {
  const char* low = reinterpret_cast<const char*>(c);
  tile_load<0>(low, stride_bytes), tile_load<1>(low + 64, stride_bytes);
  tile_load<2>(low + 16 * stride_bytes, stride_bytes), tile_load<3>(low + 16 * stride_bytes + 64, stride_bytes);
}
SA_INLINE void tiles_2x2_store(float* c, int64_t stride_bytes) {
  char* low = reinterpret_cast<char*>(c);
  tile_store<0>(low, stride_bytes), tile_store<1>(low + 64, stride_bytes);
  tile_store<2>(low + 16 * stride_bytes, stride_bytes), tile_store<3>(low + 16 * stride_bytes + 64, stride_bytes);
}

}  // namespace SA_NAMESPACE
