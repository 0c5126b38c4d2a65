// Attention with a joint-pair term, one (body, head) at a time. Compiled once per instruction set (JMM_ISA).
//
// Scores are made in tiles that stay in registers and turn into weights there; blocks of kQueries x kKeys weights stay
// in the caches, so no buffer grows with N^2. The table row of a query's joint is expanded over all keys once per head
// (once per body and head when joints differ between bodies), after which the term costs one vector load per score
// vector. The table's gradient is summed the same way, in rows over keys, and folded into joints at the end.
//
// A weight needs a number near its row's largest score before that is known. |q_i| max_j |k_j| bounds the products, the
// table row its term; where the bound is so far above the row that weights would drown, the block is done again with
// the true maximum. Either is rounded up to a power of two, so that taking it off rounds nothing.
//
// Operands are packed into 32-bit words: a float32 each, or where the processor multiplies bfloat16, two bfloat16 that
// follow each other in the direction of the sum. One word of A times a vector of words of B is one instruction in both
// cases, so both share all that follows.
//
// Everything here has internal linkage or lives in the namespace of the instruction set, and no standard template is
// instantiated: the linker would keep one copy of it, perhaps one this processor cannot run.

#include "topology_attention/cpu_kernel.h"

#include "bfloat16.h"

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
/// Long chains of float32 sums round as often as they are long: half as many keys cost 1 % and save 10 % of the error.
constexpr int kFloatKeys = 192;
constexpr int kWidth = 128;
// An odd number of cache lines: rows of a block must not share cache sets.
constexpr int kRow = kKeys + 16;
constexpr int kQueryRow = kWidth + 16;
/// Degree of the polynomial in exp2: weights that are rounded to bfloat16 need no better one.
constexpr int kFloatTerms = 5, kHalfTerms = 3;
/// Below this sum the weights of a row are taken again from its true maximum: 2^-126 is then 2^-86 of the sum at most.
constexpr float kLeastTotal = 9.094947e-13f;  // 2^-40

// ---- Words ---------------------------------------------------------------------------------------------------------

template <bool kPairs>
constexpr int64_t words(int64_t elements) {
  return kPairs ? (elements + 1) / 2 : elements;
}

template <bool kPairs>
[[gnu::always_inline]] inline void multiply_add(Vec& sum, Vec a, Vec b) {
#if defined(JMM_ISA_avx512bf16)
  if constexpr (kPairs) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    return;
  }
#endif
  sum += a * b;
}

/// A word in all lanes; as an integer, for two bfloat16 may look like a signalling NaN.
[[gnu::always_inline]] inline Vec splat_word(const float* word) {
  const IntVec all = *reinterpret_cast<const IntWord*>(word) - IntVec{};
  return reinterpret_cast<const Vec&>(all);
}

inline int64_t start(const View& view, int64_t body, int64_t head) { return body * view.body + head * view.head; }

/// Copies `bytes`; rows are short, and a call for each would cost as much as the copy.
inline void copy(void* to, const void* from, int64_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  int64_t done = 0;
  for (; done + int64_t{sizeof(Vec)} <= bytes; done += sizeof(Vec))
    __builtin_memcpy(out + done, in + done, sizeof(Vec));
  for (; done < bytes; done += 2) __builtin_memcpy(out + done, in + done, 2);
}

/// Elements of row `i` to `to`, zeros up to `padded` of them: floats, or bfloat16 where kPairs.
template <bool kPairs>
inline void pack_row(const View& view, bool bfloat16, int64_t base, int64_t i, int64_t width, int64_t padded,
                     float* to) {
  const int64_t row = base + i * view.token, step = view.channel;
  if (kPairs || bfloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(view.data) + row;
    if constexpr (!kPairs) {
      for (int64_t d = 0; d < width; ++d) to[d] = as_float(from[d * step]);
    } else if (step == 1) {
      copy(to, from, width * 2);
    } else {
      for (int64_t d = 0; d < width; ++d) reinterpret_cast<Half*>(to)[d] = from[d * step];
    }
  } else {
    const float* from = static_cast<const float*>(view.data) + row;
    if (step == 1) {
      copy(to, from, width * 4);
    } else {
      for (int64_t d = 0; d < width; ++d) to[d] = from[d * step];
    }
  }
  for (int64_t d = width; d < padded; ++d) {
    if constexpr (kPairs) {
      reinterpret_cast<Half*>(to)[d] = 0;
    } else {
      to[d] = 0.0f;
    }
  }
}

/// Rows [begin, end) one after another, `stride` words apart.
template <bool kPairs>
void pack_rows(const View& view, bool bfloat16, int64_t base, int64_t begin, int64_t end, int64_t width, int64_t padded,
               float* to, int64_t stride) {
  for (int64_t i = begin; i < end; ++i, to += stride) {
    pack_row<kPairs>(view, bfloat16, base, i, width, padded, to);
  }
}

/// Two rows of bfloat16 as one row of words, each with the element of the first in its lower half.
inline void interleave(const float* first, const float* second, int64_t elements, float* to) {
  const Half* __restrict a = reinterpret_cast<const Half*>(first), * __restrict b =
                                                                       reinterpret_cast<const Half*>(second);
  IntWord* __restrict out = reinterpret_cast<IntWord*>(to);
  for (int64_t d = 0; d < elements; ++d) {
    out[d] = static_cast<int32_t>(static_cast<uint32_t>(a[d]) | static_cast<uint32_t>(b[d]) << 16);
  }
}

