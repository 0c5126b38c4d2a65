#pragma once

#include <cstdint>

#include "motion_mask/problem.h"

// This header is seen by translation units compiled for different instruction sets, so it must not bring inline
// functions whose copies the linker could mix up.

namespace jmm_fast::motion_mask {

#define JMM_DECLARE_KERNELS(isa)                                                                  \
  namespace isa {                                                                                 \
  /** Floats of scratch a thread needs. */                                                        \
  int64_t scratch(const Problem&);                                                                \
  /** Draws the mask of one body. Returns whether keys had to be compared in double precision. */ \
  bool draw(const Problem&, const Result&, float* scratch, int64_t body);                         \
  }

JMM_DECLARE_KERNELS(baseline)
JMM_DECLARE_KERNELS(avx2)
JMM_DECLARE_KERNELS(avx512)
JMM_DECLARE_KERNELS(avx512bf16)

#undef JMM_DECLARE_KERNELS

}  // namespace jmm_fast::motion_mask
