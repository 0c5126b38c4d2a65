#pragma once

#include <cstdint>

// Plain structs only: this header is seen by the host compiler, by nvcc and by the tests.

namespace jmm_fast::topology_attention::cuda {

constexpr int kMostTokens = 128, kMostJoints = 64;
/// Bodies are summed into so many partial tables a head at most, which are then added in order; a constant, so that the
/// sums do not depend on the GPU. About two thousand blocks for eight heads.
constexpr int kMostParts = 256;

/// A `[B,H,N,D]` tensor of 16-bit floats.
struct View {
  void* data;
  int64_t body, head, token, channel;  ///< strides in elements
  bool wide;                           ///< eight channels are 16 bytes that a single instruction may read
};

enum Mode : int { kPlain = 0, kAdd = 1, kScale = 2 };

struct Problem {
  int64_t bodies;
  int heads, tokens, width, joints;
  View q, k, v;
  const float* table;    ///< [H,V,V] contiguous, or null when plain
  const int64_t* joint;  ///< what is not in [0, V) counts as 0
  int64_t joint_body, joint_token;
  float scale;
  Mode mode;
  bool bfloat16;
};

struct Forward {
  View out;
  float *most, *total;  ///< [B,H,N]: largest score of a query, sum of e^(score - most)
};

struct Backward {
  View grad, out, dq, dk, dv;
  const float *most, *total;
  float* partial;  ///< [H,parts,V,V]: gradient of the table over a part of the bodies
  int parts;
};

}  // namespace jmm_fast::topology_attention::cuda
