// Attention with a joint-pair term, one (body, head) at a time. Compiled once per instruction set (JMM_ISA).
//
// Scores are made in blocks of kQueries x kKeys that stay in the caches; a running maximum and sum join the key blocks,
// so no buffer grows with N^2. The table row of a query's joint is expanded over all keys once per head (once per body
// and head when joints differ between bodies), after which the term costs one vector load per score vector. The
// table's gradient is summed the same way, in rows over keys, and folded into joints at the end.
//
// Everything here has internal linkage or lives in the namespace of the instruction set, and no standard template is
// instantiated: the linker would keep one copy of it, perhaps one this processor cannot run.

#include "topology_attention/cpu_kernel.h"

#include "vec.h"

namespace jmm_fast::topology_attention::JMM_ISA {

namespace {

#if JMM_LANES == 16
// 24 of the 32 registers accumulate; the rest hold the row of B and the broadcast element of A.
constexpr int kScoreRows = 8, kScoreVectors = 3, kWideRows = 12, kNarrowRows = 16;
#elif JMM_LANES == 8
constexpr int kScoreRows = 4, kScoreVectors = 3, kWideRows = 6, kNarrowRows = 8;
#else
constexpr int kScoreRows = 4, kScoreVectors = 2, kWideRows = 4, kNarrowRows = 8;
#endif

constexpr int kScoreTile = kScoreVectors * kLanes;
constexpr int kQueries = 48;
constexpr int kKeys = 384;
// One cache line more than a power of two times something: rows of a block must not share cache sets.
constexpr int kRow = kKeys + 16;

// ---- Reading and writing tensors of any strides --------------------------------------------------------------------

inline float element(const View& view, bool bfloat16, int64_t offset) {
  if (!bfloat16) return static_cast<const float*>(view.data)[offset];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(view.data)[offset]) << 16;
  return __builtin_bit_cast(float, bits);
}

inline int64_t start(const View& view, int64_t body, int64_t head) { return body * view.body + head * view.head; }

/// Rows [begin, end) to `to[i * stride + d]`, zeros up to `padded` channels.
void pack_rows(const View& view, bool bfloat16, int64_t base, int64_t begin, int64_t end, int64_t width, int64_t padded,
               float* __restrict to, int64_t stride) {
  for (int64_t i = begin; i < end; ++i, to += stride) {
    const int64_t row = base + i * view.token;
    if (!bfloat16 && view.channel == 1) {
      const float* from = static_cast<const float*>(view.data) + row;
      for (int64_t d = 0; d < width; ++d) to[d] = from[d];
    } else {
      for (int64_t d = 0; d < width; ++d) to[d] = element(view, bfloat16, row + d * view.channel);
    }
    for (int64_t d = width; d < padded; ++d) to[d] = 0.0f;
  }
}

/// `from[i * from_stride + d]` to `to[d * to_stride + i]`, zeros up to `padded` columns.
void transpose(const float* __restrict from, int64_t from_stride, int64_t rows, int64_t width, int64_t padded,
               float* __restrict to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int64_t n = smaller(kLanes, rows - i);
    for (int64_t d = 0; d < width; ++d) {
      if (n == kLanes) {
        for (int l = 0; l < kLanes; ++l) to[d * to_stride + i + l] = from[(i + l) * from_stride + d];
      } else {
        for (int64_t l = 0; l < n; ++l) to[d * to_stride + i + l] = from[(i + l) * from_stride + d];
      }
    }
  }
  for (int64_t d = 0; d < width; ++d) {
    for (int64_t i = rows; i < padded; ++i) to[d * to_stride + i] = 0.0f;
  }
}

