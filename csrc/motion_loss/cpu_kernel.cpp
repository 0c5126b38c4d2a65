// Masked motion loss of one body, with the gradient on the way. Compiled once per instruction set (JMM_ISA).
//
// The target exists only for the tokens of one time step. Frames are differenced and their statistics summed as the
// clip lies in memory, (frame, joint, channel), with vectors over joints and channels together; then each wanted
// token's chunks are normalised and written in the order of the prediction, (token, frame, channel), after which
// prediction, target and gradient are three plain arrays.
//
// Everything here has internal linkage or lives in the namespace of the instruction set, and no standard template is
// instantiated: the linker would keep one copy of it, perhaps one this processor cannot run.

#include "motion_loss/cpu_kernel.h"

#include "vec.h"

namespace jmm_fast::motion_loss::JMM_ISA {

namespace {

typedef double DoubleVec __attribute__((vector_size(kLanes * 8), aligned(8), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint32_t WordVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

inline float widen(uint16_t x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }

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

/// `tail` numbers at `p`, zeros after them.
template <typename T>
inline void load_tail(const T* p, int64_t tail, T* to) {
  for (int64_t i = 0; i < kLanes; ++i) to[i] = i < tail ? p[i] : T{};
}

struct Shape {
  explicit Shape(const Problem& p)
      : width(p.joints * p.channels),
        // A chunk of one token is copied as four numbers where there may be three.
        row(round_up(width, kLanes) + kLanes),
        numbers(p.patch * p.channels),
        tokens(p.frames / p.patch * p.joints) {}
  int64_t width, row, numbers, tokens;
};

struct Scratch {
  Scratch(const Problem& p, const Shape& shape, float* base) : used_(0), base_(base) {
    motion = take(p.patch * shape.row);
    columns = take(shape.row);
    means = take(shape.row);
    mean = take(p.joints + kLanes);
    inverse = take(p.joints + kLanes);
    // What the vectors of the step before left over, the tokens of this one, and one that may be written and dropped.
    target = take((p.joints + 1) * shape.numbers + 2 * kLanes);
    packed = take(p.rows * shape.numbers);
  }
  int64_t used() const { return used_; }
  float *motion, *columns, *means, *mean, *inverse, *target, *packed;

 private:
  float* take(int64_t floats) {
    const int64_t at = used_;
    used_ += round_up(floats, 16);
    return base_ == nullptr ? nullptr : base_ + at;
  }
  int64_t used_;
  float* base_;
};

/// Differences of the `p.patch` frames from `first` on, one row per frame.
void difference(const Problem& p, const Shape& shape, const float* clip, int64_t first, float* motion) {
  const bool dense = p.clip_channel == 1 && p.clip_joint == p.channels && shape.width >= kLanes;
  for (int64_t f = 0; f < p.patch; ++f, motion += shape.row) {
    if (first + f + p.stride >= p.frames) {
      for (int64_t i = 0; i < shape.row; ++i) motion[i] = 0.0f;
      continue;
    }
    const float* now = clip + (first + f) * p.clip_frame;
    const float* then = now + p.stride * p.clip_frame;
    if (dense) {
      for (int64_t i = 0; i < shape.width; i += kLanes) {
        // The last vector overlaps the one before it, so that nothing past the row is touched.
        const int64_t at = smaller(i, shape.width - kLanes);
        store(motion + at, load(then + at) - load(now + at));
      }
    } else {
      for (int64_t v = 0; v < p.joints; ++v) {
        for (int64_t c = 0; c < p.channels; ++c) {
          const int64_t at = v * p.clip_joint + c * p.clip_channel;
          motion[v * p.channels + c] = then[at] - now[at];
        }
      }
    }
  }
}

/// Sum over each joint's channels.
template <int kChannels>
inline float over_channels(const float* columns, int64_t channels) {
  const int64_t n = kChannels > 0 ? kChannels : channels;
  float total = columns[0];
  for (int64_t c = 1; c < n; ++c) total += columns[c];
  return total;
}

/// Mean and 1 / sqrt(variance + 1e-6) of each joint's token. Two passes: motion may be a small wobble on a large drift.
template <int kChannels>
void statistics(const Problem& p, const Shape& shape, const Scratch& s) {
  const int64_t channels = kChannels > 0 ? kChannels : p.channels;
  for (int64_t i = 0; i < shape.width; i += kLanes) {
    Vec sum = load(s.motion + i);
    for (int64_t f = 1; f < p.patch; ++f) sum += load(s.motion + f * shape.row + i);
    store(s.columns + i, sum);
  }
  const float per_number = 1.0f / static_cast<float>(shape.numbers);
  for (int64_t v = 0; v < p.joints; ++v) {
    const float mean = over_channels<kChannels>(s.columns + v * channels, channels) * per_number;
    s.mean[v] = mean;
    for (int64_t c = 0; c < channels; ++c) s.means[v * channels + c] = mean;
  }
  for (int64_t i = 0; i < shape.width; i += kLanes) {
    const Vec mean = load(s.means + i);
    Vec sum{};
    for (int64_t f = 0; f < p.patch; ++f) {
      const Vec off = load(s.motion + f * shape.row + i) - mean;
      sum += off * off;
    }
    store(s.columns + i, sum);
  }
  const float freedom = static_cast<float>(shape.numbers - 1);
  for (int64_t v = 0; v < p.joints; ++v) {
    s.inverse[v] = over_channels<kChannels>(s.columns + v * channels, channels) / freedom;
  }
  for (int64_t v = 0; v < p.joints; ++v) s.inverse[v] = 1.0f / __builtin_sqrtf(s.inverse[v] + 1e-6f);
}

/// The target of joint `v` in the order of the prediction; up to a Quad past its end is overwritten.
template <int kChannels>
inline void write_target(const Problem& p, const Shape& shape, const Scratch& s, int64_t v, float* to) {
  const int64_t channels = kChannels > 0 ? kChannels : p.channels;
  const float* from = s.motion + v * channels;
  if (kChannels == 3) {
    const Quad mean = s.mean[v] - Quad{}, inverse = s.inverse[v] - Quad{};
    for (int64_t f = 0; f < p.patch; ++f, from += shape.row, to += 3) {
      *reinterpret_cast<Quad*>(to) = (*reinterpret_cast<const Quad*>(from) - mean) * inverse;
    }
    return;
  }
  for (int64_t f = 0; f < p.patch; ++f, from += shape.row, to += channels) {
    for (int64_t c = 0; c < channels; ++c) to[c] = (from[c] - s.mean[v]) * s.inverse[v];
  }
}

/// Errors of whole vectors; the gradient is `scale` times the error.
template <typename In, typename Out>
inline void compare(const In* __restrict prediction, const float* __restrict target, Out* __restrict gradient,
                    float scale, int64_t count, DoubleVec& total) {
  Vec even{}, odd{};
  auto one = [&](int64_t i, Vec& sum) __attribute__((always_inline)) {
    const Vec error = load_any(prediction + i) - load(target + i);
    sum += error * error;
    if (gradient != nullptr) store_any(gradient + i, error * scale);
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    one(i, even);
    one(i + kLanes, odd);
  }
  if (i < count) one(i, even);
  // Few enough terms have met in float that the sum is good to its last digits.
  total += __builtin_convertvector(even + odd, DoubleVec);
}

template <int kChannels, typename In, typename Out>
double sweep(const Problem& p, const Shape& shape, const Scratch& s, int64_t body, const In* prediction,
             Out* gradient) {
  const float* clip = p.clips + body * p.clip_body;
  const uint8_t* mask = p.mask + body * p.mask_body;
  const int64_t numbers = shape.numbers, all = p.rows * numbers;
  DoubleVec total{};
  int64_t pending = 0, done = 0, row = 0;
  for (int64_t i = 0; i < p.patch * shape.row; ++i) s.motion[i] = 0.0f;
  if (!p.normalize) {
    for (int64_t v = 0; v < p.joints; ++v) s.mean[v] = 0.0f, s.inverse[v] = 1.0f;
  }
  for (int64_t first = 0; first + p.patch <= p.frames; first += p.patch) {
    difference(p, shape, clip, first, s.motion);
    if (p.normalize) statistics<kChannels>(p, shape, s);
    for (int64_t v = 0; v < p.joints; ++v, mask += p.mask_token) {
      float* to = s.target + pending;
      if (p.masked_only) {
        // Written in any case and kept when masked: cheaper than a branch nobody can predict.
        write_target<kChannels>(p, shape, s, v, to);
        pending += *mask != 0 ? numbers : 0;
        continue;
      }
      if (*mask != 0) {
        write_target<kChannels>(p, shape, s, v, to);
      } else {
        // A target equal to the prediction adds nothing and has no gradient.
        for (int64_t i = 0; i < numbers; ++i) {
          if constexpr (sizeof(In) == 2) {
            to[i] = widen(prediction[row * numbers + i]);
          } else {
            to[i] = prediction[row * numbers + i];
          }
        }
      }
      pending += numbers;
      ++row;
    }
    const int64_t whole = pending / kLanes * kLanes;
    compare(prediction + done, s.target, gradient != nullptr ? gradient + done : nullptr, p.scale, whole, total);
    store(s.target, load(s.target + whole));
    pending -= whole;
    done += whole;
  }
  const int64_t tail = all - done;
  if (tail > 0) {
    In last[kLanes];
    float target[kLanes];
    Out out[kLanes];
    load_tail(prediction + done, tail, last);
    load_tail(s.target, tail, target);
    compare(last, target, gradient != nullptr ? out : nullptr, p.scale, kLanes, total);
    for (int64_t i = 0; gradient != nullptr && i < tail; ++i) gradient[done + i] = out[i];
  }
  double sum = 0.0;
  for (int i = 0; i < kLanes; ++i) sum += total[i];
  return sum;
}

template <typename In, typename Out>
double choose(const Problem& p, const Shape& shape, const Scratch& s, int64_t body, const In* prediction) {
  Out* gradient = static_cast<Out*>(p.gradient);
  if (gradient != nullptr) gradient += body * p.rows * shape.numbers;
  return p.channels == 3 ? sweep<3>(p, shape, s, body, prediction, gradient)
                         : sweep<0>(p, shape, s, body, prediction, gradient);
}

}  // namespace

int64_t scratch(const Problem& p) { return Scratch(p, Shape(p), nullptr).used(); }

int64_t count_masked(const Problem& p, int64_t body) {
  const uint8_t* mask = p.mask + body * p.mask_body;
  const int64_t tokens = Shape(p).tokens;
  int64_t count = 0;
  if (p.mask_token == 1) {
    for (int64_t i = 0; i < tokens; ++i) count += mask[i] != 0;
  } else {
    for (int64_t i = 0; i < tokens; ++i) count += mask[i * p.mask_token] != 0;
  }
  return count;
}

double body_loss(const Problem& p, float* scratch, int64_t body) {
  const Shape shape(p);
  const Scratch s(p, shape, scratch);
  const int64_t base = body * p.prediction_body;
  const float* single = static_cast<const float*>(p.prediction) + base;
  const uint16_t* half = static_cast<const uint16_t*>(p.prediction) + base;
  if (p.prediction_number == 1 && p.prediction_row == shape.numbers) {
    return p.bfloat16 ? choose<uint16_t, uint16_t>(p, shape, s, body, half)
                      : choose<float, float>(p, shape, s, body, single);
  }
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t i = 0; i < shape.numbers; ++i) {
      const int64_t at = r * p.prediction_row + i * p.prediction_number;
      s.packed[r * shape.numbers + i] = p.bfloat16 ? widen(half[at]) : single[at];
    }
  }
  return p.bfloat16 ? choose<float, uint16_t>(p, shape, s, body, s.packed)
                    : choose<float, float>(p, shape, s, body, s.packed);
}

}  // namespace jmm_fast::motion_loss::JMM_ISA
