// The halves of a transformer block, a few dozen rows at a time: LayerNorm, products, GELU, bias and residual without
// leaving the caches. Compiled once per instruction set (JMM_ISA).
//
// A product takes rows from a scratch matrix cut into blocks of kBlock columns, whose rows lie kStride apart: a
// constant, so that the rows of a tile need no pointers of their own. Weights come packed in panels of kPanel columns.
// Half precision differs in the multiply-add alone: a 32-bit word is then a pair of bfloat16 that are neighbours in
// depth.
//
// Everything here has internal linkage or lives in the namespace of the instruction set, and no standard template is
// instantiated: the linker would keep one copy of it, perhaps one this processor cannot run.

#include "block/cpu_kernel.h"

#if defined(JMM_ISA_avx512bf16)
  #include <immintrin.h>
#endif

#include "vec.h"

namespace jmm_fast::block::JMM_ISA {

namespace {

#if defined(JMM_ISA_avx512bf16)
constexpr bool kHasHalf = true;
#else
constexpr bool kHasHalf = false;
#endif

// Two vectors of columns and as many rows as leave registers for the two vectors of B and a broadcast element.
constexpr int kTileRows = kLanes == 16 ? 12 : 6;
constexpr int kPanel = 2 * kLanes;
constexpr int kBlock = 256;
// One cache line more than a power of two: rows of a tile must not share cache sets.
constexpr int kStride = kBlock + 16;
// Columns of rows in flight are padded to this, so that they are whole vectors before and after pairing.
constexpr int kPad = 2 * kPanel;

// ---- Words ---------------------------------------------------------------------------------------------------------

inline float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline uint16_t rounded(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  // Round to nearest even; a NaN must not round up to infinity.
  return value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float pair(float low, float high) {
  return from_bits(rounded(low) | static_cast<uint32_t>(rounded(high)) << 16);
}

#if defined(JMM_ISA_avx512bf16)
inline Vec multiply_add_pairs(Vec sum, const float* a, Vec b) {
  const __m512i x = _mm512_set1_epi32(*reinterpret_cast<const int*>(a));
  return reinterpret_cast<Vec>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(b)));
}

typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));
typedef uint32_t WordVec __attribute__((vector_size(kLanes * 4)));

inline WordVec widened(Vec x) {
  return __builtin_convertvector(reinterpret_cast<HalfVec>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x))), WordVec);
}

/// Words of two rows: `low` in the low halves.
inline Vec pair_rows(Vec low, Vec high) { return reinterpret_cast<Vec>(widened(low) | widened(high) << 16); }

/// Words of 32 neighbours of one row.
inline Vec pair_columns(const float* from) {
  return reinterpret_cast<Vec>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(load(from + kLanes)), reinterpret_cast<__m512>(load(from))));
}
#else
// Never called: half precision is not offered here.
inline Vec multiply_add_pairs(Vec sum, const float*, Vec) { return sum; }
inline Vec pair_rows(Vec low, Vec) { return low; }
inline Vec pair_columns(const float* from) { return load(from); }
#endif

// ---- Products ------------------------------------------------------------------------------------------------------

/// c[r * c_stride + j] = (c +) sum over t < depth of a(r, t) * b[t * kPanel + j]; a(r, t) is a[r * kStride + t], or
/// with kOuter a[r + t * a_stride].
template <bool kHalf, int kRows, bool kOuter>
void tile(const float* __restrict a, int64_t a_stride, const float* __restrict b, int64_t depth, float* __restrict c,
          int64_t c_stride, bool add) {
  Vec sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = sum[r][1] = Vec{};
  }
  for (int64_t t = 0; t < depth; ++t) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const float* x = a + (kOuter ? r : r * kStride);
      if (kHalf) {
        sum[r][0] = multiply_add_pairs(sum[r][0], x, b0);
        sum[r][1] = multiply_add_pairs(sum[r][1], x, b1);
      } else {
        sum[r][0] += splat(*x) * b0;
        sum[r][1] += splat(*x) * b1;
      }
    }
    a += kOuter ? a_stride : 1;
    b += kPanel;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    float* to = c + r * c_stride;
    store(to, add ? load(to) + sum[r][0] : sum[r][0]);
    store(to + kLanes, add ? load(to + kLanes) + sum[r][1] : sum[r][1]);
  }
}

