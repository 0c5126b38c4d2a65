#pragma once

#include <cstdint>

// Plain structs only: this header is seen by translation units compiled for different instruction sets, so it must not
// bring inline functions whose copies the linker could mix up.

namespace jmm_fast::motion_loss {

struct Problem {
  int64_t frames, joints, channels, patch, stride;
  int64_t rows;  ///< of the prediction, per body: all tokens, or the masked ones
  bool masked_only, normalize, bfloat16;
  float scale;  ///< of the gradient: 2 / (predicted tokens * numbers per token)

  const float* clips;
  int64_t clip_body, clip_frame, clip_joint, clip_channel;  ///< strides, in elements, as all others
  const uint8_t* mask;
  int64_t mask_body, mask_token;
  const uint8_t* valid;  ///< tokens whose motion is known, or null: all
  int64_t valid_body, valid_token;
  const void* prediction;
  int64_t prediction_body, prediction_row, prediction_number;
  void* gradient;  ///< [bodies, rows, patch * channels] contiguous in the dtype of the prediction, or null
};

#define JMM_DECLARE_KERNELS(isa)                                                           \
  namespace isa {                                                                          \
  /** Floats of scratch a thread needs. */                                                 \
  int64_t scratch(const Problem&);                                                         \
  int64_t count_masked(const Problem&, int64_t body);                                      \
  /** Masked tokens whose motion is known. */                                              \
  int64_t count_predicted(const Problem&, int64_t body);                                   \
  /** Sum of squared errors of these tokens of a body; writes the gradient when wanted. */ \
  double body_loss(const Problem&, float* scratch, int64_t body);                          \
  }

JMM_DECLARE_KERNELS(baseline)
JMM_DECLARE_KERNELS(avx2)
JMM_DECLARE_KERNELS(avx512)
JMM_DECLARE_KERNELS(avx512bf16)

#undef JMM_DECLARE_KERNELS

}  // namespace jmm_fast::motion_loss