/// Rows [begin, end) as the right side of a product that sums over rows: as they are, or rows in pairs.
template <bool kPairs>
void pack_summed_rows(const View& view, bool bfloat16, int64_t base, int64_t begin, int64_t end, int64_t width,
                      int64_t padded, float* to) {
  if constexpr (!kPairs) {
    pack_rows<false>(view, bfloat16, base, begin, end, width, padded, to, padded);
  } else {
    alignas(64) float two[2][kWidth / 2];
    for (int64_t i = begin; i < end; i += 2, to += padded) {
      pack_row<true>(view, true, base, i, width, padded, two[0]);
      if (i + 1 < end) {
        pack_row<true>(view, true, base, i + 1, width, padded, two[1]);
      } else {
        for (int64_t d = 0; d < padded / 2; ++d) two[1][d] = 0.0f;
      }
      interleave(two[0], two[1], padded, to);
    }
  }
}

#if JMM_LANES == 16
/// Square of words, in place of rows its columns.
[[gnu::always_inline]] inline void transpose_square(__m512 (&x)[16]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  // Each round shuffles row i with row i + 8, as a deck of cards; after four rounds every card is in its column.
  #pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
    __m512 y[16];
  #pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = _mm512_permutex2var_ps(x[i], low, x[i + 8]);
      y[2 * i + 1] = _mm512_permutex2var_ps(x[i], high, x[i + 8]);
    }
  #pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
}
#endif

/// `to[d * stride + i]` = word d of row i, for kLanes rows, which are kFrom words apart.
template <int kFrom>
inline void transpose(const float* __restrict from, int64_t depth, float* __restrict to, int64_t stride) {
#if JMM_LANES == 16
  for (int64_t d = 0; d < depth; d += 16) {
    __m512 x[16];
  #pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_ps(from + i * kFrom + d);
    transpose_square(x);
    const int64_t n = smaller(16, depth - d);
    for (int64_t i = 0; i < n; ++i) _mm512_storeu_ps(to + (d + i) * stride, x[i]);
  }
#else
  for (int64_t d = 0; d < depth; ++d) {
    for (int64_t i = 0; i < kLanes; ++i) to[d * stride + i] = from[i * kFrom + d];
  }
#endif
}

/// All rows, transposed: `to[d * stride + i]`, zeros for the rows that fill the last vector.
template <bool kPairs>
void pack_across(const View& view, bool bfloat16, int64_t base, int64_t count, int64_t width, float* to,
                 int64_t stride) {
  alignas(64) float rows[kLanes * kWidth];
  const int64_t depth = words<kPairs>(width), padded = round_up(width, 32);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = smaller(kLanes, count - i);
    pack_rows<kPairs>(view, bfloat16, base, i, i + n, width, padded, rows, kWidth);
    for (int64_t r = n; r < kLanes; ++r) {
      for (int64_t d = 0; d < words<kPairs>(padded); ++d) rows[r * kWidth + d] = 0.0f;
    }
    transpose<kWidth>(rows, depth, to + i, stride);
  }
}

#if defined(JMM_ISA_avx512bf16)
/// Vector of bfloat16 in the order of the floats.
[[gnu::always_inline]] inline void store_halves(Half* to, Vec x) {
  const __m256bh halves = _mm512_cvtneps_pbh(x);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(halves));
}

/// Vector of words with the elements of two rows.
[[gnu::always_inline]] inline void store_pairs(float* to, Vec first, Vec second) {
  const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(both)));
}
#endif

template <typename T>
inline void write_row(T* to, int64_t step, int64_t width, const float* __restrict from, float factor) {
  int64_t d = 0;
  if (step == 1) {
    for (; d + kLanes <= width; d += kLanes) store_any(to + d, load(from + d) * factor);
  }
  for (; d < width; ++d) store_any(to + d * step, from[d] * factor);
}

/// One row, times `factor`.
inline void write_row(const View& view, bool bfloat16, int64_t base, int64_t i, int64_t width, const float* from,
                      float factor) {
  const int64_t row = base + i * view.token;
  if (bfloat16) {
    write_row(static_cast<uint16_t*>(view.data) + row, view.channel, width, from, factor);
  } else {
    write_row(static_cast<float*>(view.data) + row, view.channel, width, from, factor);
  }
}

// ---- Small matrix products -----------------------------------------------------------------------------------------

/// acc[r][c] = sum over t < depth of a[r * kARow + t * kADepth] * b[t * b_stride + c * lanes], in words. The strides of
/// A are constants, so that its rows need no pointers of their own.
template <bool kPairs, int kRows, int kVectors, int kARow, int kADepth>
[[gnu::always_inline]] inline void product(const float* __restrict a, const float* __restrict b, int64_t b_stride,
                                           int64_t depth, Vec (&acc)[kRows][kVectors]) {
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
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) multiply_add<kPairs>(acc[r][c], splat_word(a + r * kARow), row[c]);
    }
    a += kADepth;
    b += b_stride;
  }
}

