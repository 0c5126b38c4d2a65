#pragma once

#include <cstdint>

// Plain structs only: this header is seen by translation units compiled for different instruction sets, so it must not
// bring inline functions whose copies the linker could mix up.

namespace jmm_fast::token_grid {

/// Clips `[B,T,V,C]` and the patches of `kept` tokens of each body, contiguous `[B,kept,patch * C]`. One of the two is
/// read and the other written; both are float32 or bfloat16.
struct Patches {
  int64_t frames, joints, channels, patch, kept;
  bool bfloat16;
  void* clips;
  int64_t clip_body, clip_frame, clip_joint, clip_channel;  ///< strides, in elements, as all others
  const int64_t* visible;
  int64_t visible_body, visible_token;
  void* patches;
};

/// Tokens `[B,kept,width]` and the grid `[B,steps * joints,width]`, each float32 or bfloat16 and dense in its rows.
struct Grid {
  int64_t bodies, kept, steps, joints, width;
  bool bfloat16_tokens, bfloat16_grid;
  const int64_t* restore;
  int64_t restore_body, restore_token;
  void* tokens;
  int64_t token_body, token_row;
  void* grid;
  int64_t grid_body, grid_row;
  const float *mask_token, *joint, *time;  ///< contiguous
};

#define JMM_DECLARE_KERNELS(isa)                                                                                   \
  namespace isa {                                                                                                  \
  void gather(const Patches&, int64_t body);                                                                       \
  /** Adds the patches of one body to its clip, which holds zeros. */                                              \
  void gather_backward(const Patches&, int64_t body);                                                              \
  /** Floats of scratch a thread needs for the two below. */                                                       \
  int64_t scatter_scratch(const Grid&);                                                                            \
  int64_t sum_scratch(const Grid&);                                                                                \
  /** The grid at one time step for bodies [begin, end). */                                                        \
  void scatter(const Grid&, float* scratch, int64_t step, int64_t begin, int64_t end);                             \
  /** Of the gradient of the grid at one time step, sums over the bodies: of each joint, [joints, width]; of all   \
      joints; and of the masked tokens. */                                                                         \
  void sum_step(const Grid&, float* scratch, int64_t step, float* joint_sums, float* time_sum, float* masked_sum); \
  /** Sum over time steps, `[steps, count]` to `[count]`. */                                                       \
  void sum_over_steps(const float* sums, int64_t steps, int64_t stride, int64_t count, float* total);              \
  /** The gradient of one body's tokens: rows of the gradient of the grid. */                                      \
  void tokens_backward(const Grid&, int64_t body);                                                                 \
  }

JMM_DECLARE_KERNELS(baseline)
JMM_DECLARE_KERNELS(avx2)
JMM_DECLARE_KERNELS(avx512)
JMM_DECLARE_KERNELS(avx512bf16)

#undef JMM_DECLARE_KERNELS

}  // namespace jmm_fast::token_grid
