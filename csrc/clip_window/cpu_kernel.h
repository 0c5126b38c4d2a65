#pragma once

#include <cstdint>

// Plain structs only: this header is seen by translation units compiled for different instruction sets, so it must not
// bring inline functions whose copies the linker could mix up.

namespace jmm_fast::clip_window {

struct Problem {
  const float* frames;  ///< [F,V,3], strides below in elements
  int64_t frame_stride, joint_stride, coordinate_stride;
  int64_t rows, joints, window;   ///< rows: F
  const int64_t *start, *length;  ///< [B], each window inside the frames
  const double* rotation;         ///< [B,3,3] contiguous, or null
  float* out;                     ///< [B,window,V,3] contiguous
};

#define JMM_DECLARE_KERNELS(isa)                          \
  namespace isa {                                         \
  /** Floats of scratch a thread needs. */                \
  int64_t scratch(const Problem&);                        \
  /** The window of one clip. */                          \
  void cut(const Problem&, float* scratch, int64_t clip); \
  }

JMM_DECLARE_KERNELS(baseline)
JMM_DECLARE_KERNELS(avx2)
JMM_DECLARE_KERNELS(avx512)
JMM_DECLARE_KERNELS(avx512bf16)

#undef JMM_DECLARE_KERNELS

}  // namespace jmm_fast::clip_window
