// What a warp does together: it reads its peers' registers, loads matrices from shared memory and multiplies them on tensor cores.
// Each has an emulated twin that moves every element as the hardware does.
//
// Fragment layouts: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type" and "ldmatrix".
#pragma once
#include <cstring>
#include <type_traits>

#include "simt.h"

namespace SA_NAMESPACE {

// Which element of a matrix a lane holds. Registers hold pairs: element e of register i is number 2 i + e.
struct Fragment {
  int row, column;
};
// A [16, 16], 8 elements a lane
SA_HOST_DEVICE constexpr Fragment fragment_a(int lane, int number) {
  return {lane / 4 + 8 * (number / 2 % 2), lane % 4 * 2 + number % 2 + 8 * (number / 4)};
}
// B [16, 8], 4 elements a lane
SA_HOST_DEVICE constexpr Fragment fragment_b(int lane, int number) {
  return {lane % 4 * 2 + number % 2 + 8 * (number / 2), lane / 4};
}
// C and D [16, 8], 4 floats a lane
SA_HOST_DEVICE constexpr Fragment fragment_c(int lane, int number) {
  return {lane / 4 + 8 * (number / 2), lane % 4 * 2 + number % 2};
}

#ifdef SA_CUDA_EMULATED

// The N values of every lane of the warp; all lanes make one, and read the same `number` at a time.
template <int N>
class Peers {
 public:
  explicit Peers(const float (&mine)[N]) : lanes_(warp_meet(mine)) {}
  Peers(const Peers&) = delete;
  ~Peers() { warp_part(); }
  float read(int number, int lane) const { return static_cast<const float*>(lanes_[lane])[number]; }

 private:
  const void* const* lanes_;
};

// c += a @ b; Element is bf16 or fp16
template <class Element>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Element mine_a[8], mine_b[4];
  std::memcpy(mine_a, a, sizeof a), std::memcpy(mine_b, b, sizeof b);
  struct Held {
    float a[8], b[4];
  } mine;
  std::transform(mine_a, mine_a + 8, mine.a, [](Element x) { return to_float(x); });
  std::transform(mine_b, mine_b + 4, mine.b, [](Element x) { return to_float(x); });
  const void* const* lanes = warp_meet(&mine);
  float whole_a[16][16], whole_b[16][8];
  for (int other = 0; other < 32; ++other) {
    const Held& held = *static_cast<const Held*>(lanes[other]);
    for (int i = 0; i < 8; ++i) whole_a[fragment_a(other, i).row][fragment_a(other, i).column] = held.a[i];
    for (int i = 0; i < 4; ++i) whole_b[fragment_b(other, i).row][fragment_b(other, i).column] = held.b[i];
  }
  warp_part();
  for (int i = 0; i < 4; ++i) {
    const Fragment at = fragment_c(lane(), i);
    for (int k = 0; k < 16; ++k) c[i] += whole_a[at.row][k] * whole_b[k][at.column];
  }
}

// Four 8 x 8 matrices of 2-byte elements, one a register; lane i names row i % 8 of matrix i / 8, 16 bytes that are aligned to 16.
// Lane 4 r + c gets elements 2 c and 2 c + 1 of row r; transposed, of column r.
template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const void* row) {
  const void* const* rows = warp_meet(row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int r = kTransposed ? lane() % 4 * 2 + e : lane() / 4, c = kTransposed ? lane() / 4 : lane() % 4 * 2 + e;
      pair[e] = static_cast<const uint16_t*>(rows[matrix * 8 + r])[c];
    }
    std::memcpy(&to[matrix], pair, 4);
  }
  warp_part();
}

#else

template <int N>
class Peers {
 public:
  SA_DEVICE explicit Peers(const float (&mine)[N]) : mine_(mine) {}
  SA_DEVICE float read(int number, int lane) const { return shuffle(mine_[number], lane); }

 private:
  const float (&mine_)[N];
};

template <class Element>
SA_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Element, bf16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <bool kTransposed>
SA_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
}

#endif

}  // namespace SA_NAMESPACE