template <bool kHalf, bool kOuter>
void tiles(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t depth, float* c, int64_t c_stride,
           bool add) {
  int64_t i = 0;
  auto step = [&]<int kRows>() __attribute__((always_inline)) {
    tile<kHalf, kRows, kOuter>(a + (kOuter ? i : i * kStride), a_stride, b, depth, c + i * c_stride, c_stride, add);
    i += kRows;
  };
  while (i + kTileRows <= rows) step.template operator()<kTileRows>();
  if (kTileRows > 8 && i + 8 <= rows) step.template operator()<8>();
  if (i + 4 <= rows) step.template operator()<4>();
  if (i + 2 <= rows) step.template operator()<2>();
  if (i < rows) step.template operator()<1>();
}

/// Scratch matrix of `rows` rows, cut into blocks of kBlock columns.
struct Cut {
  float* data;
  int64_t rows;
  float* at(int64_t row, int64_t column) const {
    return data + (column / kBlock * rows + row) * kStride + column % kBlock;
  }
};

template <bool kHalf>
void product_of(const Cut& a, int64_t rows, const Packed& b, const Cut& c) {
  for (int64_t j = 0; j < b.columns; j += kPanel) {
    for (int64_t t = 0; t < b.depth; t += kBlock) {
      tiles<kHalf, false>(a.at(0, t), 0, rows, b.words + j * b.depth + t * kPanel, smaller(kBlock, b.depth - t),
                          c.at(0, j), kStride, t > 0);
    }
  }
}

/// c = a b, without b's bias.
void product(bool half, const Cut& a, int64_t rows, const Packed& b, const Cut& c) {
  if (kHasHalf && half) {
    product_of<kHasHalf>(a, rows, b, c);
  } else {
    product_of<false>(a, rows, b, c);
  }
}

// ---- Rows ----------------------------------------------------------------------------------------------------------

void read_row(const Matrix& from, int64_t row, float* __restrict to) {
  const int64_t n = from.columns;
  if (from.bfloat16) {
    const uint16_t* at = static_cast<const uint16_t*>(from.data) + row * n;
    for (int64_t j = 0; j < n; ++j) to[j] = from_bits(static_cast<uint32_t>(at[j]) << 16);
  } else {
    const float* at = static_cast<const float*>(from.data) + row * n;
    for (int64_t j = 0; j < n; ++j) to[j] = at[j];
  }
}

void clear(float* to, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) to[j] = 0.0f;
}

void write_row(const Matrix& to, int64_t row, const float* __restrict from) {
  const int64_t n = to.columns;
  if (to.bfloat16) {
    uint16_t* at = static_cast<uint16_t*>(to.data) + row * n;
    for (int64_t j = 0; j < n; ++j) at[j] = rounded(from[j]);
  } else {
    float* at = static_cast<float*>(to.data) + row * n;
    for (int64_t j = 0; j < n; ++j) at[j] = from[j];
  }
}

inline int64_t row_of(const int64_t* source, int64_t row) { return source != nullptr ? source[row] : row; }

/// A padded row to row `i` of a cut matrix.
void put_row(const float* from, int64_t columns, const Cut& to, int64_t i) {
  for (int64_t j = 0; j < columns; j += kLanes) store(to.at(i, j), load(from + j));
}

/// The same as operand of a product in half precision.
void put_words(const float* from, int64_t columns, const Cut& to, int64_t i) {
  for (int64_t j = 0; j < columns; j += kPanel) store(to.at(i, j / 2), pair_columns(from + j));
}

struct Moments {
  float mean, scale;
};