/// Calls `f.operator()<rows, vectors>(i, j)` for the tiles of an even number of rows and whole vectors of keys. Columns
/// outside, rows inside: a tile of B stays in the first cache.
template <typename F>
[[gnu::always_inline]] inline void for_score_tiles(int64_t rows, int64_t keys, F&& f) {
  int64_t j = 0;
  auto sweep = [&]<int kVectors>() __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kScoreRows <= rows; i += kScoreRows) f.template operator()<kScoreRows, kVectors>(i, j);
    if (kScoreRows > 4 && i + 4 <= rows) {
      f.template operator()<4, kVectors>(i, j);
      i += 4;
    }
    if (i < rows) f.template operator()<2, kVectors>(i, j);
    j += kVectors * kLanes;
  };
  while (j + kScoreTile <= keys) sweep.template operator()<kScoreVectors>();
  if (kScoreVectors > 2 && j + 2 * kLanes <= keys) sweep.template operator()<2>();
  if (j < keys) sweep.template operator()<1>();
}

/// c[i * width + d] (+)= sum over t < depth of a[i * kARow + t * kADepth] * b[t * b_stride + d]; width is whole
/// vectors.
template <bool kPairs, int kARow, int kADepth>
void accumulate(const float* a, int64_t rows, const float* b, int64_t b_stride, int64_t width, int64_t depth, float* c,
                bool add) {
  int64_t d = 0;
  auto sweep = [&]<int kVectors, int kMost>() __attribute__((always_inline)) {
    int64_t i = 0;
    auto row_tile = [&]<int kRows>() __attribute__((always_inline)) {
      Vec acc[kRows][kVectors];
      product<kPairs, kRows, kVectors, kARow, kADepth>(a + i * kARow, b + d, b_stride, depth, acc);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          float* at = c + (i + r) * width + d + v * kLanes;
          store(at, add ? load(at) + acc[r][v] : acc[r][v]);
        }
      }
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

// ---- The joint-pair term -------------------------------------------------------------------------------------------

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

/// Whether bfloat16 stays bfloat16 in the products.
inline bool pairs(const Problem& p) {
#if defined(JMM_ISA_avx512bf16)
  return p.bfloat16;
#else
  static_cast<void>(p);
  return false;
#endif
}

/// Sizes that follow from the problem.
struct Shape {
  explicit Shape(const Problem& p)
      : padded_keys(round_up(p.tokens, kLanes)),
        // An odd number of cache lines from row to row, again for the sake of the cache sets.
        key_stride(round_up(p.tokens, 16) + (round_up(p.tokens, 16) % 32 == 0 ? 16 : 0)),
        padded_width(round_up(p.width, kLanes)),
        term_rows(p.table != nullptr ? p.joints : 1) {
    const int64_t most = pairs(p) ? kKeys : kFloatKeys, blocks = (p.tokens + most - 1) / most;
    key_block = blocks > 0 ? round_up((p.tokens + blocks - 1) / blocks, kScoreTile) : kScoreTile;
    if (key_block > most) key_block = most;
  }
  int64_t padded_keys, key_stride, padded_width, term_rows, key_block;
};
static_assert(kKeys % kScoreTile == 0 && kFloatKeys % kScoreTile == 0 && kScoreTile % 2 == 0);

/// The table of one head expanded over keys. A score times log2(e) is `x * factor + term` (add) or `x * term + mask`
/// (multiply), x being q.k, which float32 takes times `factor` with the queries; columns past the last key are
/// -infinity.
struct Term {
  float* rows;       // [term_rows, key_stride]
  float* mask;       // [key_stride], 0 and -infinity
  float* peak;       // [term_rows]: the largest term of a row (add), the largest absolute factor of q.k (multiply)
  int32_t* columns;  // [tokens]: the joint of each key
  float factor;
};

Term take_term(const Shape& shape, Arena& arena) {
  Term term;
  term.rows = arena.take(shape.term_rows * shape.key_stride);
  term.mask = arena.take(shape.key_stride);
  term.peak = arena.take(shape.term_rows);
  term.columns = reinterpret_cast<int32_t*>(arena.take(shape.key_stride));
  return term;
}

/// `to[j] = from[column[j]]` for whole vectors of columns.
inline void look_up(const float* from, [[maybe_unused]] int64_t entries, const int32_t* columns, int64_t count,
                    float* to) {
#if JMM_LANES == 16
  if (entries <= 32) {
    const __mmask16 lower = static_cast<__mmask16>(entries >= 16 ? 0xffff : (1u << entries) - 1);
    const __mmask16 upper = static_cast<__mmask16>(entries >= 32  ? 0xffff
                                                   : entries > 16 ? (1u << (entries - 16)) - 1
                                                                  : 0);
    const __m512 low = _mm512_maskz_loadu_ps(lower, from), high = _mm512_maskz_loadu_ps(upper, from + 16);
    for (int64_t j = 0; j < count; j += 16) {
      _mm512_storeu_ps(to + j, _mm512_permutex2var_ps(low, _mm512_loadu_si512(columns + j), high));
    }
    return;
  }
#endif
  for (int64_t j = 0; j < count; ++j) to[j] = from[columns[j]];
}

void expand(const Problem& p, const Shape& shape, Worker& worker, int64_t body, int64_t head, Term& term) {
  const bool multiply = p.multiply && p.table != nullptr;
  // The weight of a single key is 1 whatever its score, and exactly so.
  const float unit = p.tokens > 1 ? kLog2E : 0.0f;
  term.factor = p.scale * unit;
  if (worker.term_head == head) return;
  for (int64_t j = 0; j < shape.key_stride; ++j) term.mask[j] = j < p.tokens ? 0.0f : -kInfinity;
  if (p.table == nullptr) {
    for (int64_t j = 0; j < shape.key_stride; ++j) term.rows[j] = term.mask[j];
    term.peak[0] = 0.0f;
  } else {
    const int64_t* joint = p.joint + body * p.joint_body;
    for (int64_t j = 0; j < p.tokens; ++j) term.columns[j] = static_cast<int32_t>(joint[j * p.joint_token]);
    for (int64_t j = p.tokens; j < shape.padded_keys; ++j) term.columns[j] = 0;
    const float factor = !multiply ? unit : pairs(p) ? term.factor : 1.0f;
    const float past = multiply ? 0.0f : -kInfinity;
    const float* table = p.table + head * p.joints * p.joints;
    for (int64_t v = 0; v < p.joints; ++v, table += p.joints) {
      float* __restrict row = term.rows + v * shape.key_stride;
      look_up(table, p.joints, term.columns, shape.padded_keys, row);
      Vec largest = splat(-kInfinity);
      for (int64_t j = 0; j < shape.padded_keys; j += kLanes) {
        const Vec x = load(row + j) * factor;
        store(row + j, x);
        // Past the last key stands the term of joint 0, which may be the largest: the bound is a little looser.
        largest = larger(multiply ? larger(x, -x) : x, largest);
      }
      for (int64_t j = p.tokens; j < shape.key_stride; ++j) row[j] = past;
      term.peak[v] = max_lanes(largest);
    }
  }
  // Bodies that share their joints share the expansion: the next body of this head finds it done.
  worker.term_head = p.joint_body == 0 ? head : -1;
}

/// The queries of a block; one more of zeros where their number is odd.
struct Block {
  int64_t begin, rows, even;  // first query, their number, and that rounded up to even
  int64_t offset[kQueries];   // of the term's row for each query
  float shift[kQueries];      // an integer: 2^(score * log2(e) - shift) is the weight, up to the row's sum
  float logarithm[kQueries];  // of the row's sum, where weights are taken with it
};

void start_block(const Problem& p, const Shape& shape, const Term& term, int64_t begin, int64_t end, Block& block) {
  block.begin = begin;
  block.rows = smaller(kQueries, end - begin);
  block.even = round_up(block.rows, 2);
  for (int64_t i = 0; i < block.even; ++i) {
    block.offset[i] = p.table != nullptr && i < block.rows ? term.columns[begin + i] * shape.key_stride : 0;
  }
}

template <bool kPairs>
void pack_block(const Problem& p, const View& view, int64_t body, int64_t head, const Block& block, int64_t padded,
                float* to) {
  pack_rows<kPairs>(view, p.bfloat16, start(view, body, head), block.begin, block.begin + block.rows, p.width, padded,
                    to, kQueryRow);
  if (block.even > block.rows) {
    for (int64_t d = 0; d < kQueryRow; ++d) to[block.rows * kQueryRow + d] = 0.0f;
  }
}

/// The queries of a block. Where the term multiplies, float32 queries take the factor: the products with an exact term
/// are then rounded once, as large scores ask for.
template <bool kPairs>
void pack_queries(const Problem& p, const Term& term, int64_t body, int64_t head, const Block& block, int64_t padded,
                  float* to) {
  pack_block<kPairs>(p, p.q, body, head, block, padded, to);
  if (!kPairs && p.multiply) {
    for (int64_t i = 0; i < block.rows; ++i) {
      for (int64_t d = 0; d < p.width; ++d) to[i * kQueryRow + d] *= term.factor;
    }
  }
}

/// `to[i]` = a_i.b_i for the rows of a block, summed in the order of `product`.
template <bool kPairs>
void dot_rows(const float* a, const float* b, int64_t rows, int64_t depth, float* to) {
  alignas(64) float across[2][kWidth * kLanes];
  for (int64_t i = 0; i < rows; i += kLanes) {
    transpose<kQueryRow>(a + i * kQueryRow, depth, across[0], kLanes);
    if (a != b) transpose<kQueryRow>(b + i * kQueryRow, depth, across[1], kLanes);
    Vec sum{};
    for (int64_t d = 0; d < depth; ++d) {
      multiply_add<kPairs>(sum, load(across[0] + d * kLanes), load(across[a != b] + d * kLanes));
    }
    store(to + i, sum);
  }
}

/// Asks for the rows of the block after this one: they lie too far apart for a hardware prefetcher to follow.
inline void prefetch_next(const Problem& p, const View& view, int64_t body, int64_t head, const Block& block) {
  const int64_t bytes = p.bfloat16 ? 2 : 4, begin = block.begin + kQueries;
  const char* base = static_cast<const char*>(view.data) + start(view, body, head) * bytes;
  for (int64_t i = begin; i < smaller(begin + kQueries, p.tokens); ++i) {
    const char* row = base + i * view.token * bytes;
    for (int64_t at = 0; at < p.width * bytes; at += 64) __builtin_prefetch(row + at);
  }
}

// ---- Forward -------------------------------------------------------------------------------------------------------

template <bool kPairs>
struct ForwardScratch {
  static constexpr int kBlockRow = kPairs ? kRow / 2 + 8 : kRow;
  ForwardScratch(const Problem& p, const Shape& shape, float* base) : arena(base) {
    term = take_term(shape, arena);
    keys = arena.take(words<kPairs>(p.width) * shape.key_stride);
    values = arena.take(words<kPairs>(p.tokens) * shape.padded_width);
    queries = arena.take(kQueries * kQueryRow);
    block = arena.take(kQueries * kBlockRow);
    sums = arena.take(kQueries * shape.padded_width);
    totals = arena.take(kQueries * kLanes);
  }
  Arena arena;
  Term term;
  float *keys, *values, *queries, *block, *sums, *totals;
};

/// The largest |k_j|.
template <bool kPairs>
float longest(const float* across, int64_t depth, int64_t stride, int64_t keys) {
  Vec most{};
  for (int64_t j = 0; j < keys; j += kLanes) {
    Vec square{};
    for (int64_t d = 0; d < depth; ++d) {
      const Vec x = load(across + d * stride + j);
      multiply_add<kPairs>(square, x, x);
    }
    most = larger(square, most);
  }
  return __builtin_sqrtf(max_lanes(most));
}

/// Bounds of the scores of each query.
template <bool kPairs>
void bound_scores(const Problem& p, const ForwardScratch<kPairs>& s, float longest_key, Block& block) {
  const bool multiply = p.multiply && p.table != nullptr;
  const float factor = s.term.factor < 0 ? -s.term.factor : s.term.factor;
  float square[kQueries];
  dot_rows<kPairs>(s.queries, s.queries, block.rows, words<kPairs>(p.width), square);
  for (int64_t i = 0; i < block.rows; ++i) {
    const float peak = s.term.peak[p.table != nullptr ? s.term.columns[block.begin + i] : 0];
    const float length = __builtin_sqrtf(square[i]) * longest_key;
    const float bound = multiply ? length * peak : length * factor + peak;
    block.shift[i] = bound == -kInfinity ? 0.0f : __builtin_ceilf(bound);
  }
  if (block.even > block.rows) block.shift[block.rows] = 0.0f;
}

/// Scores of a tile times log2(e), and the products x = q.k they come from.
template <bool kPairs, bool kMultiply, int kRows, int kVectors>
[[gnu::always_inline]] inline void score_tile(const Term& term, const float* queries, const float* keys,
                                              int64_t key_stride, int64_t depth, const int64_t* offset, int64_t key,
                                              Vec (&y)[kRows][kVectors], Vec (&x)[kRows][kVectors]) {
  product<kPairs, kRows, kVectors, kQueryRow, 1>(queries, keys + key, key_stride, depth, x);
  const Vec factor = splat(term.factor);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) {
      const Vec at = load(term.rows + offset[r] + key + c * kLanes);
      y[r][c] = kMultiply ? x[r][c] * at + load(term.mask + key + c * kLanes) : x[r][c] * factor + at;
    }
  }
}

