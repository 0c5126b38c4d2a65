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

#include "bfloat16.h"
#include "vec.h"

namespace jmm_fast::motion_loss::JMM_ISA {

namespace {

typedef double DoubleVec __attribute__((vector_size(kLanes * 8), aligned(8), may_alias));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

/// `tail` numbers at `p`, zeros after them.
template <typename T>
inline void load_tail(const T* p, int64_t tail, T* to) {
  for (int64_t i = 0; i < kLanes; ++i) to[i] = i < tail ? p[i] : T{};
}

template <int... kIndex>
struct Lanes {};
template <int kCount, int... kRest>
struct MakeLanes : MakeLanes<kCount - 1, kCount - 1, kRest...> {};
template <int... kIndex>
struct MakeLanes<0, kIndex...> {
  using Type = Lanes<kIndex...>;
};

/// Lane i of the result is lane kIndex[i] of `a` and `b` one after the other.
template <int... kIndex>
inline Vec shuffle(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, IntVec{kIndex...});
#endif
}

/// Three vectors of triples, x y z x y z ..., to the sum of each triple.
template <int... kLane>
inline Vec add_triples(const Vec (&triples)[3], Lanes<kLane...>) {
  auto number = [&]<int kNumber>() __attribute__((always_inline)) {
    // Number 3 * i + kNumber lies in one of the first two vectors, or else in the third.
    const Vec front = shuffle<(3 * kLane + kNumber < 2 * kLanes ? 3 * kLane + kNumber : 0)...>(triples[0], triples[1]);
    return shuffle<(3 * kLane + kNumber < 2 * kLanes ? kLane : 3 * kLane + kNumber - kLanes)...>(front, triples[2]);
  };
  return number.template operator()<0>() + number.template operator()<1>() + number.template operator()<2>();
}

/// The inverse: vector `kPart` of three in which each lane of `x` stands three times.
template <int kPart, int... kLane>
inline Vec repeat_thrice(Vec x, Lanes<kLane...>) {
  return shuffle<((kPart * kLanes + kLane) / 3)...>(x, x);
}

// Each stage takes time steps of this many numbers together, at least, before the next one reads what it wrote: read at
// once, with vectors that lie otherwise, they would wait for the writing.
constexpr int64_t kTogether = 1024;

struct Shape {
  explicit Shape(const Problem& p)
      : width(p.joints * p.channels),
        // A chunk of one token is copied as four numbers where there may be three.
        row(round_up(width, kLanes) + kLanes),
        numbers(p.patch * p.channels),
        steps(p.frames / p.patch),
        tokens(steps * p.joints),
        together(smaller(steps, (kTogether - 1) / (p.joints * numbers + 1) + 1)),
        per_number(1.0f / static_cast<float>(numbers)),
        per_freedom(1.0f / static_cast<float>(numbers - 1)),
        dense_clip(p.clip_channel == 1 && p.clip_joint == p.channels),
        dense_prediction(p.prediction_number == 1 && p.prediction_row == numbers) {}
  int64_t width, row, numbers, steps, tokens;
  int64_t together;  ///< time steps
  float per_number, per_freedom;
  bool dense_clip, dense_prediction;
};

struct Scratch {
  Scratch(const Problem& p, const Shape& shape, float* base) : used_(0), base_(base) {
    motion = take(shape.together * p.patch * shape.row);
    mean = take(shape.together * p.joints);
    inverse = take(shape.together * p.joints);
    // What the vectors left over last time, the tokens, and one that may be written and dropped.
    target = take((shape.together * p.joints + 1) * shape.numbers + 2 * kLanes);
    clip = take(shape.dense_clip ? 0 : p.frames * shape.width);
    prediction = take(shape.dense_prediction ? 0 : p.rows * shape.numbers);
  }
  int64_t used() const { return used_; }
  float *motion, *mean, *inverse, *target, *clip, *prediction;