/// `to = (from - mean) / sqrt(variance + eps) * weight + bias`.
Moments normalize(const Norm& norm, const float* from, int64_t columns, float* to) {
  Vec total{};
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) total += load(from + j);
  float sum = sum_lanes(total);
  for (int64_t j = whole; j < columns; ++j) sum += from[j];
  const float mean = sum / static_cast<float>(columns);
  total = Vec{};
  for (int64_t j = 0; j < whole; j += kLanes) {
    const Vec d = load(from + j) - mean;
    total += d * d;
  }
  sum = sum_lanes(total);
  for (int64_t j = whole; j < columns; ++j) sum += (from[j] - mean) * (from[j] - mean);
  const float scale = 1.0f / __builtin_sqrtf(sum / static_cast<float>(columns) + norm.eps);
  for (int64_t j = 0; j < whole; j += kLanes) {
    store(to + j, (load(from + j) - mean) * scale * load(norm.weight + j) + load(norm.bias + j));
  }
  for (int64_t j = whole; j < columns; ++j) to[j] = (from[j] - mean) * scale * norm.weight[j] + norm.bias[j];
  return {mean, scale};
}

// ---- GELU ----------------------------------------------------------------------------------------------------------

struct Normal {
  Vec below, density;
};

/// The standard normal distribution, absolute error of `below` under 2e-7.
inline Normal normal(Vec x) {
  // P(X < -z) = e^(-z^2 / 2) q(1 / (1 + 0.28 z)) for z >= 0 with a polynomial q, fitted for the least greatest error
  // of the product (1.1e-8).
  constexpr float c1 = 0.116728851f, c2 = 0.0662313136f, c3 = 0.271967692f, c4 = -0.240663519f, c5 = 0.392063259f,
                  c6 = -0.106327608f;
  constexpr float inverse_root = 0.398942280f;  // 1 / sqrt(2 pi)
  const Vec z = x < 0.0f ? -x : x;
  const Vec e = exp_nonpositive(z * z * -0.5f);
  const Vec t = 1.0f / (z * 0.28f + 1.0f);
  const Vec tail = e * ((((((c6 * t + c5) * t + c4) * t + c3) * t + c2) * t + c1) * t);
  return {x < 0.0f ? tail : 1.0f - tail, e * inverse_root};
}

// ---- Scratch -------------------------------------------------------------------------------------------------------

class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* take(int64_t floats) {
    const int64_t at = used_;
    used_ += round_up(floats, 16);
    return base_ == nullptr ? nullptr : base_ + at;
  }
  Cut cut(int64_t rows, int64_t columns) { return {take((columns + kBlock - 1) / kBlock * rows * kStride), rows}; }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

int64_t padded(int64_t columns) { return round_up(columns, kPad); }

struct ForwardScratch {
  ForwardScratch(const Forward& f, int64_t rows, float* base) : arena(base) {
    const int64_t widest =
        f.second.words != nullptr && f.second.columns > f.first.columns ? f.second.columns : f.first.columns;
    const int64_t row_width = padded(f.x.columns > widest ? f.x.columns : widest);
    row = arena.take(row_width);
    row2 = arena.take(row_width);
    input = arena.cut(rows, padded(f.x.columns));
    output = arena.cut(rows, padded(widest));
    if (f.second.words != nullptr) hidden = arena.cut(rows, padded(f.first.columns));
  }
  Arena arena;
  float *row, *row2;
  Cut input{}, output{}, hidden{};
};