/// Takes each row's true maximum for its shift.
template <bool kPairs, bool kMultiply>
void find_peaks(const Problem& p, const Shape& shape, const ForwardScratch<kPairs>& s, Block& block) {
  Vec largest[kQueries];
  for (int64_t i = 0; i < block.even; ++i) largest[i] = splat(-kInfinity);
  for_score_tiles(block.even, shape.padded_keys, [&]<int kRows, int kVectors>(int64_t i, int64_t j) {
    Vec x[kRows][kVectors], y[kRows][kVectors];
    score_tile<kPairs, kMultiply>(s.term, s.queries + i * kQueryRow, s.keys, shape.key_stride, words<kPairs>(p.width),
                                  block.offset + i, j, y, x);
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kVectors; ++c) largest[i + r] = larger(y[r][c], largest[i + r]);
    }
  });
  for (int64_t i = 0; i < block.even; ++i) {
    const float peak = max_lanes(largest[i]);
    // A row whose every term is -infinity has no maximum to take off; all its weights are 0.
    block.shift[i] = peak == -kInfinity ? 0.0f : __builtin_ceilf(peak);
  }
}

/// Sums of weighted values and of weights of a block, for its shifts.
template <bool kPairs, bool kMultiply>
void weigh(const Problem& p, const Shape& shape, const ForwardScratch<kPairs>& s, const Block& block) {
  constexpr int kBlockRow = ForwardScratch<kPairs>::kBlockRow;
  const int64_t depth = words<kPairs>(p.width), width = shape.padded_width;
  for (int64_t i = 0; i < block.even; ++i) store(s.totals + i * kLanes, Vec{});
  for (int64_t key = 0; key < p.tokens; key += shape.key_block) {
    const int64_t keys = smaller(shape.key_block, shape.padded_keys - key);
    for_score_tiles(block.even, keys,
                    [&]<int kRows, int kVectors>(int64_t i, int64_t j) __attribute__((always_inline)) {
                      Vec x[kRows][kVectors], y[kRows][kVectors];
                      score_tile<kPairs, kMultiply>(s.term, s.queries + i * kQueryRow, s.keys, shape.key_stride, depth,
                                                    block.offset + i, key + j, y, x);
#pragma GCC unroll 16
                      for (int r = 0; r < kRows; ++r) {
                        const Vec shift = splat(block.shift[i + r]);
                        Vec total = load(s.totals + (i + r) * kLanes);
#pragma GCC unroll 4
                        for (int c = 0; c < kVectors; ++c) {
                          const Vec weight = exp2_below<kPairs ? kHalfTerms : kFloatTerms>(y[r][c], shift);
                          total += weight;
                          float* row = s.block + (i + r) * kBlockRow;
#if defined(JMM_ISA_avx512bf16)
                          if constexpr (kPairs) {
                            store_halves(reinterpret_cast<Half*>(row) + j + c * kLanes, weight);
                            continue;
                          }
#endif
                          store(row + j + c * kLanes, weight);
                        }
                        store(s.totals + (i + r) * kLanes, total);
                      }
                    });
    accumulate<kPairs, kBlockRow, 1>(s.block, block.rows, s.values + words<kPairs>(key) * width, width, width,
                                     words<kPairs>(smaller(keys, p.tokens - key)), s.sums, key > 0);
  }
}