 private:
  float* take(int64_t floats) {
    const int64_t at = used_;
    used_ += round_up(floats, 16);
    return base_ == nullptr ? nullptr : base_ + at;
  }
  int64_t used_;
  float* base_;
};

/// One time step: frames [0, frames) of the patch have a later frame, `ahead` floats further; the rest stand still.
struct Step {
  const float* now;
  float *motion, *mean, *inverse;
  int64_t between, ahead, frames;
};

/// Mean and 1 / sqrt(variance + 1e-6) of the motion of joints [v, v + kLanes), three channels each, and the motion. Two
/// passes over the motion, which may be a small wobble on a large drift.
inline void measure_triples(const Problem& p, const Shape& shape, const Step& at, int64_t v) {
  constexpr MakeLanes<kLanes>::Type lanes{};
  const int64_t row = shape.row, between = at.between, frames = at.frames;
  float* motion = at.motion + 3 * v;
  const float *from = at.now + 3 * v, *to = from + at.ahead;
  Vec sums[3]{}, squares[3];
  for (int64_t f = 0; f < frames; ++f, from += between, to += between, motion += row) {
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part) {
      const Vec moved = load(to + part * kLanes) - load(from + part * kLanes);
      store(motion + part * kLanes, moved);
      sums[part] += moved;
    }
  }
  if (!p.normalize) return;
  const Vec mean = add_triples(sums, lanes) * shape.per_number;
  store(at.mean + v, mean);
  const Vec means[3] = {repeat_thrice<0>(mean, lanes), repeat_thrice<1>(mean, lanes), repeat_thrice<2>(mean, lanes)};
  const float still = static_cast<float>(p.patch - frames);
#pragma GCC unroll 3
  for (int part = 0; part < 3; ++part) squares[part] = means[part] * means[part] * still;
  motion = at.motion + 3 * v;
  for (int64_t f = 0; f < frames; ++f, motion += row) {
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part) {
      const Vec off = load(motion + part * kLanes) - means[part];
      squares[part] += off * off;
    }
  }
  const Vec variance = add_triples(squares, lanes) * shape.per_freedom + 1e-6f;
  for (int i = 0; i < kLanes; ++i) at.inverse[v + i] = 1.0f / __builtin_sqrtf(variance[i]);
}

/// The same for one joint and any number of channels.
inline void measure_one(const Problem& p, const Shape& shape, const Step& at, int64_t v) {
  float* motion = at.motion + v * p.channels;
  const float *from = at.now + v * p.channels, *to = from + at.ahead;
  float sum = 0.0f;
  for (int64_t f = 0; f < at.frames; ++f) {
    for (int64_t c = 0; c < p.channels; ++c) {
      const float moved = to[f * at.between + c] - from[f * at.between + c];
      motion[f * shape.row + c] = moved;
      sum += moved;
    }
  }
  if (!p.normalize) return;
  const float mean = sum * shape.per_number;
  float squares = 0.0f;
  for (int64_t f = 0; f < p.patch; ++f) {
    for (int64_t c = 0; c < p.channels; ++c) {
      const float off = motion[f * shape.row + c] - mean;
      squares += off * off;
    }
  }
  at.mean[v] = mean;
  at.inverse[v] = 1.0f / __builtin_sqrtf(squares * shape.per_freedom + 1e-6f);
}

template <int kChannels>
void measure(const Problem& p, const Shape& shape, const Step& at) {
  for (int64_t f = at.frames; f < p.patch; ++f) {
    for (int64_t i = 0; i < shape.width; ++i) at.motion[f * shape.row + i] = 0.0f;
  }
  if (kChannels == 3 && p.joints >= kLanes) {
    for (int64_t v = 0; v < p.joints; v += kLanes) {
      // The last joints overlap those before, so that nothing past the row is touched.
      measure_triples(p, shape, at, smaller(v, p.joints - kLanes));
    }
  } else {
    for (int64_t v = 0; v < p.joints; ++v) measure_one(p, shape, at, v);
  }
}

