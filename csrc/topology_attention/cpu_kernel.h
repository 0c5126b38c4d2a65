#pragma once

#include <cstdint>

// Plain structs only: this header is seen by translation units compiled for different instruction sets, so it must not
// bring inline functions whose copies the linker could mix up.

namespace jmm_fast::topology_attention {

/// A `[B,H,N,D]` tensor of any strides (in elements), float32 or bfloat16.
struct View {
  void* data;
  int64_t body, head, token, channel;
};

struct Problem {
  int64_t bodies, heads, tokens, width, joints;
  View q, k, v;
  const float* table;  ///< [H,V,V], or null for plain attention
  const int64_t* joint;
  int64_t joint_body, joint_token;  ///< strides of `joint`; the first is 0 when all bodies share their joints
  float scale;
  bool multiply, bfloat16;
};

/// Softmax statistics of each query, [B,H,N] contiguous: a weight is 2^(score * log2(e) - shift) / total, the shift an
/// integer.
template <typename T>
struct Statistics {
  T *shift, *total;
};

struct Forward {
  View out;
  Statistics<float> statistics;
};

struct Backward {
  View grad_out, out, dq, dk, dv;
  Statistics<const float> statistics;
};

/// What one thread keeps between its tasks.
struct Worker {
  float* scratch;     ///< 64-byte aligned
  int64_t term_head;  ///< the head whose expanded table `scratch` holds, -1 for none
};

#define JMM_DECLARE_KERNELS(isa)                                                                                   \
  namespace isa {                                                                                                  \
  /** Floats of scratch a worker needs. */                                                                         \
  int64_t forward_scratch(const Problem&);                                                                         \
  int64_t backward_scratch(const Problem&);                                                                        \
  /** Queries [begin, end) of one body and head. */                                                                \
  void forward(const Problem&, const Forward&, Worker&, int64_t body, int64_t head, int64_t begin, int64_t end);   \
  /** One body and head; adds the gradient of the head's table to `dtable` [V,V] (may be null without a table). */ \
  void backward(const Problem&, const Backward&, Worker&, int64_t body, int64_t head, double* dtable);             \
  }

JMM_DECLARE_KERNELS(baseline)
JMM_DECLARE_KERNELS(avx2)
JMM_DECLARE_KERNELS(avx512)
JMM_DECLARE_KERNELS(avx512bf16)

#undef JMM_DECLARE_KERNELS

}  // namespace jmm_fast::topology_attention