struct BackwardScratch {
  BackwardScratch(const Backward& g, int64_t rows, float* base) : arena(base) {
    grads = g.grad[0].columns + g.grad[1].columns + g.grad[2].columns;
    const bool mlp = g.second.words != nullptr;
    hidden_columns = mlp ? g.again.columns : 0;
    int64_t widest = grads > g.x.columns ? grads : g.x.columns;
    if (hidden_columns > widest) widest = hidden_columns;
    row = arena.take(padded(widest));
    row2 = arena.take(padded(widest));
    mean = arena.take(rows);
    scale = arena.take(rows);
    input = arena.cut(rows, padded(g.x.columns));
    grad = arena.cut(rows, padded(grads));
    result = arena.cut(rows, padded(g.x.columns));
    if (g.half) words = arena.cut(rows, padded(widest));
    if (mlp) {
      before = arena.cut(rows, padded(hidden_columns));
      dbefore = arena.cut(rows, padded(hidden_columns));
    }
  }
  Arena arena;
  float *row, *row2, *mean, *scale;
  Cut input{}, grad{}, result{}, words{}, before{}, dbefore{};
  int64_t grads, hidden_columns;
};

// ---- What the gradients of weights are made of ---------------------------------------------------------------------

/// Columns of `from` to where `to(word row, column)` says, pairing rows in half precision; their sums to `sums` unless
/// that is null.
template <typename To>
void spread(bool half, const Cut& from, int64_t rows, int64_t columns, float* sums, To&& to) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const float* x = from.at(0, j);
    Vec total{};
    if (half) {
      for (int64_t i = 0; i < rows; i += 2, x += 2 * kStride) {
        const Vec low = load(x), high = i + 1 < rows ? load(x + kStride) : Vec{};
        total += low + high;
        store(to(i / 2, j), pair_rows(low, high));
      }
    } else {
      for (int64_t i = 0; i < rows; ++i, x += kStride) {
        const Vec value = load(x);
        total += value;
        store(to(i, j), value);
      }
    }
    if (sums != nullptr) {
      if (j + kLanes <= columns) {
        store(sums + j, total);
      } else {
        for (int64_t l = 0; j + l < columns; ++l) sums[j + l] = total[l];
      }
    }
  }
}

void put_left(const Outer& to, bool half, const Cut& from, const Piece& piece, float* sums) {
  float* base = to.left + (half ? piece.at / 2 : piece.at) * to.left_stride;
  const int64_t stride = to.left_stride;
  spread(half, from, piece.rows, to.left_columns, sums, [=](int64_t i, int64_t j) { return base + i * stride + j; });
}

void put_right(const Outer& to, bool half, const Cut& from, const Piece& piece, float* sums) {
  float* base = to.right + (half ? piece.at / 2 : piece.at) * kPanel;
  const int64_t span = to.span;
  spread(half, from, piece.rows, to.right_columns, sums,
         [=](int64_t i, int64_t j) { return base + (j / kPanel * span + i) * kPanel + j % kPanel; });
}

/// A scratch matrix as operand of a product.
Cut operand(bool half, const Cut& from, int64_t rows, int64_t columns, const Cut& words) {
  if (!half) return from;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += kPanel) store(words.at(i, j / 2), pair_columns(from.at(i, j)));
  }
  return words;
}

}  // namespace

int64_t panel_width() { return kPanel; }
bool has_half() { return kHasHalf; }

void pack(const Pack& p, int64_t panel) {
  const int64_t columns = p.forward ? p.out : p.in, depth = p.forward ? p.in : p.out;
  const int64_t along = p.forward ? 1 : p.in, across = p.forward ? p.in : 1;
  const int64_t words = p.half ? (depth + 1) / 2 : depth;
  float* to = p.words + panel * kPanel * words;
  for (int64_t t = 0; t < words; ++t, to += kPanel) {
    for (int64_t l = 0; l < kPanel; ++l) {
      const int64_t j = panel * kPanel + l;
      const float* from = p.weight + j * across;
      if (j >= columns) {
        to[l] = 0.0f;
      } else if (p.half) {
        to[l] = pair(from[2 * t * along], 2 * t + 1 < depth ? from[(2 * t + 1) * along] : 0.0f);
      } else {
        to[l] = from[t * along];
      }
    }
  }
}

int64_t forward_scratch(const Forward& f, int64_t rows) { return ForwardScratch(f, rows, nullptr).arena.used(); }