template <bool kPairs>
void run_forward(const Problem& p, const Forward& f, Worker& worker, int64_t body, int64_t head, int64_t begin,
                 int64_t end) {
  const Shape shape(p);
  ForwardScratch<kPairs> s(p, shape, worker.scratch);
  expand(p, shape, worker, body, head, s.term);
  const bool multiply = p.multiply && p.table != nullptr;
  const int64_t width = shape.padded_width;
  pack_across<kPairs>(p.k, p.bfloat16, start(p.k, body, head), p.tokens, p.width, s.keys, shape.key_stride);
  pack_summed_rows<kPairs>(p.v, p.bfloat16, start(p.v, body, head), 0, p.tokens, p.width, width, s.values);
  const float longest_key = longest<kPairs>(s.keys, words<kPairs>(p.width), shape.key_stride, shape.padded_keys);

  Block block;
  for (int64_t i0 = begin; i0 < end; i0 += kQueries) {
    start_block(p, shape, s.term, i0, end, block);
    pack_queries<kPairs>(p, s.term, body, head, block, round_up(p.width, 2), s.queries);
    prefetch_next(p, p.q, body, head, block);
    bound_scores<kPairs>(p, s, longest_key, block);
    float total[kQueries];
    for (bool peaks = false;; peaks = true) {
      if (multiply) {
        weigh<kPairs, true>(p, shape, s, block);
      } else {
        weigh<kPairs, false>(p, shape, s, block);
      }
      bool drowned = false;
      for (int64_t i = 0; i < block.rows; ++i) {
        total[i] = sum_lanes(load(s.totals + i * kLanes));
        drowned = drowned || !(total[i] >= kLeastTotal);
      }
      if (peaks || !drowned) break;
      if (multiply) {
        find_peaks<kPairs, true>(p, shape, s, block);
      } else {
        find_peaks<kPairs, false>(p, shape, s, block);
      }
    }

    const int64_t base = start(f.out, body, head), at = (body * p.heads + head) * p.tokens + i0;
    for (int64_t i = 0; i < block.rows; ++i) {
      float* sums = s.sums + i * width;
      for (int64_t d = 0; d < width; d += kLanes) store(sums + d, load(sums + d) / total[i]);
      write_row(f.out, p.bfloat16, base, i0 + i, p.width, sums, 1.0f);
      f.statistics.shift[at + i] = block.shift[i];
      f.statistics.total[at + i] = total[i];
    }
  }
}

