#pragma once

#include "vec.h"

// Reading and writing float32 or bfloat16 (as its bits) as vectors of float. Internal linkage, as in vec.h.

namespace jmm_fast {

namespace {

typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint32_t WordVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline float as_float(float x) { return x; }
inline float as_float(uint16_t x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }

inline Vec load_any(const float* p) { return load(p); }
inline Vec load_any(const uint16_t* p) {
  const WordVec bits = __builtin_convertvector(*reinterpret_cast<const HalfVec*>(p), WordVec) << 16;
  return reinterpret_cast<const Vec&>(bits);
}

inline void store_any(float* p, Vec x) { store(p, x); }
inline void store_any(uint16_t* p, Vec x) {
  const WordVec bits = reinterpret_cast<const WordVec&>(x);
  // Round to nearest even; a NaN must not round up to infinity.
  const WordVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WordVec nan = WordVec{} + 0x7fc0u;
  *reinterpret_cast<HalfVec*>(p) = __builtin_convertvector(x == x ? rounded : nan, HalfVec);
}

inline void store_any(float* p, float x) { *p = x; }
inline void store_any(uint16_t* p, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  *p = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace

}  // namespace jmm_fast
