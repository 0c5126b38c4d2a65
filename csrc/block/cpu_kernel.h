#pragma once

#include <cstdint>

// Plain structs only: this header is seen by translation units compiled for different instruction sets, so it must not
// bring inline functions whose copies the linker could mix up.

namespace jmm_fast::block {

/// A contiguous `[rows, columns]` matrix, float32 or bfloat16; null data means there is none.
struct Matrix {
  void* data;
  int64_t columns;
  bool bfloat16;
};

/// LayerNorm over the columns of the input; a null weight means none.
struct Norm {
  const float *weight, *bias;
  float eps;
};

/// A weight as `pack` lays it out, and the bias added to its product (padded with zeros to whole panels, or null). A
/// word is one float, or in half precision two bfloat16 that are neighbours in depth.
struct Packed {
  const float *words, *bias;
  int64_t depth;  ///< in words
  int64_t columns;
};

/// Where backward leaves what a weight's gradient is made of, for a span of rows: `left` row by row, `right` panel by
/// panel; the gradient is `left^T right`. In half precision a word holds two rows.
struct Outer {
  float *left, *right;
  int64_t left_columns, left_stride, right_columns;
  int64_t span;  ///< rows of storage, in words
  float* sum;    ///< [left_columns, sum_stride]: the gradient so far
  int64_t sum_stride;
};

/// `y = [residual +] second(GELU(first(norm(x))))`, or `y = [residual +] first(norm(x))` when `second` has no words.
struct Forward {
  Matrix x, residual, y;
  const int64_t* source;  ///< row of x and residual that each row of y is made of, or null: the same
  Norm norm;
  Packed first, second;
  bool half;
};

/// Without words in `second`: `dx = [base +] norm'(grad first)`, `grad` being up to three matrices side by side. With
/// them, the MLP: `dx = [base +] norm'((grad second * GELU'(before)) first)`, `before = again(norm(x))`.
struct Backward {
  Matrix grad[3];
  Matrix base, x, dx;
  const int64_t* source;       ///< row of x and dx that each row of grad belongs to, or null: the same
  const int64_t* base_source;  ///< row of base that each row of dx takes (-1: none), or null: the same
  Norm norm;
  Packed again, second, first;
  Outer outer, outer2;  ///< for the gradients of `first` and of `second`
  bool half;
};

/// Rows [begin, begin + rows), the first being row `at` of its span. `sums` receives what these rows add to the
/// gradients of norm weight, norm bias, and the biases of `first` and `second`, one after another.
struct Piece {
  int64_t begin, rows, at;
  float* sums;
};

struct Pack {
  const float* weight;  ///< [out, in]
  int64_t out, in;
  bool forward;  ///< products go over `in` (x weight^T), else over `out` (grad weight)
  bool half;
  float* words;
};

#define JMM_DECLARE_KERNELS(isa)                                                                              \
  namespace isa {                                                                                             \
  /** Columns of a panel. */                                                                                  \
  int64_t panel_width();                                                                                      \
  /** Whether half precision products exist here; where not, bfloat16 tensors go through float32 products. */ \
  bool has_half();                                                                                            \
  void pack(const Pack&, int64_t panel);                                                                      \
  /** Floats of scratch for pieces of this many rows. */                                                      \
  int64_t forward_scratch(const Forward&, int64_t rows);                                                      \
  int64_t backward_scratch(const Backward&, int64_t rows);                                                    \
  void forward(const Forward&, float* scratch, int64_t begin, int64_t rows);                                  \
  void backward(const Backward&, float* scratch, const Piece&);                                               \
  /** Adds the products of the first `rows` rows of a span to `sum`, for one panel of `right`. */             \
  void outer(const Outer&, bool half, int64_t rows, int64_t panel);                                           \
  }

JMM_DECLARE_KERNELS(baseline)
JMM_DECLARE_KERNELS(avx2)
JMM_DECLARE_KERNELS(avx512)
JMM_DECLARE_KERNELS(avx512bf16)

#undef JMM_DECLARE_KERNELS

}  // namespace jmm_fast::block