// ---- Backward ------------------------------------------------------------------------------------------------------

template <bool kPairs>
struct BackwardScratch {
  BackwardScratch(const Problem& p, const Shape& shape, float* base) : arena(base) {
    const int64_t depth = words<kPairs>(p.width), width = shape.padded_width;
    term = take_term(shape, arena);
    keys_across = arena.take(depth * shape.key_stride);
    values_across = arena.take(depth * shape.key_stride);
    keys = arena.take(words<kPairs>(p.tokens) * width);
    dkeys = arena.take(p.tokens * width);
    dvalues = arena.take(p.tokens * width);
    queries = arena.take(kQueries * kQueryRow);
    grads = arena.take(kQueries * kQueryRow);
    outs = arena.take(kQueries * kQueryRow);
    query_pairs = kPairs ? arena.take(kQueries / 2 * width) : queries;
    grad_pairs = kPairs ? arena.take(kQueries / 2 * width) : grads;
    dqueries = arena.take(kQueries * width);
    weights = arena.take(words<kPairs>(kQueries) * kRow);
    dscores = arena.take(words<kPairs>(kQueries) * kRow);
    dscore_rows = kPairs ? arena.take(kQueries * kHalfRow) : dscores;
    dterm = p.table != nullptr ? arena.take(shape.term_rows * shape.key_stride) : nullptr;
  }
  static constexpr int kHalfRow = kRow / 2 + 8;
  Arena arena;
  Term term;
  float *keys_across, *values_across, *keys, *dkeys, *dvalues, *queries, *grads, *outs, *query_pairs, *grad_pairs,
      *dqueries, *weights, *dscores, *dscore_rows, *dterm;
};