void forward(const Forward& f, float* scratch, int64_t begin, int64_t rows) {
  const ForwardScratch s(f, rows, scratch);
  const int64_t width = f.x.columns;
  clear(s.row, width, padded(width));
  clear(s.row2, width, padded(width));
  for (int64_t i = 0; i < rows; ++i) {
    read_row(f.x, row_of(f.source, begin + i), s.row);
    const float* from = s.row;
    if (f.norm.weight != nullptr) {
      normalize(f.norm, s.row, width, s.row2);
      from = s.row2;
    }
    if (kHasHalf && f.half) {
      put_words(from, padded(width), s.input, i);
    } else {
      put_row(from, padded(width), s.input, i);
    }
  }

  const Packed* last = &f.first;
  if (f.second.words == nullptr) {
    product(f.half, s.input, rows, f.first, s.output);
  } else {
    product(f.half, s.input, rows, f.first, s.hidden);
    // GELU(0) = 0: columns of padding stay zero.
    const int64_t columns = round_up(f.first.columns, kPanel);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; j += kPanel) {
        float* at = s.hidden.at(i, j);
        for (int l = 0; l < kPanel; l += kLanes) {
          const Vec x = load(at + l) + load(f.first.bias + j + l);
          store(at + l, x * normal(x).below);
        }
        if (kHasHalf && f.half) store(s.hidden.at(i, j / 2), pair_columns(at));
      }
    }
    product(f.half, s.hidden, rows, f.second, s.output);
    last = &f.second;
  }

  for (int64_t i = 0; i < rows; ++i) {
    const int64_t columns = last->columns;
    if (f.residual.data != nullptr) {
      read_row(f.residual, row_of(f.source, begin + i), s.row);
    } else {
      clear(s.row, 0, columns);
    }
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec x = load(s.output.at(i, j));
      if (last->bias != nullptr) x += load(last->bias + j);
      store(s.row + j, load(s.row + j) + x);
    }
    write_row(f.y, begin + i, s.row);
  }
}

int64_t backward_scratch(const Backward& g, int64_t rows) { return BackwardScratch(g, rows, nullptr).arena.used(); }