/// One row, times `factor`.
void write_row(const View& view, bool bfloat16, int64_t base, int64_t i, int64_t width, const float* __restrict from,
               float factor) {
  const int64_t row = base + i * view.token;
  if (!bfloat16) {
    float* to = static_cast<float*>(view.data) + row;
    for (int64_t d = 0; d < width; ++d) to[d * view.channel] = from[d] * factor;
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(view.data) + row;
  for (int64_t d = 0; d < width; ++d) {
    const float value = from[d] * factor;
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    // Round to nearest even; a NaN must not round up to infinity.
    to[d * view.channel] = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
  }
}

// ---- Small matrix products
// -------------------------------------------------------------------------------------------

/// acc[r][c] = sum over t < depth of a[r * kARow + t * kADepth] * b[t * b_stride + c * lanes]. The strides of A are
/// constants, so that its rows need no pointers of their own.
template <int kRows, int kVectors, int kARow, int kADepth, typename Epilogue>
[[gnu::always_inline]] inline void tile(const float* __restrict a, const float* __restrict b, int64_t b_stride,
                                        int64_t depth, Epilogue&& epilogue) {
  Vec acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) acc[r][c] = Vec{};
  }
  for (int64_t t = 0; t < depth; ++t) {
    Vec row[kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) row[c] = load(b + c * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = splat(a[r * kARow]);
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) acc[r][c] += x * row[c];
    }
    a += kADepth;
    b += b_stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) epilogue(r, c, acc[r][c]);
  }
}

/// Scores of `rows` packed queries (`a[d * kQueries + i]`) against `keys` columns of `b[d * b_stride + j]`; the
/// epilogue gets (row, column, vector). Columns outside, rows inside: a tile of B stays in the first cache.
template <typename Epilogue>
void scores(const float* a, int64_t rows, const float* b, int64_t b_stride, int64_t keys, int64_t depth,
            Epilogue&& epilogue) {
  int64_t j = 0;
  auto sweep = [&]<int kVectors>() __attribute__((always_inline)) {
    int64_t i = 0;
    auto row_tile = [&]<int kRows>() __attribute__((always_inline)) {
      tile<kRows, kVectors, 1, kQueries>(a + i, b + j, b_stride, depth,
                                         [&](int r, int c, Vec x)
                                             __attribute__((always_inline)) { epilogue(i + r, j + c * kLanes, x); });
      i += kRows;
    };
    while (i + kScoreRows <= rows) row_tile.template operator()<kScoreRows>();
    if (kScoreRows > 4 && i + 4 <= rows) row_tile.template operator()<4>();
    if (i + 2 <= rows) row_tile.template operator()<2>();
    if (i < rows) row_tile.template operator()<1>();
    j += kVectors * kLanes;
  };
  while (j + kScoreTile <= keys) sweep.template operator()<kScoreVectors>();
  if (kScoreVectors > 2 && j + 2 * kLanes <= keys) sweep.template operator()<2>();
  if (j < keys) sweep.template operator()<1>();
}

/// c[i * width + d] (+)= sum over t < depth of a[i * kARow + t * kADepth] * b[t * width + d]; width is whole vectors.
template <int kARow, int kADepth>
void accumulate(const float* a, int64_t rows, const float* b, int64_t width, int64_t depth, float* c, bool add) {
  int64_t d = 0;
  auto sweep = [&]<int kVectors, int kMost>() __attribute__((always_inline)) {
    int64_t i = 0;
    auto row_tile = [&]<int kRows>() __attribute__((always_inline)) {
      float* to = c + i * width + d;
      tile<kRows, kVectors, kARow, kADepth>(a + i * kARow, b + d, width, depth,
                                            [&](int r, int v, Vec x) __attribute__((always_inline)) {
                                              float* at = to + r * width + v * kLanes;
                                              store(at, add ? load(at) + x : x);
                                            });
      i += kRows;
    };
    while (i + kMost <= rows) row_tile.template operator()<kMost>();
    if (kMost > 8 && i + 8 <= rows) row_tile.template operator()<8>();
    if (kMost > 4 && i + 4 <= rows) row_tile.template operator()<4>();
    while (i + 2 <= rows) row_tile.template operator()<2>();
    if (i < rows) row_tile.template operator()<1>();
    d += kVectors * kLanes;
  };
  while (d + 2 * kLanes <= width) sweep.template operator()<2, kWideRows>();
  if (d < width) sweep.template operator()<1, kNarrowRows>();
}

// ---- The joint-pair term
// ---------------------------------------------------------------------------------------------

