#pragma once

#include <cstdint>

#if defined(JMM_ISA_avx512) || defined(JMM_ISA_avx512bf16)
  #include <immintrin.h>
#endif

// Vectors as wide as the instruction set this translation unit is compiled for (JMM_ISA). Everything has internal
// linkage and no standard template is instantiated: the linker would keep one copy of it, perhaps one this processor
// cannot run.

#if defined(JMM_ISA_avx512) || defined(JMM_ISA_avx512bf16)
  #define JMM_LANES 16
#elif defined(JMM_ISA_avx2)
  #define JMM_LANES 8
#else
  #define JMM_LANES 4
#endif

namespace jmm_fast {

namespace {

constexpr int kLanes = JMM_LANES;

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t WordVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

typedef int32_t IntWord __attribute__((may_alias));
typedef uint16_t Half __attribute__((may_alias));

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = __builtin_inff();

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
inline Vec splat(float x) { return x - Vec{}; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

/// e^x for x <= 0 (or a little above), relative error below 1.5e-7; exactly 0 below -87, NaN stays NaN.
inline Vec exp_nonpositive(Vec x) {
  // e^x = 2^n e^r with n = round(x / ln 2); e^r by its minimax polynomial on [-ln2 / 2, ln2 / 2]. ln 2 in one float
  // costs n * 1.9e-9, nothing next to the rounding of the result for any weight that counts.
  constexpr float c6 = 0.00138436072f, c5 = 0.00837419555f, c4 = 0.0416680053f, c3 = 0.166664302f, c2 = 0.49999994f;
  constexpr float magic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
  constexpr float lowest = -87.0f;
  const Vec low = splat(lowest);
  // Written so that NaN passes through.
  const Vec clamped = x < low ? low : x;
  const Vec t = clamped * kLog2E + magic;
  const Vec n = t - magic;
  const Vec r = clamped - n * kLn2;
  const Vec p = (((((c6 * r + c5) * r + c4) * r + c3) * r + c2) * r + 1.0f) * r + 1.0f;
  // Unsigned: lanes that nobody reads may hold numbers whose sum does not fit.
  const WordVec scaled = reinterpret_cast<const WordVec&>(p) + (reinterpret_cast<const WordVec&>(t) << 23);
  return x < low ? Vec{} : reinterpret_cast<const Vec&>(scaled);
}

/// 2^(x - shift) for an integer `shift`, x not far above it; 0 far below the normal range, NaN stays NaN. The
/// difference is never rounded. Relative error besides the result's rounding: 9.2e-8 with kTerms = 5, 1.1e-4 with 3.
template <int kTerms>
inline Vec exp2_below(Vec x, Vec shift) {
  // 2^x = 2^n 2^r with n = round(x); 2^r by its minimax polynomial on [-1/2, 1/2] that is exact at 0.
  static_assert(kTerms == 3 || kTerms == 5);
  const auto power = [](Vec r) __attribute__((always_inline)) {
    if constexpr (kTerms == 3) return ((0.0550089329f * r + 0.242210969f) * r + 0.693282902f) * r + 1.0f;
    return ((((0.00132647273f * r + 0.00967151299f) * r + 0.0555073358f) * r + 0.240222424f) * r + 0.693147004f) * r +
           1.0f;
  };
#if JMM_LANES == 16
  const Vec r = _mm512_reduce_ps(x, 0);
  // The form with a mask, all set: GCC takes the undefined source of the other one for a mistake of ours.
  return _mm512_maskz_scalef_ps(0xffff, power(r), (x - r) - shift);
#else
  constexpr float magic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
  constexpr float limit = 4194304.0f;   // as long as the number is below 2^22; from 2^23 on all are integers
  constexpr float lowest = -126.0f;
  const Vec whole = (x + magic) - magic;
  const Vec n = (x < splat(limit)) & (x > splat(-limit)) ? whole : x;
  const Vec exponent = n - shift;
  const Vec biased = exponent + (magic + 127.0f);
  const WordVec scale = reinterpret_cast<const WordVec&>(biased) << 23;
  return exponent < splat(lowest) ? Vec{} : power(x - n) * reinterpret_cast<const Vec&>(scale);
#endif
}

#if JMM_LANES == 16
// The lanes of a half, quarter, eighth, sixteenth beside the others, for sums and maxima over all lanes.
  #define JMM_FOLD(x, op)                                                                           \
    x = op(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
    x = op(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
    x = op(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
    x = op(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#endif

inline float sum_lanes(Vec x) {
#if JMM_LANES == 16
  const auto add = [](Vec a, Vec b) { return a + b; };
  JMM_FOLD(x, add)
  return x[0];
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
#endif
}

inline float max_lanes(Vec x) {
#if JMM_LANES == 16
  JMM_FOLD(x, larger)
  return x[0];
#else
  float largest = x[0];
  for (int i = 1; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
#endif
}

#undef JMM_FOLD

}  // namespace

}  // namespace jmm_fast