/// Weights and score gradients of a block; `dscores` becomes the gradient of q.k up to a factor that all share.
template <bool kPairs, bool kMultiply, bool kTable>
void gradient_block(const Shape& shape, const BackwardScratch<kPairs>& s, const Block& block, const float* delta,
                    int64_t depth, int64_t key, int64_t keys) {
  for_score_tiles(block.even, keys, [&]<int kRows, int kVectors>(int64_t i, int64_t j) __attribute__((always_inline)) {
    // Weights wait for the second product in memory of this tile's size.
    alignas(64) float tile_weights[kRows * kVectors * kLanes], tile_products[kMultiply ? kRows * kVectors * kLanes : 1];
    {
      Vec x[kRows][kVectors], y[kRows][kVectors];
      score_tile<kPairs, kMultiply>(s.term, s.queries + i * kQueryRow, s.keys_across, shape.key_stride, depth,
                                    block.offset + i, key + j, y, x);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec shift = splat(block.shift[i + r]);
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) {
          if (kPairs) y[r][c] -= block.logarithm[i + r];
          y[r][c] = exp2_below<kPairs ? kHalfTerms : kFloatTerms>(y[r][c], shift);
          store(tile_weights + (r * kVectors + c) * kLanes, y[r][c]);
          if (kMultiply) store(tile_products + (r * kVectors + c) * kLanes, x[r][c]);
          if (!kPairs) store(s.weights + (i + r) * kRow + j + c * kLanes, y[r][c]);
        }
#if defined(JMM_ISA_avx512bf16)
        if constexpr (kPairs) {
          if (r % 2 == 1) {
  #pragma GCC unroll 4
            for (int c = 0; c < kVectors; ++c) {
              store_pairs(s.weights + (i + r) / 2 * kRow + j + c * kLanes, y[r - 1][c], y[r][c]);
            }
          }
        }
#endif
      }
    }
    Vec x[kRows][kVectors];
    product<kPairs, kRows, kVectors, kQueryRow, 1>(s.grads + i * kQueryRow, s.values_across + key + j, shape.key_stride,
                                                   depth, x);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec shift = splat(delta[i + r]);
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) {
        const int64_t at = (r * kVectors + c) * kLanes;
        Vec dscore = load(tile_weights + at) * (x[r][c] - shift);
        if (kTable) {
          float* to = s.dterm + block.offset[i + r] + key + j + c * kLanes;
          store(to, load(to) + (kMultiply ? dscore * load(tile_products + at) : dscore));
        }
        if (kMultiply) dscore *= load(s.term.rows + block.offset[i + r] + key + j + c * kLanes);
        x[r][c] = dscore;
        if (!kPairs) store(s.dscores + (i + r) * kRow + j + c * kLanes, dscore);
      }
#if defined(JMM_ISA_avx512bf16)
      if constexpr (kPairs) {
  #pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) {
          store_halves(reinterpret_cast<Half*>(s.dscore_rows + (i + r) * s.kHalfRow) + j + c * kLanes, x[r][c]);
          if (r % 2 == 1) store_pairs(s.dscores + (i + r) / 2 * kRow + j + c * kLanes, x[r - 1][c], x[r][c]);
        }
      }
#endif
    }
  });
}

/// Rows of a block in pairs, as the right side of a product that sums over them.
inline void pair_rows(const float* rows, int64_t even, int64_t padded, float* to) {
  for (int64_t i = 0; i < even; i += 2, to += padded) {
    interleave(rows + i * kQueryRow, rows + (i + 1) * kQueryRow, padded, to);
  }
}