class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* take(int64_t floats) {
    const int64_t at = used_;
    used_ += round_up(floats, 16);
    return base_ == nullptr ? nullptr : base_ + at;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

/// Sizes that follow from the problem.
struct Shape {
  explicit Shape(const Problem& p)
      : padded_keys(round_up(p.tokens, kLanes)),
        // An odd number of cache lines from row to row, again for the sake of the cache sets.
        key_stride(round_up(p.tokens, 16) + (round_up(p.tokens, 16) % 32 == 0 ? 16 : 0)),
        padded_width(round_up(p.width, kLanes)),
        term_rows(p.table != nullptr ? p.joints : 1) {
    const int64_t blocks = (p.tokens + kKeys - 1) / kKeys;
    key_block = blocks > 0 ? round_up((p.tokens + blocks - 1) / blocks, kScoreTile) : kScoreTile;
    if (key_block > kKeys) key_block = kKeys;
  }
  int64_t padded_keys, key_stride, padded_width, term_rows, key_block;
};
static_assert(kKeys % kScoreTile == 0);

/// The table of one head expanded over keys. A score is `x * factor + term` (add) or `x * term + mask`
/// (multiply), x being q.k; columns past the last key are -infinity.
struct Term {
  float* rows;       // [term_rows, key_stride]
  float* mask;       // [key_stride], 0 and -infinity
  int32_t* columns;  // [tokens]: the joint of each key
  float factor;
};

Term take_term(const Shape& shape, Arena& arena) {
  Term term;
  term.rows = arena.take(shape.term_rows * shape.key_stride);
  term.mask = arena.take(shape.key_stride);
  term.columns = reinterpret_cast<int32_t*>(arena.take(shape.key_stride));
  return term;
}

void expand(const Problem& p, const Shape& shape, Worker& worker, int64_t body, int64_t head, Term& term) {
  term.factor = p.scale;
  if (worker.term_head == head) return;
  for (int64_t j = 0; j < shape.key_stride; ++j) term.mask[j] = j < p.tokens ? 0.0f : -kInfinity;
  const float past = p.multiply && p.table != nullptr ? 0.0f : -kInfinity;
  if (p.table == nullptr) {
    for (int64_t j = 0; j < shape.key_stride; ++j) term.rows[j] = term.mask[j];
  } else {
    const int64_t* joint = p.joint + body * p.joint_body;
    for (int64_t j = 0; j < p.tokens; ++j) term.columns[j] = static_cast<int32_t>(joint[j * p.joint_token]);
    const float factor = p.multiply ? p.scale : 1.0f;
    const float* table = p.table + head * p.joints * p.joints;
    for (int64_t v = 0; v < p.joints; ++v, table += p.joints) {
      float* __restrict row = term.rows + v * shape.key_stride;
      const int32_t* __restrict columns = term.columns;
      for (int64_t j = 0; j < p.tokens; ++j) row[j] = table[columns[j]] * factor;
      for (int64_t j = p.tokens; j < shape.key_stride; ++j) row[j] = past;
    }
  }
  // Bodies that share their joints share the expansion: the next body of this head finds it done.
  worker.term_head = p.joint_body == 0 ? head : -1;
}

/// The term's row for each query of a block.
void find_rows(const Problem& p, const Shape& shape, const Term& term, int64_t begin, int64_t rows, int64_t* offset) {
  for (int64_t i = 0; i < rows; ++i) {
    offset[i] = p.table != nullptr ? term.columns[begin + i] * shape.key_stride : 0;
  }
}

// ---- Forward
// -----------------------------------------------------------------------------------------------------------

struct ForwardScratch {
  ForwardScratch(const Problem& p, const Shape& shape, float* base) : arena(base) {
    term = take_term(shape, arena);
    keys = arena.take(p.width * shape.key_stride);
    values = arena.take((p.tokens + 1) * shape.padded_width);
    rows = arena.take(p.tokens * shape.padded_width);
    queries = arena.take(p.width * kQueries);
    block = arena.take(kQueries * kRow);
    sums = arena.take(kQueries * shape.padded_width);
  }
  Arena arena;
  Term term;
  float *keys, *values, *rows, *queries, *block, *sums;
};

/// Scores of a block, with each row's maximum.
template <bool kMultiply>
void score_block(const Shape& shape, const ForwardScratch& s, const int64_t* offset, int64_t rows, int64_t width,
                 int64_t key, int64_t keys, Vec* largest) {
  const Vec factor = splat(s.term.factor);
  const float *term = s.term.rows + key, *mask = s.term.mask + key;
  float* block = s.block;
  scores(s.queries, rows, s.keys + key, shape.key_stride, keys, width,
         [=](int64_t i, int64_t j, Vec x) __attribute__((always_inline)) {
           const Vec at = load(term + offset[i] + j);
           const Vec y = kMultiply ? x * at + load(mask + j) : x * factor + at;
           largest[i] = larger(y, largest[i]);
           store(block + i * kRow + j, y);
         });
}

}  // namespace

