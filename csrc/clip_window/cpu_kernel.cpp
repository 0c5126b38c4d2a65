// Crop, resample and rotate one clip in a single pass over its rows. Compiled once per instruction set (JMM_ISA).
//
// A vector holds whole joints (5 of 16 lanes, 2 of 8, 1 of 4), so that a rotation stays inside it: three permutations
// and three products. The lane or two behind them are computed with and overwritten by the next vector.
//
// Products and sums are rounded one by one, as the plain twin rounds them (the build switches contraction off for this
// file): clips that are equal bit for bit draw equal masks.

#include "clip_window/cpu_kernel.h"

#include "vec.h"

namespace jmm_fast::clip_window::JMM_ISA {

namespace {

/// Floats of whole joints in a vector.
constexpr int kStep = kLanes / 3 * 3;

inline Vec permute(Vec x, IntVec from) {
#if defined(__clang__)
  Vec y;
  for (int l = 0; l < kLanes; ++l) y[l] = x[from[l]];
  return y;
#else
  return __builtin_shuffle(x, from);
#endif
}

/// Column k of the rotation, and where coordinate k of each lane's joint is.
struct Rotation {
  Vec column[3];
  IntVec from[3];

  explicit Rotation(const double* matrix) {
    for (int k = 0; k < 3; ++k) {
      for (int l = 0; l < kLanes; ++l) {
        column[k][l] = static_cast<float>(matrix[l % 3 * 3 + k]);
        from[k][l] = l / 3 * 3 + k < kLanes ? l / 3 * 3 + k : l;
      }
    }
  }

  Vec turn(Vec x) const {
    return permute(x, from[0]) * column[0] + permute(x, from[1]) * column[1] + permute(x, from[2]) * column[2];
  }
};

/// One row `[V,3]` of any strides, copied.
void gather_row(const Problem& p, int64_t row, float* __restrict to) {
  const float* from = p.frames + row * p.frame_stride;
  for (int64_t v = 0; v < p.joints; ++v) {
    for (int64_t c = 0; c < 3; ++c) to[3 * v + c] = from[v * p.joint_stride + c * p.coordinate_stride];
  }
}

template <bool kTurn>
void cut(const Problem& p, float* memory, int64_t clip) {
  const int64_t width = 3 * p.joints, length = p.length[clip], start = p.start[clip], window = p.window;
  float* out = p.out + clip * window * width;
  if (length == 0) {
    for (int64_t i = 0; i < window * width; ++i) out[i] = 0.0f;
    return;
  }
  constexpr double identity[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
  const Rotation rotation(kTurn ? p.rotation + 9 * clip : identity);
  const bool packed = p.joint_stride == 3 && p.coordinate_stride == 1 && p.frame_stride == width;
  // A vector reads up to kLanes - 1 floats behind a row's end: the last rows of all frames are read from a copy.
  const int64_t readable = packed ? p.rows - 1 - (width + kLanes - 2) / width : -1;
  const int64_t copy = round_up(width + kLanes, 16);
  int64_t copied[2] = {-1, -1};
  auto row_at = [&](int64_t row, int side) -> const float* {
    if (row <= readable) return p.frames + row * width;
    float* to = memory + side * copy;
    if (copied[side] != row) gather_row(p, row, to);
    copied[side] = row;
    return to;
  };

  // Frame i reads at ((2 i + 1) length - window) / (2 window): quotient and remainder are exact, and step from frame to
  // frame without a division.
  const int64_t unit = 2 * window;
  const int64_t whole = 2 * length / unit, part = 2 * length % unit;
  int64_t low = 0, rest = length - window;
  if (rest > 0) low = rest / unit, rest %= unit;
  for (int64_t i = 0; i < window; ++i) {
    const int64_t at = smaller(rest < 0 ? 0 : low, length - 1);
    const float weight = rest < 0 ? 0.0f : static_cast<float>(rest) / static_cast<float>(unit);
    const float* first = row_at(start + at, 0);
    const float* second = row_at(start + smaller(at + 1, length - 1), 1);
    float* to = out + i * width;
    const Vec upper = splat(weight), lower = splat(1.0f - weight);
    // Vectors that end inside the output of this clip are stored whole.
    const int64_t inside = (window - i) * width - kLanes;
    for (int64_t j = 0; j < width; j += kStep) {
      Vec x = load(first + j) * lower + load(second + j) * upper;
      if constexpr (kTurn) x = rotation.turn(x);
      if (j <= inside) {
        store(to + j, x);
      } else {
        for (int64_t l = 0; l < smaller(kStep, width - j); ++l) to[j + l] = x[l];
      }
    }
    rest += part;
    low += whole;
    if (rest >= unit) rest -= unit, ++low;
  }
}

}  // namespace

int64_t scratch(const Problem& p) { return 2 * round_up(3 * p.joints + kLanes, 16); }

void cut(const Problem& p, float* memory, int64_t clip) {
  p.rotation != nullptr ? cut<true>(p, memory, clip) : cut<false>(p, memory, clip);
}

}  // namespace jmm_fast::clip_window::JMM_ISA
