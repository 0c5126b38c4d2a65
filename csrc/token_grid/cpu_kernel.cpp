// Gathering patches and putting tokens back on the grid. Compiled once per instruction set (JMM_ISA).
//
// Nearly all of the work is one pass over the grid, which is far larger than the caches: written in the forward pass,
// read in the backward pass. A time step is taken for many bodies at once, so that what the bodies share, the row of a
// masked token at each joint or the sums over bodies, stays in the first cache.
//
// Everything here has internal linkage or lives in the namespace of the instruction set, and no standard template is
// instantiated: the linker would keep one copy of it, perhaps one this processor cannot run.

#include "token_grid/cpu_kernel.h"

#include "bfloat16.h"
#include "vec.h"

namespace jmm_fast::token_grid::JMM_ISA {

namespace {

// Rows are summed in float this many at a time, then in double: the pass waits for memory, so exactness costs nothing.
constexpr int64_t kFloatRows = 8;
// Vectors of a row that are summed in registers.
constexpr int kColumns = 8;

typedef double DoubleVec __attribute__((vector_size(kLanes * 8), aligned(8), may_alias));

/// Calls `chunk(clip element, patch element)` for each frame of each kept token; a chunk is `channels` numbers.
template <typename T, typename Chunk>
inline void each_chunk(const Patches& p, int64_t body, Chunk&& chunk) {
  T* clip = static_cast<T*>(p.clips) + body * p.clip_body;
  T* patch = static_cast<T*>(p.patches) + body * p.kept * p.patch * p.channels;
  const int64_t* visible = p.visible + body * p.visible_body;
  for (int64_t k = 0; k < p.kept; ++k) {
    const int64_t token = visible[k * p.visible_token], step = token / p.joints, joint = token % p.joints;
    T* at = clip + step * p.patch * p.clip_frame + joint * p.clip_joint;
    for (int64_t f = 0; f < p.patch; ++f, at += p.clip_frame, patch += p.channels) chunk(at, patch);
  }
}

template <typename T>
void gather_any(const Patches& p, int64_t body) {
  const int64_t channels = p.channels, stride = p.clip_channel;
  if (channels == 3 && stride == 1) {
    each_chunk<T>(p, body, [](const T* clip, T* patch) __attribute__((always_inline)) {
      for (int c = 0; c < 3; ++c) patch[c] = clip[c];
    });
  } else {
    each_chunk<T>(p, body, [=](const T* clip, T* patch) __attribute__((always_inline)) {
      for (int64_t c = 0; c < channels; ++c) patch[c] = clip[c * stride];
    });
  }
}

template <typename T>
void gather_backward_any(const Patches& p, int64_t body) {
  const int64_t channels = p.channels, stride = p.clip_channel;
  each_chunk<T>(p, body, [=](T* clip, const T* patch) __attribute__((always_inline)) {
    for (int64_t c = 0; c < channels; ++c) {
      store_any(clip + c * stride, as_float(clip[c * stride]) + as_float(patch[c]));
    }
  });
}

/// Calls `vector(i)` for whole vectors of a row and `number(i)` for the rest.
template <typename Vector, typename Number>
[[gnu::always_inline]] inline void along(int64_t width, Vector&& vector, Number&& number) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) vector(i);
  for (; i < width; ++i) number(i);
}

template <typename Token, typename Out>
void scatter_any(const Grid& g, float* hidden, int64_t step, int64_t begin, int64_t end) {
  const int64_t width = g.width, joints = g.joints;
  const float* time = g.time + step * width;
  for (int64_t v = 0; v < joints; ++v) {
    for (int64_t i = 0; i < width; ++i) {
      hidden[v * width + i] = g.mask_token[i] + (time[i] + g.joint[v * width + i]);
    }
  }
  for (int64_t body = begin; body < end; ++body) {
    const int64_t* restore = g.restore + body * g.restore_body + step * joints * g.restore_token;
    Out* __restrict out = static_cast<Out*>(g.grid) + body * g.grid_body + step * joints * g.grid_row;
    for (int64_t v = 0; v < joints; ++v, out += g.grid_row) {
      const int64_t place = restore[v * g.restore_token];
      if (place >= g.kept) {
        const float* __restrict row = hidden + v * width;
        along(
            width, [=](int64_t i) __attribute__((always_inline)) { store_any(out + i, load(row + i)); },
            [=](int64_t i) __attribute__((always_inline)) { store_any(out + i, row[i]); });
      } else {
        const Token* __restrict token = static_cast<const Token*>(g.tokens) + body * g.token_body + place * g.token_row;
        const float* __restrict joint = g.joint + v * width;
        along(
            width,
            [=](int64_t i) __attribute__((always_inline)) {
              store_any(out + i, load_any(token + i) + (load(time + i) + load(joint + i)));
            },
            [=](int64_t i)
                __attribute__((always_inline)) { store_any(out + i, as_float(token[i]) + (time[i] + joint[i])); });
      }
    }
  }
}