int64_t forward_scratch(const Problem& p) { return ForwardScratch(p, Shape(p), nullptr).arena.used(); }

void forward(const Problem& p, const Forward& f, Worker& worker, int64_t body, int64_t head, int64_t begin,
             int64_t end) {
  const Shape shape(p);
  ForwardScratch s(p, shape, worker.scratch);
  expand(p, shape, worker, body, head, s.term);
  const int64_t out_width = shape.padded_width;
  pack_rows(p.k, p.bfloat16, start(p.k, body, head), 0, p.tokens, p.width, p.width, s.rows, p.width);
  transpose(s.rows, p.width, p.tokens, p.width, shape.key_stride, s.keys, shape.key_stride);
  pack_rows(p.v, p.bfloat16, start(p.v, body, head), 0, p.tokens, p.width, out_width, s.values, out_width);
  const bool multiply = p.multiply && p.table != nullptr;

  for (int64_t i0 = begin; i0 < end; i0 += kQueries) {
    const int64_t rows = smaller(kQueries, end - i0);
    int64_t offset[kQueries];
    find_rows(p, shape, s.term, i0, rows, offset);
    pack_rows(p.q, p.bfloat16, start(p.q, body, head), i0, i0 + rows, p.width, p.width, s.rows, p.width);
    transpose(s.rows, p.width, rows, p.width, rows, s.queries, kQueries);
    float peak[kQueries], total[kQueries];
    for (int64_t i = 0; i < rows; ++i) peak[i] = -kInfinity, total[i] = 0.0f;

    for (int64_t key = 0; key < p.tokens; key += shape.key_block) {
      const int64_t keys = smaller(shape.key_block, shape.padded_keys - key);
      Vec largest[kQueries];
      for (int64_t i = 0; i < rows; ++i) largest[i] = splat(-kInfinity);
      if (multiply) {
        score_block<true>(shape, s, offset, rows, p.width, key, keys, largest);
      } else {
        score_block<false>(shape, s, offset, rows, p.width, key, keys, largest);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const float now = max_lanes(largest[i]);
        const float top = now > peak[i] ? now : peak[i];
        // A row whose every term so far is -infinity has no maximum to take off; all its weights are 0.
        const Vec shift = splat(top == -kInfinity ? 0.0f : top);
        float* row = s.block + i * kRow;
        Vec sum{}, sum_odd{};
        int64_t j = 0;
        for (; j + 2 * kLanes <= keys; j += 2 * kLanes) {
          const Vec even = exp_nonpositive(load(row + j) - shift);
          const Vec odd = exp_nonpositive(load(row + j + kLanes) - shift);
          store(row + j, even);
          store(row + j + kLanes, odd);
          sum += even;
          sum_odd += odd;
        }
        if (j < keys) {
          const Vec even = exp_nonpositive(load(row + j) - shift);
          store(row + j, even);
          sum += even;
        }
        if (key > 0 && top != peak[i]) {
          const float shrink = exp_nonpositive(splat(peak[i]) - shift)[0];
          total[i] *= shrink;
          for (int64_t d = 0; d < out_width; ++d) s.sums[i * out_width + d] *= shrink;
        }
        peak[i] = top;
        total[i] += sum_lanes(sum + sum_odd);
      }
      accumulate<kRow, 1>(s.block, rows, s.values + key * out_width, out_width, smaller(keys, p.tokens - key), s.sums,
                          key > 0);
    }

    const int64_t base = start(f.out, body, head);
    float* lse = f.lse + (body * p.heads + head) * p.tokens + i0;
    for (int64_t i = 0; i < rows; ++i) {
      write_row(f.out, p.bfloat16, base, i0 + i, p.width, s.sums + i * out_width, 1.0f / total[i]);
      lse[i] = peak[i] + __builtin_logf(total[i]);
    }
  }
}