/// The target of one token, `patch` chunks of motion that lie `row` apart, in the order of the prediction. Up to a Quad
/// past its end is overwritten.
template <int kChannels, int kPatch>
inline void write_target(const float* motion, int64_t row, float mean, float inverse, int64_t any_patch,
                         int64_t any_channels, float* to) {
  const int64_t channels = kChannels > 0 ? kChannels : any_channels, patch = kPatch > 0 ? kPatch : any_patch;
  if (kChannels == 3) {
    const Quad means = mean - Quad{}, inverses = inverse - Quad{};
#pragma GCC unroll 4
    for (int64_t f = 0; f < patch; ++f, motion += row, to += 3) {
      *reinterpret_cast<Quad*>(to) = (*reinterpret_cast<const Quad*>(motion) - means) * inverses;
    }
    return;
  }
  for (int64_t f = 0; f < patch; ++f, motion += row, to += channels) {
    for (int64_t c = 0; c < channels; ++c) to[c] = (motion[c] - mean) * inverse;
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

template <int kChannels, int kPatch, typename In, typename Out>
double sweep(const Problem& p, const Shape& shape, const Scratch& s, const float* clip, int64_t clip_step,
             const uint8_t* mask, const uint8_t* valid, const In* prediction, Out* gradient) {
  const int64_t numbers = shape.numbers, row = shape.row, patch = p.patch, channels = p.channels, joints = p.joints;
  DoubleVec total{};
  int64_t waiting = 0, done = 0;
  for (int64_t i = 0; i < shape.together * patch * row; ++i) s.motion[i] = 0.0f;
  for (int64_t i = 0; i < shape.together * joints; ++i) s.mean[i] = 0.0f, s.inverse[i] = 1.0f;
  for (int64_t first = 0; first < shape.steps; first += shape.together) {
    const int64_t steps = smaller(shape.together, shape.steps - first);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t frame = (first + t) * patch, moving = p.frames - p.stride - frame;
      measure<kChannels>(
          p, shape,
          {clip + frame * clip_step, s.motion + t * patch * row, s.mean + t * joints, s.inverse + t * joints, clip_step,
           p.stride * clip_step, smaller(patch, moving > 0 ? moving : 0)});
    }
    const int64_t tokens = steps * joints, rows_before = waiting;
    const uint8_t* masked = mask + first * joints * p.mask_token;
    for (int64_t t = 0, token = 0; t < steps; ++t) {
      const float* motion = s.motion + t * patch * row;
      for (int64_t v = 0; v < joints; ++v, ++token, motion += channels) {
        // Written in any case and kept when wanted: cheaper than a branch nobody can predict.
        write_target<kChannels, kPatch>(motion, row, s.mean[token], s.inverse[token], patch, channels,
                                        s.target + waiting);
        waiting += numbers & -static_cast<int64_t>(!p.masked_only || masked[token * p.mask_token] != 0);
      }
    }
    if (!p.masked_only || valid != nullptr) {
      // Where nothing is to be predicted, a target equal to the prediction adds nothing and has no gradient.
      int64_t at = rows_before;
      for (int64_t token = 0; token < tokens; ++token) {
        const bool hidden = masked[token * p.mask_token] != 0;
        if (p.masked_only && !hidden) continue;
        if (!hidden || (valid != nullptr && valid[(first * joints + token) * p.valid_token] == 0)) {
          for (int64_t i = 0; i < numbers; ++i) s.target[at + i] = as_float(prediction[done + at + i]);
        }
        at += numbers;
      }
    }
    const int64_t whole = waiting / kLanes * kLanes;
    compare(prediction + done, s.target, gradient != nullptr ? gradient + done : nullptr, p.scale, whole, total);
    store(s.target, load(s.target + whole));
    waiting -= whole;
    done += whole;
  }
  const int64_t tail = p.rows * numbers - done;
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
  const float* clip = p.clips + body * p.clip_body;
  int64_t step = p.clip_frame;
  if (!shape.dense_clip) {
    for (int64_t t = 0; t < p.frames; ++t) {
      for (int64_t v = 0; v < p.joints; ++v) {
        const float* from = clip + t * p.clip_frame + v * p.clip_joint;
        float* to = s.clip + t * shape.width + v * p.channels;
        for (int64_t c = 0; c < p.channels; ++c) to[c] = from[c * p.clip_channel];
      }
    }
    clip = s.clip;
    step = shape.width;
  }
  const uint8_t* mask = p.mask + body * p.mask_body;
  const uint8_t* valid = p.valid != nullptr ? p.valid + body * p.valid_body : nullptr;
  Out* gradient = static_cast<Out*>(p.gradient);
  if (gradient != nullptr) gradient += body * p.rows * shape.numbers;
  if (p.channels != 3) return sweep<0, 0>(p, shape, s, clip, step, mask, valid, prediction, gradient);
  if (p.patch != 4) return sweep<3, 0>(p, shape, s, clip, step, mask, valid, prediction, gradient);
  return sweep<3, 4>(p, shape, s, clip, step, mask, valid, prediction, gradient);
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

int64_t count_predicted(const Problem& p, int64_t body) {
  if (p.valid == nullptr) return count_masked(p, body);
  const uint8_t *mask = p.mask + body * p.mask_body, *valid = p.valid + body * p.valid_body;
  const int64_t tokens = Shape(p).tokens;
  int64_t count = 0;
  for (int64_t i = 0; i < tokens; ++i) count += mask[i * p.mask_token] != 0 && valid[i * p.valid_token] != 0;
  return count;
}

double body_loss(const Problem& p, float* scratch, int64_t body) {
  const Shape shape(p);
  const Scratch s(p, shape, scratch);
  const int64_t base = body * p.prediction_body;
  const float* single = static_cast<const float*>(p.prediction) + base;
  const uint16_t* half = static_cast<const uint16_t*>(p.prediction) + base;
  if (shape.dense_prediction) {
    return p.bfloat16 ? choose<uint16_t, uint16_t>(p, shape, s, body, half)
                      : choose<float, float>(p, shape, s, body, single);
  }
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t i = 0; i < shape.numbers; ++i) {
      const int64_t at = r * p.prediction_row + i * p.prediction_number;
      s.prediction[r * shape.numbers + i] = p.bfloat16 ? as_float(half[at]) : single[at];
    }
  }
  return p.bfloat16 ? choose<float, uint16_t>(p, shape, s, body, s.prediction)
                    : choose<float, float>(p, shape, s, body, s.prediction);
}

}  // namespace jmm_fast::motion_loss::JMM_ISA