/// What sum_step keeps: for each joint, the sum over up to kFloatRows bodies in float and that over all in double; the
/// sum over masked tokens; which joints of a body are masked.
struct Sums {
  Sums(const Grid& g, float* base) : count(g.joints * g.width), used_(0), base_(base) {
    single = take(count);
    exact = reinterpret_cast<double*>(take(2 * count));
    masked_sum = reinterpret_cast<double*>(take(2 * g.width));
    masked = reinterpret_cast<int32_t*>(take(g.joints));
  }
  int64_t used() const { return used_; }
  int64_t count;
  float* single;
  double *exact, *masked_sum;
  int32_t* masked;

 private:
  float* take(int64_t floats) {
    const int64_t at = used_;
    used_ += round_up(floats, 16);
    return base_ == nullptr ? nullptr : base_ + at;
  }
  int64_t used_;
  float* base_;
};

/// Adds `kVectors` vectors of each joint's row to the joint's sum, and of the masked ones to theirs.
template <int kVectors, typename In>
[[gnu::always_inline]] inline void add_columns(const In* row, int64_t stride, int64_t joints, int64_t width,
                                               const int32_t* masked, float* joint_sums, double* masked_sum) {
  for (int64_t first = 0; first < joints; first += kFloatRows) {
    Vec hidden[kVectors]{};
    for (int64_t v = first; v < smaller(first + kFloatRows, joints); ++v, row += stride, joint_sums += width) {
      const IntVec keep = masked[v] - IntVec{};
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) {
        const Vec x = load_any(row + c * kLanes);
        const IntVec kept = reinterpret_cast<const IntVec&>(x) & keep;
        store(joint_sums + c * kLanes, load(joint_sums + c * kLanes) + x);
        hidden[c] += reinterpret_cast<const Vec&>(kept);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      *reinterpret_cast<DoubleVec*>(masked_sum + c * kLanes) += __builtin_convertvector(hidden[c], DoubleVec);
    }
  }
}

template <typename In>
void sum_any(const Grid& g, float* scratch, int64_t step, float* joint_sums, float* time_out, float* masked_out) {
  const Sums s(g, scratch);
  const int64_t width = g.width, joints = g.joints;
  for (int64_t i = 0; i < s.count; ++i) s.single[i] = 0.0f, s.exact[i] = 0.0;
  for (int64_t i = 0; i < width; ++i) s.masked_sum[i] = 0.0;
  for (int64_t body = 0; body < g.bodies; ++body) {
    const int64_t* restore = g.restore + body * g.restore_body + step * joints * g.restore_token;
    for (int64_t v = 0; v < joints; ++v) s.masked[v] = restore[v * g.restore_token] >= g.kept ? -1 : 0;
    const In* rows = static_cast<const In*>(g.grid) + body * g.grid_body + step * joints * g.grid_row;
    int64_t i = 0;
    for (; i + kColumns * kLanes <= width; i += kColumns * kLanes) {
      add_columns<kColumns>(rows + i, g.grid_row, joints, width, s.masked, s.single + i, s.masked_sum + i);
    }
    for (; i + kLanes <= width; i += kLanes) {
      add_columns<1>(rows + i, g.grid_row, joints, width, s.masked, s.single + i, s.masked_sum + i);
    }
    for (int64_t v = 0; v < joints && i < width; ++v) {
      for (int64_t c = i; c < width; ++c) {
        const float x = as_float(rows[v * g.grid_row + c]);
        s.single[v * width + c] += x;
        s.masked_sum[c] += s.masked[v] != 0 ? x : 0.0f;
      }
    }
    if ((body + 1) % kFloatRows == 0 || body + 1 == g.bodies) {
      for (int64_t j = 0; j < s.count; ++j) s.exact[j] += s.single[j], s.single[j] = 0.0f;
    }
  }
  for (int64_t i = 0; i < s.count; ++i) joint_sums[i] = static_cast<float>(s.exact[i]);
  for (int64_t i = 0; i < width; ++i) masked_out[i] = static_cast<float>(s.masked_sum[i]);
  for (int64_t i = 0; i < width; ++i) {
    double all = 0.0;
    for (int64_t v = 0; v < joints; ++v) all += s.exact[v * width + i];
    time_out[i] = static_cast<float>(all);
  }
}

