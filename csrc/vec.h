#pragma once

#include <cstdint>

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
  const IntVec scaled = reinterpret_cast<const IntVec&>(p) + (reinterpret_cast<const IntVec&>(t) << 23);
  return x < low ? Vec{} : reinterpret_cast<const Vec&>(scaled);
}

inline float sum_lanes(Vec x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

inline float max_lanes(Vec x) {
  float largest = x[0];
  for (int i = 1; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

}  // namespace

}  // namespace jmm_fast