// ---- Backward
// ----------------------------------------------------------------------------------------------------------

namespace {

struct BackwardScratch {
  BackwardScratch(const Problem& p, const Shape& shape, float* base) : arena(base) {
    const int64_t rows = p.tokens * shape.padded_width;
    term = take_term(shape, arena);
    keys_across = arena.take(p.width * shape.key_stride);
    values_across = arena.take(p.width * shape.key_stride);
    keys = arena.take(rows);
    dkeys = arena.take(rows);
    dvalues = arena.take(rows);
    queries_across = arena.take(p.width * kQueries);
    grads_across = arena.take(p.width * kQueries);
    outs_across = arena.take(p.width * kQueries);
    queries = arena.take(kQueries * shape.padded_width);
    grads = arena.take(kQueries * shape.padded_width);
    outs = arena.take(kQueries * shape.padded_width);
    dqueries = arena.take(kQueries * shape.padded_width);
    weights = arena.take(kQueries * kRow);
    dscores = arena.take(kQueries * kRow);
    products = p.multiply ? arena.take(kQueries * kRow) : nullptr;
    dterm = p.table != nullptr ? arena.take(shape.term_rows * shape.key_stride) : nullptr;
  }
  Arena arena;
  Term term;
  float *keys_across, *values_across, *keys, *dkeys, *dvalues, *queries_across, *grads_across, *outs_across, *queries,
      *grads, *outs, *dqueries, *weights, *dscores, *products, *dterm;
};

/// Weights and score gradients of a block; `dscores` becomes the gradient of q.k up to a factor that all share.
template <bool kMultiply, bool kTable>
void gradient_block(const Shape& shape, const BackwardScratch& s, const int64_t* offset, const float* lse,
                    const float* delta, int64_t rows, int64_t width, int64_t key, int64_t keys) {
  const Vec factor = splat(s.term.factor);
  const float *term = s.term.rows + key, *mask = s.term.mask + key;
  float *weights = s.weights, *dscores = s.dscores, *products = s.products, *dterm = kTable ? s.dterm + key : nullptr;
  scores(s.queries_across, rows, s.keys_across + key, shape.key_stride, keys, width,
         [=](int64_t i, int64_t j, Vec x) __attribute__((always_inline)) {
           const Vec at = load(term + offset[i] + j);
           const Vec y = kMultiply ? x * at + load(mask + j) : x * factor + at;
           store(weights + i * kRow + j, exp_nonpositive(y - lse[i]));
           if (kMultiply) store(products + i * kRow + j, x);
         });
  scores(s.grads_across, rows, s.values_across + key, shape.key_stride, keys, width,
         [=](int64_t i, int64_t j, Vec x) __attribute__((always_inline)) {
           const Vec dscore = load(weights + i * kRow + j) * (x - delta[i]);
           if (kTable) {
             float* to = dterm + offset[i] + j;
             store(to, load(to) + (kMultiply ? dscore * load(products + i * kRow + j) : dscore));
           }
           store(dscores + i * kRow + j, kMultiply ? dscore * load(term + offset[i] + j) : dscore);
         });
}

}  // namespace

int64_t backward_scratch(const Problem& p) { return BackwardScratch(p, Shape(p), nullptr).arena.used(); }

