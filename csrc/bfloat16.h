#pragma once

#include "vec.h"

// Reading and writing float32 or bfloat16 (as its bits) as vectors of float. Internal linkage, as in vec.h.

namespace jmm_fast {

namespace {

typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

inline float as_float(float x) { return x; }
inline float as_float(uint16_t x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }

inline Vec load_any(const float* p) { return load(p); }
inline Vec load_any(const uint16_t* p) {
  const WordVec bits = __builtin_convertvector(*reinterpret_cast<const HalfVec*>(p), WordVec) << 16;
  return reinterpret_cast<const Vec&>(bits);
}

/// The bits of `x` as bfloat16, rounded to nearest even; a NaN must not round up to infinity.
inline HalfVec narrow(Vec x) {
  const WordVec bits = reinterpret_cast<const WordVec&>(x);
  const WordVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WordVec nan = WordVec{} + 0x7fc0u;
  return __builtin_convertvector(x == x ? rounded : nan, HalfVec);
}

inline void store_any(float* p, Vec x) { store(p, x); }
inline void store_any(uint16_t* p, Vec x) { *reinterpret_cast<HalfVec*>(p) = narrow(x); }

/// Whether `stream` may write whole vectors to `p` and to all rows of `width` numbers after it.
template <typename T>
inline bool streamable(const T* p, int64_t width) {
  return reinterpret_cast<uintptr_t>(p) % (kLanes * sizeof(T)) == 0 && width % kLanes == 0;
}

// Like store_any, past the caches: a line written whole need not be read first. Ends with `stream_end`.
#if !defined(__x86_64__) || defined(__clang__)
inline void stream(float* p, Vec x) { store_any(p, x); }
inline void stream(uint16_t* p, Vec x) { store_any(p, x); }
#else
  #if JMM_LANES == 16
typedef long long StreamedHalf __attribute__((vector_size(32), may_alias));
inline void stream(float* p, Vec x) { __builtin_ia32_movntps512(p, x); }
  #elif JMM_LANES == 8
typedef long long StreamedHalf __attribute__((vector_size(16), may_alias));
inline void stream(float* p, Vec x) { __builtin_ia32_movntps256(p, x); }
  #else
typedef long long __attribute__((may_alias)) StreamedHalf;
inline void stream(float* p, Vec x) { __builtin_ia32_movntps(p, x); }
  #endif
inline void stream(uint16_t* p, Vec x) {
  const HalfVec half = narrow(x);
  const StreamedHalf bits = reinterpret_cast<const StreamedHalf&>(half);
  #if JMM_LANES == 16
  typedef long long Four __attribute__((vector_size(32)));
  __builtin_ia32_movntdq256(reinterpret_cast<Four*>(p), bits);
  #elif JMM_LANES == 8
  typedef long long Two __attribute__((vector_size(16)));
  __builtin_ia32_movntdq(reinterpret_cast<Two*>(p), bits);
  #else
  __builtin_ia32_movnti64(reinterpret_cast<long long*>(p), bits);
  #endif
}
#endif

/// What was streamed is seen by other threads before anything written after this.
inline void stream_end() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

inline void store_any(float* p, float x) { *p = x; }
inline void store_any(uint16_t* p, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  *p = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace

}  // namespace jmm_fast