template <typename In, typename Token>
void tokens_backward_any(const Grid& g, int64_t body) {
  const int64_t width = g.width;
  Token* tokens = static_cast<Token*>(g.tokens) + body * g.token_body;
  for (int64_t k = 0; k < g.kept; ++k) {
    for (int64_t i = 0; i < width; ++i) tokens[k * g.token_row + i] = Token{};
  }
  const int64_t* restore = g.restore + body * g.restore_body;
  const In* row = static_cast<const In*>(g.grid) + body * g.grid_body;
  for (int64_t l = 0; l < g.steps * g.joints; ++l, row += g.grid_row) {
    const int64_t place = restore[l * g.restore_token];
    if (place >= g.kept) continue;
    Token* to = tokens + place * g.token_row;
    const In* from = row;
    along(
        width,
        [=](int64_t i) __attribute__((always_inline)) { store_any(to + i, load_any(to + i) + load_any(from + i)); },
        [=](int64_t i) __attribute__((always_inline)) { store_any(to + i, as_float(to[i]) + as_float(from[i])); });
  }
}

}  // namespace

void gather(const Patches& p, int64_t body) {
  // Copies need the size of a number only, but clips may lie with any strides.
  p.bfloat16 ? gather_any<uint16_t>(p, body) : gather_any<float>(p, body);
}

void gather_backward(const Patches& p, int64_t body) {
  p.bfloat16 ? gather_backward_any<uint16_t>(p, body) : gather_backward_any<float>(p, body);
}

int64_t scatter_scratch(const Grid& g) { return g.joints * g.width; }

int64_t sum_scratch(const Grid& g) { return Sums(g, nullptr).used(); }

void scatter(const Grid& g, float* scratch, int64_t step, int64_t begin, int64_t end) {
  if (g.bfloat16_grid) {
    g.bfloat16_tokens ? scatter_any<uint16_t, uint16_t>(g, scratch, step, begin, end)
                      : scatter_any<float, uint16_t>(g, scratch, step, begin, end);
  } else {
    g.bfloat16_tokens ? scatter_any<uint16_t, float>(g, scratch, step, begin, end)
                      : scatter_any<float, float>(g, scratch, step, begin, end);
  }
}

void sum_step(const Grid& g, float* scratch, int64_t step, float* joint_sums, float* time_sum, float* masked_sum) {
  g.bfloat16_grid ? sum_any<uint16_t>(g, scratch, step, joint_sums, time_sum, masked_sum)
                  : sum_any<float>(g, scratch, step, joint_sums, time_sum, masked_sum);
}

void sum_over_steps(const float* sums, int64_t steps, int64_t stride, int64_t count, float* total) {
  constexpr int64_t kTogether = 64;
  for (int64_t i = 0; i < count; i += kTogether) {
    const int64_t n = smaller(kTogether, count - i);
    double exact[kTogether] = {};
    for (int64_t t = 0; t < steps; ++t) {
      for (int64_t j = 0; j < n; ++j) exact[j] += sums[t * stride + i + j];
    }
    for (int64_t j = 0; j < n; ++j) total[i + j] = static_cast<float>(exact[j]);
  }
}

void tokens_backward(const Grid& g, int64_t body) {
  if (g.bfloat16_grid) {
    g.bfloat16_tokens ? tokens_backward_any<uint16_t, uint16_t>(g, body)
                      : tokens_backward_any<uint16_t, float>(g, body);
  } else {
    g.bfloat16_tokens ? tokens_backward_any<float, uint16_t>(g, body) : tokens_backward_any<float, float>(g, body);
  }
}

}  // namespace jmm_fast::token_grid::JMM_ISA