void backward(const Backward& g, float* scratch, const Piece& piece) {
  const BackwardScratch s(g, piece.rows, scratch);
  const int64_t rows = piece.rows, width = g.x.columns;
  const bool half = kHasHalf && g.half, mlp = g.second.words != nullptr, normed = g.norm.weight != nullptr;
  float* dnorm_weight = piece.sums;
  float* dnorm_bias = dnorm_weight + (normed ? width : 0);
  float* dfirst = dnorm_bias + (normed ? width : 0);
  float* dsecond = dfirst + (mlp ? s.hidden_columns : s.grads);

  for (int64_t i = 0; i < rows; ++i) {
    read_row(g.x, row_of(g.source, piece.begin + i), s.row);
    if (normed) {
      const Moments moments = normalize(g.norm, s.row, width, s.row);
      s.mean[i] = moments.mean, s.scale[i] = moments.scale;
    }
    clear(s.row, width, padded(width));
    put_row(s.row, padded(width), s.input, i);
    int64_t j = 0;
    for (const Matrix& grad : g.grad) {
      if (grad.data != nullptr) read_row(grad, piece.begin + i, s.row + j);
      j += grad.columns;
    }
    clear(s.row, s.grads, padded(s.grads));
    put_row(s.row, padded(s.grads), s.grad, i);
  }

  if (!mlp) {
    product(half, operand(half, s.grad, rows, padded(s.grads), s.words), rows, g.first, s.result);
    if (normed) {
      put_left(g.outer, half, s.input, piece, nullptr);
      put_right(g.outer, half, s.grad, piece, dfirst);
    } else {
      put_left(g.outer, half, s.grad, piece, dfirst);
      put_right(g.outer, half, s.input, piece, nullptr);
    }
  } else {
    product(half, operand(half, s.input, rows, padded(width), s.words), rows, g.again, s.before);
    product(half, operand(half, s.grad, rows, padded(s.grads), s.words), rows, g.second, s.dbefore);
    const int64_t columns = round_up(s.hidden_columns, kPanel);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        float *at = s.before.at(i, j), *dat = s.dbefore.at(i, j);
        const Vec x = load(at) + load(g.again.bias + j);
        const Normal n = normal(x);
        store(at, x * n.below);
        store(dat, load(dat) * (n.below + x * n.density));
      }
      for (int64_t j = columns; j < padded(columns); j += kLanes) store(s.dbefore.at(i, j), Vec{});
    }
    put_left(g.outer, half, s.input, piece, nullptr);
    put_right(g.outer, half, s.dbefore, piece, dfirst);
    put_left(g.outer2, half, s.grad, piece, dsecond);
    put_right(g.outer2, half, s.before, piece, nullptr);
    product(half, operand(half, s.dbefore, rows, padded(s.hidden_columns), s.words), rows, g.first, s.result);
  }

  if (normed) clear(piece.sums, 0, 2 * width);
  const float share = 1.0f / static_cast<float>(width);
  for (int64_t i = 0; i < rows; ++i) {
    if (!normed) {
      for (int64_t j = 0; j < width; j += kLanes) store(s.row + j, load(s.result.at(i, j)));
      write_row(g.dx, row_of(g.source, piece.begin + i), s.row);
      continue;
    }
    read_row(g.x, piece.begin + i, s.row);
    const float mean = s.mean[i], scale = s.scale[i];
    const int64_t whole = width / kLanes * kLanes;
    Vec along{}, total{};
    float along_rest = 0.0f, total_rest = 0.0f;
    for (int64_t j = 0; j < whole; j += kLanes) {
      const Vec d = load(s.result.at(i, j)), x = (load(s.row + j) - mean) * scale, dx = d * load(g.norm.weight + j);
      store(dnorm_weight + j, load(dnorm_weight + j) + d * x);
      store(dnorm_bias + j, load(dnorm_bias + j) + d);
      store(s.row + j, x);
      store(s.row2 + j, dx);
      along += dx * x;
      total += dx;
    }
    for (int64_t j = whole; j < width; ++j) {
      const float d = *s.result.at(i, j), x = (s.row[j] - mean) * scale, dx = d * g.norm.weight[j];
      dnorm_weight[j] += d * x;
      dnorm_bias[j] += d;
      s.row[j] = x, s.row2[j] = dx;
      along_rest += dx * x;
      total_rest += dx;
    }
    const float a = (sum_lanes(along) + along_rest) * share, b = (sum_lanes(total) + total_rest) * share;
    for (int64_t j = 0; j < width; j += kLanes) {
      store(s.row2 + j, (load(s.row2 + j) - b - load(s.row + j) * a) * scale);
    }
    const int64_t added = g.base.data != nullptr ? row_of(g.base_source, piece.begin + i) : -1;
    if (added >= 0) {
      read_row(g.base, added, s.row);
      for (int64_t j = 0; j < width; j += kLanes) store(s.row2 + j, load(s.row2 + j) + load(s.row + j));
    }
    write_row(g.dx, piece.begin + i, s.row2);
  }
}

void outer(const Outer& o, bool half, int64_t rows, int64_t panel) {
  const bool pairs = kHasHalf && half;
  const int64_t words = pairs ? (rows + 1) / 2 : rows;
  const float* right = o.right + panel * o.span * kPanel;
  float* sum = o.sum + panel * kPanel;
  for (int64_t t = 0; t < words; t += kBlock) {
    const float *a = o.left + t * o.left_stride, *b = right + t * kPanel;
    const int64_t depth = smaller(kBlock, words - t);
    if (pairs) {
      tiles<kHasHalf, true>(a, o.left_stride, o.left_columns, b, depth, sum, o.sum_stride, true);
    } else {
      tiles<false, true>(a, o.left_stride, o.left_columns, b, depth, sum, o.sum_stride, true);
    }
  }
}

}  // namespace jmm_fast::block::JMM_ISA
