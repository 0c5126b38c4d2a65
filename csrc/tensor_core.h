#pragma once

// What 16-bit device code asks of a GPU beyond CUDA's own words, each instruction as a function. All of them exist from
// compute capability 8.0 on. tests/cuda/tensor_core.h has the same functions for the CPU.
//
// 16-bit floats are bfloat16 where `kBfloat16`, else float16. Fragments are those of mma.m16n8k16: lane l holds, of a
// 16 x 8 result, rows l / 4 and l / 4 + 8 at columns 2 (l % 4) and the next one.

#include <cstdint>

namespace jmm_fast::tensor_core {

namespace {

/// `c += a b`: 16 x 8 += 16 x 16 times 16 x 8. All lanes call it.
template <bool kBfloat16>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kBfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// Four 8 x 8 matrices from shared memory; `row` of lane l is row l % 8 of matrix l / 8, 16 bytes. Lane l gets row
/// l / 4 at columns 2 (l % 4) and the next one.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

/// The same with each matrix transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

/// Starts to copy 16 bytes to shared memory, or zeros where nothing is `there`. `from` may be read in any case.
__device__ __forceinline__ void start_copy(uint16_t* to, const uint16_t* from, bool there) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(there ? 16 : 0)
      : "memory");
}

/// This thread's copies have arrived.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/// Two floats rounded to 16 bits, the first one in the lower half.
template <bool kBfloat16>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (kBfloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

template <bool kBfloat16>
__device__ __forceinline__ float widen(uint16_t half) {
  float value;
  if constexpr (kBfloat16) {
    value = __uint_as_float(static_cast<uint32_t>(half) << 16);
  } else {
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  }
  return value;
}

/// 2^x, to two units in the last place; what is below 2^-126 is 0.
__device__ __forceinline__ float power_of_two(float x) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

/// The same number, of which the compiler knows nothing any more.
__device__ __forceinline__ unsigned untold(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace

}  // namespace jmm_fast::tensor_core