void backward(const Problem& p, const Backward& g, Worker& worker, int64_t body, int64_t head, double* dtable) {
  const Shape shape(p);
  BackwardScratch s(p, shape, worker.scratch);
  expand(p, shape, worker, body, head, s.term);
  const int64_t padded = shape.padded_width;
  const bool multiply = p.multiply && p.table != nullptr;

  pack_rows(p.v, p.bfloat16, start(p.v, body, head), 0, p.tokens, p.width, padded, s.keys, padded);
  transpose(s.keys, padded, p.tokens, p.width, shape.key_stride, s.values_across, shape.key_stride);
  pack_rows(p.k, p.bfloat16, start(p.k, body, head), 0, p.tokens, p.width, padded, s.keys, padded);
  transpose(s.keys, padded, p.tokens, p.width, shape.key_stride, s.keys_across, shape.key_stride);
  if (p.table != nullptr) {
    for (int64_t j = 0; j < shape.term_rows * shape.key_stride; ++j) s.dterm[j] = 0.0f;
  }
  // The gradient reaches q and k through scale * q.k, whose factor is left out of the blocks: `scale` when adding;
  // when multiplying, the term has it already.
  const float inner = multiply ? 1.0f : p.scale;

  for (int64_t i0 = 0; i0 < p.tokens; i0 += kQueries) {
    const int64_t rows = smaller(kQueries, p.tokens - i0);
    int64_t offset[kQueries];
    find_rows(p, shape, s.term, i0, rows, offset);
    pack_rows(p.q, p.bfloat16, start(p.q, body, head), i0, i0 + rows, p.width, padded, s.queries, padded);
    transpose(s.queries, padded, rows, p.width, rows, s.queries_across, kQueries);
    pack_rows(g.grad_out, p.bfloat16, start(g.grad_out, body, head), i0, i0 + rows, p.width, padded, s.grads, padded);
    transpose(s.grads, padded, rows, p.width, rows, s.grads_across, kQueries);
    pack_rows(g.out, p.bfloat16, start(g.out, body, head), i0, i0 + rows, p.width, padded, s.outs, padded);
    float delta[kQueries];
    const float* lse = g.lse + (body * p.heads + head) * p.tokens + i0;
    transpose(s.outs, padded, rows, p.width, rows, s.outs_across, kQueries);
    // The same order of additions as in the products with the values: a query that attends to one key alone, whose
    // output is that key's value, gets a gradient of exactly zero.
    for (int64_t i = 0; i < rows; ++i) delta[i] = 0.0f;
    for (int64_t d = 0; d < p.width; ++d) {
      const float *grad = s.grads_across + d * kQueries, *out = s.outs_across + d * kQueries;
      for (int64_t i = 0; i < rows; ++i) delta[i] += grad[i] * out[i];
    }

    for (int64_t key = 0; key < p.tokens; key += shape.key_block) {
      const int64_t keys = smaller(shape.key_block, shape.padded_keys - key);
      const int64_t valid = smaller(keys, p.tokens - key);
      if (multiply) {
        gradient_block<true, true>(shape, s, offset, lse, delta, rows, p.width, key, keys);
      } else if (p.table != nullptr) {
        gradient_block<false, true>(shape, s, offset, lse, delta, rows, p.width, key, keys);
      } else {
        gradient_block<false, false>(shape, s, offset, lse, delta, rows, p.width, key, keys);
      }
      accumulate<1, kRow>(s.weights, valid, s.grads, padded, rows, s.dvalues + key * padded, i0 > 0);
      accumulate<1, kRow>(s.dscores, valid, s.queries, padded, rows, s.dkeys + key * padded, i0 > 0);
      accumulate<kRow, 1>(s.dscores, rows, s.keys + key * padded, padded, valid, s.dqueries, key > 0);
    }
    const int64_t base = start(g.dq, body, head);
    for (int64_t i = 0; i < rows; ++i) {
      write_row(g.dq, p.bfloat16, base, i0 + i, p.width, s.dqueries + i * padded, inner);
    }
  }

  const int64_t dk_base = start(g.dk, body, head), dv_base = start(g.dv, body, head);
  for (int64_t j = 0; j < p.tokens; ++j) {
    write_row(g.dk, p.bfloat16, dk_base, j, p.width, s.dkeys + j * padded, inner);
    write_row(g.dv, p.bfloat16, dv_base, j, p.width, s.dvalues + j * padded, 1.0f);
  }
  if (p.table != nullptr) {
    const double outer = multiply ? p.scale : 1.0;
    for (int64_t v = 0; v < p.joints; ++v) {
      const float* row = s.dterm + v * shape.key_stride;
      for (int64_t j = 0; j < p.tokens; ++j) dtable[v * p.joints + s.term.columns[j]] += outer * row[j];
    }
  }
}

}  // namespace jmm_fast::topology_attention::JMM_ISA
