#pragma once

#include <cstdint>

// Plain structs only: this header is seen by translation units compiled for different instruction sets and by nvcc.

namespace jmm_fast::motion_mask {

enum Variant : int { kReleased = 0, kPaper = 1, kMamp = 2 };

struct Problem {
  const float* clips;  ///< [B,T,V,C], strides below in elements
  int64_t body_stride, frame_stride, joint_stride, coordinate_stride;
  int64_t bodies, steps, joints, coordinates, patch;  ///< steps: T / patch
  int64_t tokens, kept;                               ///< tokens: steps * joints
  Variant variant;
  double tau, gate;
  const float* uniform;  ///< [B,L] contiguous, or null for Philox
  uint64_t seed, epoch;
  const int64_t* clip_ids;  ///< [B] contiguous, or null for 0..B-1
  const bool* valid;        ///< [B,L] contiguous, which tokens were seen, or null for all
  const int64_t* epoch_at;  ///< where the epoch lies when the mask is drawn, or null for `epoch`
};

struct Result {
  int64_t *visible, *restore;  ///< [B,K], [B,L]
  bool* mask;                  ///< [B,L]
  float* probability;          ///< [B,L]
};

}  // namespace jmm_fast::motion_mask
