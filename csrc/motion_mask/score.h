#pragma once

#include <math.h>

#include "motion_mask/problem.h"
#include "philox.h"

// The draws of a body and the score of a token in double precision, for the host and for CUDA. Internal linkage: files
// compiled for different instruction sets include this.

namespace jmm_fast::motion_mask {

namespace {

/// The body's draws, where none are given.
JMM_HOST_DEVICE PhiloxStream draws_of(const Problem& p, int64_t body) {
  const int64_t clip = p.clip_ids != nullptr ? p.clip_ids[body] : body;
  const uint64_t epoch = p.epoch_at != nullptr ? static_cast<uint64_t>(*p.epoch_at) : p.epoch;
  return philox_stream(p.seed, Purpose::kMask, static_cast<uint64_t>(clip), epoch);
}

/// The score as the plain twin computes it, `step` > 0. Sizes other than 0 are known when compiling, and the
/// coordinates of a joint then lie side by side: each number is read once and stays in a register.
template <int kPatch = 0, int kCoordinates = 0>
JMM_HOST_DEVICE double exact_score(const Problem& p, const float* body, int64_t step, int64_t joint) {
  const int64_t patch = kPatch != 0 ? kPatch : p.patch, coordinates = kCoordinates != 0 ? kCoordinates : p.coordinates;
  const int64_t coordinate_stride = kCoordinates != 0 ? 1 : p.coordinate_stride;
  const float* from = body + joint * p.joint_stride + step * patch * p.frame_stride;
  const float* before = from - patch * p.frame_stride;
  double difference = 0, mean_a = 0, mean_b = 0;
  auto each = [&](auto&& take) {
    for (int64_t f = 0; f < patch; ++f) {
      for (int64_t c = 0; c < coordinates; ++c) {
        const int64_t at = f * p.frame_stride + c * coordinate_stride;
        take(static_cast<double>(from[at]), static_cast<double>(before[at]));
      }
    }
  };
  each([&](double a, double b) {
    difference += fabs(a - b);
    mean_a += a;
    mean_b += b;
  });
  const double n = static_cast<double>(patch * coordinates);
  difference /= n, mean_a /= n, mean_b /= n;
  if (p.variant == kMamp) return difference;
  double squares_a = 0, squares_b = 0, product = 0, products = 0;
  each([&](double a, double b) {
    a -= mean_a, b -= mean_b;
    squares_a += a * a;
    squares_b += b * b;
    product += a * b;
    products += fabs(a * b);
  });
  const double norm = sqrt(squares_a) * sqrt(squares_b) + 1e-10;
  if (p.variant == kReleased) return difference + products / norm / n;
  return p.gate * difference + (1 - p.gate) * fabs(product) / norm;
}

}  // namespace

}  // namespace jmm_fast::motion_mask
