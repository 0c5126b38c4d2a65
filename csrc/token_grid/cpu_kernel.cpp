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

// Rows are summed in float this many at a time, then in double: the pass waits for memory, so exactness costs little.
constexpr int64_t kFloatRows = 8;
// Bytes that are asked for ahead of the row being summed.
constexpr int64_t kAhead = 6144;
// A grid of this size will not be found in a cache by who reads it next, so it is not put there.
constexpr int64_t kStreamBytes = 8 << 20;

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

/// Writes one row with `value(i)` (a vector) and `rest(i)` (a number).
template <bool kStream, typename Out, typename Value, typename Rest>
[[gnu::always_inline]] inline void write_row(Out* out, int64_t width, Value&& value, Rest&& rest) {
  along(
      width,
      [&](int64_t i) __attribute__((always_inline)) {
        if constexpr (kStream) {
          stream(out + i, value(i));
        } else {
          store_any(out + i, value(i));
        }
      },
      [&](int64_t i) __attribute__((always_inline)) { store_any(out + i, rest(i)); });
}

template <bool kStream, typename Token, typename Out>
void scatter_rows(const Grid& g, const float* hidden, int64_t step, int64_t begin, int64_t end) {
  const int64_t width = g.width, joints = g.joints;
  const float* time = g.time + step * width;
  for (int64_t body = begin; body < end; ++body) {
    const int64_t* restore = g.restore + body * g.restore_body + step * joints * g.restore_token;
    Out* out = static_cast<Out*>(g.grid) + body * g.grid_body + step * joints * g.grid_row;
    for (int64_t v = 0; v < joints; ++v, out += g.grid_row) {
      const int64_t place = restore[v * g.restore_token];
      if (place >= g.kept) {
        const float* row = hidden + v * width;
        write_row<kStream>(
            out, width, [=](int64_t i) __attribute__((always_inline)) { return load(row + i); },
            [=](int64_t i) __attribute__((always_inline)) { return row[i]; });
      } else {
        const Token* token = static_cast<const Token*>(g.tokens) + body * g.token_body + place * g.token_row;
        const float* joint = g.joint + v * width;
        write_row<kStream>(
            out, width,
            [=](int64_t i)
                __attribute__((always_inline)) { return load_any(token + i) + (load(time + i) + load(joint + i)); },
            [=](int64_t i) __attribute__((always_inline)) { return as_float(token[i]) + (time[i] + joint[i]); });
      }
    }
  }
}

template <typename Token, typename Out>
void scatter_any(const Grid& g, float* hidden, int64_t step, int64_t begin, int64_t end) {
  const float* time = g.time + step * g.width;
  for (int64_t v = 0; v < g.joints; ++v) {
    const float* joint = g.joint + v * g.width;
    for (int64_t i = 0; i < g.width; ++i) hidden[v * g.width + i] = g.mask_token[i] + (time[i] + joint[i]);
  }
  const int64_t bytes = g.bodies * g.grid_body * static_cast<int64_t>(sizeof(Out));
  if (bytes >= kStreamBytes && streamable(static_cast<const Out*>(g.grid), g.width)) {
    scatter_rows<true, Token, Out>(g, hidden, step, begin, end);
    stream_end();
  } else {
    scatter_rows<false, Token, Out>(g, hidden, step, begin, end);
  }
}

/// What sum_step keeps: sums over up to kFloatRows rows in float, for each joint and for the masked tokens, and the
/// same over all in double.
struct Sums {
  Sums(const Grid& g, float* base) : count((g.joints + 1) * g.width), used_(0), base_(base) {
    single = take(count);
    exact = reinterpret_cast<double*>(take(2 * count));
  }
  int64_t used() const { return used_; }
  int64_t count;
  float* single;
  double* exact;

 private:
  float* take(int64_t floats) {
    const int64_t at = used_;
    used_ += round_up(floats, 16);
    return base_ == nullptr ? nullptr : base_ + at;
  }
  int64_t used_;
  float* base_;
};

inline void flush(float* __restrict single, double* __restrict exact, int64_t count) {
  for (int64_t i = 0; i < count; ++i) exact[i] += single[i], single[i] = 0.0f;
}

template <typename In>
void sum_any(const Grid& g, float* scratch, int64_t step, float* joint_sums, float* time_out, float* masked_out) {
  const Sums s(g, scratch);
  const int64_t width = g.width, joints = g.joints;
  float* __restrict hidden = s.single + joints * width;
  double* hidden_exact = s.exact + joints * width;
  for (int64_t i = 0; i < s.count; ++i) s.single[i] = 0.0f, s.exact[i] = 0.0;
  int64_t hidden_rows = 0;
  for (int64_t body = 0; body < g.bodies; ++body) {
    const int64_t* restore = g.restore + body * g.restore_body + step * joints * g.restore_token;
    const In* __restrict row = static_cast<const In*>(g.grid) + body * g.grid_body + step * joints * g.grid_row;
    float* __restrict sums = s.single;
    for (int64_t v = 0; v < joints; ++v, row += g.grid_row, sums += width) {
      if (restore[v * g.restore_token] < g.kept) {
        along(
            width,
            [=](int64_t i) __attribute__((always_inline)) { store(sums + i, load(sums + i) + load_any(row + i)); },
            [=](int64_t i) __attribute__((always_inline)) { sums[i] += as_float(row[i]); });
        continue;
      }
      along(
          width,
          [=](int64_t i) __attribute__((always_inline)) {
            const Vec x = load_any(row + i);
            __builtin_prefetch(row + i + kAhead / static_cast<int64_t>(sizeof(In)));
            store(sums + i, load(sums + i) + x);
            store(hidden + i, load(hidden + i) + x);
          },
          [=](int64_t i) __attribute__((always_inline)) {
            sums[i] += as_float(row[i]);
            hidden[i] += as_float(row[i]);
          });
      if (++hidden_rows % kFloatRows == 0) flush(hidden, hidden_exact, width);
    }
    if ((body + 1) % kFloatRows == 0) flush(s.single, s.exact, joints * width);
  }
  flush(s.single, s.exact, s.count);
  for (int64_t i = 0; i < joints * width; ++i) joint_sums[i] = static_cast<float>(s.exact[i]);
  for (int64_t i = 0; i < width; ++i) masked_out[i] = static_cast<float>(hidden_exact[i]);
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