template <bool kPairs>
void run_backward(const Problem& p, const Backward& g, Worker& worker, int64_t body, int64_t head, double* dtable) {
  const Shape shape(p);
  BackwardScratch<kPairs> s(p, shape, worker.scratch);
  expand(p, shape, worker, body, head, s.term);
  const int64_t width = shape.padded_width, depth = words<kPairs>(p.width);
  const bool multiply = p.multiply && p.table != nullptr;

  pack_across<kPairs>(p.v, p.bfloat16, start(p.v, body, head), p.tokens, p.width, s.values_across, shape.key_stride);
  pack_across<kPairs>(p.k, p.bfloat16, start(p.k, body, head), p.tokens, p.width, s.keys_across, shape.key_stride);
  pack_summed_rows<kPairs>(p.k, p.bfloat16, start(p.k, body, head), 0, p.tokens, p.width, width, s.keys);
  if (p.table != nullptr) {
    for (int64_t j = 0; j < shape.term_rows * shape.key_stride; ++j) s.dterm[j] = 0.0f;
  }
  // Factors of the gradients that the blocks leave out. A score is scale * q.k, plus the term or times it; in the
  // latter case the queries (float32) or the term (bfloat16) have the factor already, times log2(e).
  const float query_factor = multiply && kPairs ? kLn2 : p.scale, key_factor = multiply ? kLn2 : p.scale;
  const double table_factor = !multiply ? 1.0 : kPairs ? static_cast<double>(p.scale) : static_cast<double>(kLn2);

  Block block;
  for (int64_t i0 = 0; i0 < p.tokens; i0 += kQueries) {
    start_block(p, shape, s.term, i0, p.tokens, block);
    pack_queries<kPairs>(p, s.term, body, head, block, width, s.queries);
    pack_block<kPairs>(p, g.grad_out, body, head, block, width, s.grads);
    pack_block<kPairs>(p, g.out, body, head, block, width, s.outs);
    prefetch_next(p, p.q, body, head, block);
    prefetch_next(p, g.grad_out, body, head, block);
    prefetch_next(p, g.out, body, head, block);
    float delta[kQueries];
    const int64_t at = (body * p.heads + head) * p.tokens + i0;
    for (int64_t i = 0; i < block.rows; ++i) {
      const float total = g.statistics.total[at + i];
      block.shift[i] = g.statistics.shift[at + i];
      if constexpr (kPairs) {
        // Scaling the gradients would round them again; a logarithm's rounding is nothing next to bfloat16's.
        block.logarithm[i] = __builtin_log2f(total);
      } else {
        // The weights are left without their row's sum, which divides the gradients instead.
        float* grad = s.grads + i * kQueryRow;
        for (int64_t d = 0; d < p.width; ++d) grad[d] /= total;
      }
    }
    // Summed as the products with the values are: a query that attends to one key alone, whose output is that key's
    // value, gets a gradient of exactly zero.
    dot_rows<kPairs>(s.grads, s.outs, block.rows, depth, delta);
    if (block.even > block.rows) {
      delta[block.rows] = block.logarithm[block.rows] = 0.0f;
      block.shift[block.rows] = kInfinity;
    }
    if constexpr (kPairs) {
      pair_rows(s.queries, block.even, width, s.query_pairs);
      pair_rows(s.grads, block.even, width, s.grad_pairs);
    }

    const int64_t summed = words<kPairs>(block.even), row_stride = kPairs ? width : kQueryRow;
    for (int64_t key = 0; key < p.tokens; key += shape.key_block) {
      const int64_t keys = smaller(shape.key_block, shape.padded_keys - key);
      const int64_t valid = smaller(keys, p.tokens - key);
      if (multiply) {
        gradient_block<kPairs, true, true>(shape, s, block, delta, depth, key, keys);
      } else if (p.table != nullptr) {
        gradient_block<kPairs, false, true>(shape, s, block, delta, depth, key, keys);
      } else {
        gradient_block<kPairs, false, false>(shape, s, block, delta, depth, key, keys);
      }
      accumulate<kPairs, 1, kRow>(s.weights, valid, s.grad_pairs, row_stride, width, summed, s.dvalues + key * width,
                                  i0 > 0);
      accumulate<kPairs, 1, kRow>(s.dscores, valid, s.query_pairs, row_stride, width, summed, s.dkeys + key * width,
                                  i0 > 0);
      accumulate<kPairs, kPairs ? BackwardScratch<kPairs>::kHalfRow : kRow, 1>(
          s.dscore_rows, block.rows, s.keys + words<kPairs>(key) * width, width, width, words<kPairs>(valid),
          s.dqueries, key > 0);
    }
    const int64_t base = start(g.dq, body, head);
    for (int64_t i = 0; i < block.rows; ++i) {
      write_row(g.dq, p.bfloat16, base, i0 + i, p.width, s.dqueries + i * width, query_factor);
    }
  }

  const int64_t dk_base = start(g.dk, body, head), dv_base = start(g.dv, body, head);
  for (int64_t j = 0; j < p.tokens; ++j) {
    write_row(g.dk, p.bfloat16, dk_base, j, p.width, s.dkeys + j * width, key_factor);
    write_row(g.dv, p.bfloat16, dv_base, j, p.width, s.dvalues + j * width, 1.0f);
  }
  if (p.table != nullptr) {
    for (int64_t v = 0; v < p.joints; ++v) {
      const float* row = s.dterm + v * shape.key_stride;
      for (int64_t j = 0; j < p.tokens; ++j) dtable[v * p.joints + s.term.columns[j]] += table_factor * row[j];
    }
  }
}

}  // namespace

int64_t forward_scratch(const Problem& p) {
  return pairs(p) ? ForwardScratch<true>(p, Shape(p), nullptr).arena.used()
                  : ForwardScratch<false>(p, Shape(p), nullptr).arena.used();
}

int64_t backward_scratch(const Problem& p) {
  return pairs(p) ? BackwardScratch<true>(p, Shape(p), nullptr).arena.used()
                  : BackwardScratch<false>(p, Shape(p), nullptr).arena.used();
}

void forward(const Problem& p, const Forward& f, Worker& worker, int64_t body, int64_t head, int64_t begin,
             int64_t end) {
#if defined(JMM_ISA_avx512bf16)
  if (p.bfloat16) return run_forward<true>(p, f, worker, body, head, begin, end);
#endif
  run_forward<false>(p, f, worker, body, head, begin, end);
}

void backward(const Problem& p, const Backward& g, Worker& worker, int64_t body, int64_t head, double* dtable) {
#if defined(JMM_ISA_avx512bf16)
  if (p.bfloat16) return run_backward<true>(p, g, worker, body, head, dtable);
#endif
  run_backward<false>(p, g, worker, body, head, dtable);
}

}  // namespace jmm_fast::topology_attention::JMM_ISA
