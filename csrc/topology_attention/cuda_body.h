#pragma once

// Topology attention of one body and head by the threads of one block, for few tokens: a warp takes 16 queries and
// keeps their scores against all keys in registers. tests/cuda/ compiles this file for the CPU as well; whoever
// includes it has included tensor_core.h, or the tests' twin of it, before.
//
// A table row is spread over the keys of the body in shared memory, once for each joint: the term of two neighbouring
// scores is then one load. The table's gradient goes the way back: gradients of scores times the one-hot joints of
// their keys, a product of matrices, then the rows of one joint are added up, in rising order. No atomics: the same
// bits from run to run.
//
// All tiles are 16 wide. Queries and keys behind the last one are zeros and get the weight 0.

#include <cmath>

#include "device.h"
#include "topology_attention/cuda_problem.h"

namespace jmm_fast::topology_attention::cuda {

namespace {

constexpr int kTile = 16;
/// Two instances each: for the encoder's 65 to 80 tokens and fewer, and for the most that there may be; the same for
/// joints, in eights.
constexpr int kFewTiles = 5, kMostTiles = kMostTokens / kTile, kFewJointTiles = 4, kMostJointTiles = kMostJoints / 8;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;

JMM_HOST_DEVICE constexpr int tiles_of(int tokens) { return (tokens + kTile - 1) / kTile; }

/// Elements from one row of `width` (a multiple of 16) to the next in shared memory: an odd number of 16 bytes, so that
/// eight rows lie in different banks.
JMM_HOST_DEVICE constexpr int stride_of(int width) { return width + 8; }

/// The same for the floats of a table row spread over the keys: rows of different joints mostly lie in different banks.
JMM_HOST_DEVICE constexpr int spread_of(int tokens) { return stride_of(kTile * tiles_of(tokens)); }

JMM_HOST_DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }

/// Shared memory of a block of the forward pass.
struct ForwardMemory {
  uint16_t *q, *k, *v;  ///< [tokens, width]; queries make room for results
  float* term;          ///< [V, tokens]
  int* joint;           ///< [tokens]

  JMM_HOST_DEVICE static constexpr int bytes(int width, int tokens, int joints) {
    const int rows = kTile * tiles_of(tokens);
    return 3 * 2 * rows * stride_of(width) + 4 * joints * spread_of(tokens) + 4 * rows;
  }

  __device__ ForwardMemory(unsigned char* from, int width, int tokens, int joints) {
    const int part = kTile * tiles_of(tokens) * stride_of(width);
    q = reinterpret_cast<uint16_t*>(from), k = q + part, v = k + part;
    term = reinterpret_cast<float*>(v + part), joint = reinterpret_cast<int*>(term + joints * spread_of(tokens));
  }
};

/// Shared memory of a block of the backward pass, which takes more.
struct BackwardMemory {
  uint16_t *q, *k, *grad;     ///< [tokens, width]; they make room for results
  uint16_t *weight, *dscore;  ///< [tokens, tokens] of stride `pair_of`; at first the result's rows in place of weights
  uint16_t* v;                ///< [tokens, width]
  float* term;                ///< [V, tokens]
  float* dterm;               ///< [tokens, V] once values and terms are not needed any more
  float* dtable;              ///< [V, V]
  int* joint;                 ///< [tokens]
  unsigned* mask;             ///< [V, kMaskWords] one bit for each token: has this joint

  static constexpr int kMaskWords = kMostTokens / 32;

  JMM_HOST_DEVICE static constexpr int pair_of(int width, int tokens) {
    return stride_of(larger(kTile * tiles_of(tokens), width));
  }

  JMM_HOST_DEVICE static constexpr int dterm_of(int joints) {
    return stride_of(8 * (joints <= 8 * kFewJointTiles ? kFewJointTiles : kMostJointTiles));
  }

  JMM_HOST_DEVICE static constexpr int shared_part(int width, int tokens, int joints) {
    const int rows = kTile * tiles_of(tokens);
    const int first = 2 * rows * stride_of(width) + 4 * joints * spread_of(tokens);
    return joints > 0 ? larger(first, 4 * rows * dterm_of(joints)) : first;
  }

  JMM_HOST_DEVICE static constexpr int bytes(int width, int tokens, int joints) {
    const int rows = kTile * tiles_of(tokens);
    return 3 * 2 * rows * stride_of(width) + 2 * 2 * rows * pair_of(width, tokens) +
           shared_part(width, tokens, joints) + 4 * joints * joints + 4 * rows + 4 * joints * kMaskWords;
  }

  __device__ BackwardMemory(unsigned char* from, int width, int tokens, int joints) {
    const int rows = kTile * tiles_of(tokens), part = rows * stride_of(width), pairs = rows * pair_of(width, tokens);
    q = reinterpret_cast<uint16_t*>(from), k = q + part, grad = k + part;
    weight = grad + part, dscore = weight + pairs, v = dscore + pairs;
    term = reinterpret_cast<float*>(v + part), dterm = reinterpret_cast<float*>(v);
    dtable = dterm + shared_part(width, tokens, joints) / 4;
    joint = reinterpret_cast<int*>(dtable + joints * joints), mask = reinterpret_cast<unsigned*>(joint + rows);
  }
};

/// The most tokens of which a block has no more than `memory` bytes in either pass; the backward pass takes more.
inline int fitting_tokens(int memory, int width, int joints) {
  int tokens = kMostTokens;
  while (tokens > 0 && BackwardMemory::bytes(width, tokens, joints) > memory) --tokens;
  return tokens;
}

struct alignas(16) Quad {
  uint32_t word[4];
};

struct alignas(8) Pair {
  float x, y;
};

/// Which of a block's threads this one is, and where in a fragment: `row` and `row + 8`, `column` and `column + 1`.
struct Place {
  int thread, threads, warp, lane, row, column;

  __device__ Place(unsigned number, int tiles) {
    thread = static_cast<int>(number), threads = 32 * tiles;
    warp = static_cast<int>(number / 32), lane = static_cast<int>(number % 32);
    row = static_cast<int>(number % 32 / 4), column = static_cast<int>(2 * (number % 4));
  }
};

/// Row and column of the 8 x 8 matrices that a lane names to `load_matrices`, from the corner of a 16 x 16 tile.
/// `kDown`: the second matrix is the one below the first, as in a left operand; else the one beside it.
template <bool kDown>
__device__ int corner(int lane, int stride) {
  // Unsigned: a division by a power of two is one instruction then.
  const unsigned l = static_cast<unsigned>(lane);
  return static_cast<int>(kDown ? l % 16 : l % 8 + l / 16 * 8) * stride +
         static_cast<int>(kDown ? l / 16 : l / 8 % 2) * 8;
}

__device__ inline const uint16_t* start_of(const View& x, int64_t body, int head) {
  return static_cast<const uint16_t*>(x.data) + body * x.body + head * x.head;
}

/// Starts to bring the rows of a body and head to shared memory, `stride` elements apart, zeros behind the last one.
template <int kWidth>
__device__ void fetch(const View& from, int64_t body, int head, int tokens, uint16_t* to, int stride, const Place& at) {
  const uint16_t* start = start_of(from, body, head);
  const int rows = kTile * tiles_of(tokens);
  if (from.wide) {
    // A thread's rows follow each other at the same distance: 32 lanes are kStep rows, all warps kStep times as many.
    constexpr unsigned kParts = kWidth / 8, kStep = 32 / kParts;
    const unsigned thread = static_cast<unsigned>(at.thread);
    const int part = static_cast<int>(thread % kParts) * 8, step = static_cast<int>(kStep) * (at.threads / 32);
    int row = static_cast<int>(thread / kParts);
    const uint16_t* place = start + row * from.token + part;
    uint16_t* target = to + row * stride + part;
#pragma unroll 1
    for (; row < rows; row += step, place += step * from.token, target += step * stride) {
      tensor_core::start_copy(target, row < tokens ? place : start, row < tokens);
    }
  } else {
#pragma unroll 1
    for (int i = at.thread; i < rows * kWidth; i += at.threads) {
      const int row = i / kWidth, channel = i % kWidth;
      to[row * stride + channel] = row < tokens ? start[row * from.token + channel * from.channel] : uint16_t{0};
    }
  }
}

/// Joints of the tokens of a body. A barrier must follow.
__device__ inline void fetch_joints(const Problem& p, int64_t body, int* to, const Place& at) {
  const int rows = kTile * tiles_of(p.tokens);
#pragma unroll 1
  for (int i = at.thread; i < rows; i += at.threads) {
    int64_t joint = 0;
    if (i < p.tokens) joint = p.joint[body * p.joint_body + i * p.joint_token];
    to[i] = joint >= 0 && joint < p.joints ? static_cast<int>(joint) : 0;
  }
}

/// `term[u, j] = table[head, u, joint(j)]`: a thread takes two keys and every fourth row, as there are four threads for
/// each pair of keys. Added terms of keys behind the last one are minus infinity. A barrier must follow.
__device__ inline void spread(const Problem& p, int head, const int* joint, float* term, const Place& at) {
  const int stride = spread_of(p.tokens), pairs = at.threads / 4;
  const int group = at.thread / pairs, key = 2 * (at.thread - group * pairs);
  const float* table = p.table + (head * p.joints + group) * p.joints;
  const float *a = table + joint[key], *b = table + joint[key + 1];
  const bool there = key < p.tokens, next = key + 1 < p.tokens;
  const float behind = p.mode == kAdd ? -HUGE_VALF : 0.0f;
  Pair* to = reinterpret_cast<Pair*>(term + group * stride + key);
#pragma unroll 2
  for (int u = group; u < p.joints; u += 4, a += 4 * p.joints, b += 4 * p.joints, to += 2 * stride) {
    *to = {there ? *a : behind, next ? *b : behind};
  }
}

/// Operands of 16 rows, all of their columns.
template <int kWidth>
__device__ void load_rows(uint32_t (&to)[kWidth / kTile][4], const uint16_t* rows, int stride, int lane) {
  for (int i = 0; i < kWidth / kTile; ++i) {
    tensor_core::load_matrices(to[i], rows + corner<true>(lane, stride) + kTile * i);
  }
}

/// `c = a b'` for 16 rows of `a` and 16 rows of `b`.
template <bool kBfloat16, int kWidth>
__device__ void multiply_rows(float (&c)[2][4], const uint32_t (&a)[kWidth / kTile][4], const uint16_t* b, int lane) {
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) c[half][i] = 0;
  }
  for (int i = 0; i < kWidth / kTile; ++i) {
    uint32_t right[4];
    tensor_core::load_matrices(right, b + corner<false>(lane, stride_of(kWidth)) + kTile * i);
    tensor_core::multiply_add<kBfloat16>(c[0], a[i], right[0], right[1]);
    tensor_core::multiply_add<kBfloat16>(c[1], a[i], right[2], right[3]);
  }
}

/// `c += a b` for 16 columns of `a` and 16 rows of `b`, all of its columns.
template <bool kBfloat16, int kWidth>
__device__ void multiply_columns(float (&c)[kWidth / 8][4], const uint32_t (&a)[4], const uint16_t* b, int lane) {
  for (int i = 0; i < kWidth / kTile; ++i) {
    uint32_t right[4];
    tensor_core::load_transposed(right, b + corner<true>(lane, stride_of(kWidth)) + kTile * i);
    tensor_core::multiply_add<kBfloat16>(c[2 * i], a, right[0], right[1]);
    tensor_core::multiply_add<kBfloat16>(c[2 * i + 1], a, right[2], right[3]);
  }
}

/// A 16 x 16 result as a left operand.
template <bool kBfloat16>
__device__ void as_operand(uint32_t (&to)[4], const float (&from)[2][4]) {
  for (int i = 0; i < 4; ++i) {
    const float* two = from[i / 2] + 2 * (i % 2);
    to[i] = tensor_core::pack<kBfloat16>(two[0], two[1]);
  }
}

/// The result of 16 rows, rounded: two words of each 16 x 8 part.
template <bool kBfloat16, int kWidth>
__device__ void round_rows(uint32_t (&to)[kWidth / 8][2], const float (&from)[kWidth / 8][4], float upper,
                           float lower) {
  for (int i = 0; i < kWidth / 8; ++i) {
    to[i][0] = tensor_core::pack<kBfloat16>(from[i][0] * upper, from[i][1] * upper);
    to[i][1] = tensor_core::pack<kBfloat16>(from[i][2] * lower, from[i][3] * lower);
  }
}

/// Writes the rounded result of a warp's 16 rows by way of as many rows of shared memory that nobody else uses.
template <int kWidth>
__device__ void store_rows(const uint32_t (&from)[kWidth / 8][2], uint16_t* by, const View& to, int64_t body, int head,
                           int tokens, const Place& at) {
  constexpr int kStride = stride_of(kWidth), kParts = kWidth / 8;
  uint16_t* rows = by + kTile * at.warp * kStride;
  for (int i = 0; i < kWidth / 8; ++i) {
    *reinterpret_cast<uint32_t*>(rows + at.row * kStride + 8 * i + at.column) = from[i][0];
    *reinterpret_cast<uint32_t*>(rows + (at.row + 8) * kStride + 8 * i + at.column) = from[i][1];
  }
  __syncwarp();
  uint16_t* start = static_cast<uint16_t*>(to.data) + body * to.body + head * to.head;
  for (int i = at.lane; i < kTile * kParts; i += 32) {
    const int row = i / kParts, part = i % kParts * 8, token = kTile * at.warp + row;
    if (token < tokens) {
      *reinterpret_cast<Quad*>(start + token * to.token + part) =
          *reinterpret_cast<const Quad*>(rows + row * kStride + part);
    }
  }
}

/// Products of four pairs, of keys `column` and the next one, and their terms become scores, in both passes by the same
/// operations. Keys behind the last one get minus infinity.
__device__ inline void score(const Problem& p, float (&x)[4], const float (&term)[4], int column) {
  // One choice for all four: the mode is the same for all threads.
  if (p.mode == kAdd) {
    for (int i = 0; i < 4; ++i) x[i] = fmaf(x[i], p.scale, term[i]);  // terms know the last key
  } else {
    for (int i = 0; i < 4; ++i) {
      x[i] *= p.scale;
      if (p.mode == kScale) x[i] *= term[i];
      if (column + i % 2 >= p.tokens) x[i] = -HUGE_VALF;
    }
  }
}

/// Terms of four pairs: two neighbouring keys in each of two table rows.
__device__ inline void load_terms(float (&to)[4], const float* upper, const float* lower) {
  const Pair a = *reinterpret_cast<const Pair*>(upper), b = *reinterpret_cast<const Pair*>(lower);
  to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
}

struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};

/// `combine` over the four lanes that share a row.
template <typename Combine>
__device__ float reduce_row(float value, Combine combine) {
  value = combine(value, __shfl_xor_sync(kAll, value, 1));
  return combine(value, __shfl_xor_sync(kAll, value, 2));
}

/// The forward pass of body and head number `task`. `kTiles`: at least as many tiles as the tokens have. All threads of
/// the block, 32 for each tile of the tokens, call it.
template <bool kBfloat16, int kWidth, int kTiles>
__device__ void attend(const Problem& p, const Forward& f, unsigned char* memory, int64_t task) {
  const int64_t body = task / p.heads;
  const int head = static_cast<int>(task % p.heads), tokens = p.tokens, tiles = tiles_of(tokens);
  const Place at(threadIdx.x, tiles);
  const ForwardMemory m(memory, kWidth, tokens, p.joints);
  constexpr int kStride = stride_of(kWidth);

  fetch<kWidth>(p.q, body, head, tokens, m.q, kStride, at);
  fetch<kWidth>(p.k, body, head, tokens, m.k, kStride, at);
  fetch<kWidth>(p.v, body, head, tokens, m.v, kStride, at);
  if (p.mode != kPlain) {
    fetch_joints(p, body, m.joint, at);
    __syncthreads();
    spread(p, head, m.joint, m.term, at);
  }
  tensor_core::wait_for_copies();
  __syncthreads();

  const int first = kTile * at.warp + at.row;  // of the two rows of this lane
  uint32_t q[kWidth / kTile][4];
  load_rows<kWidth>(q, m.q + kTile * at.warp * kStride, kStride, at.lane);
  const float *upper = m.term, *lower = m.term;
  if (p.mode != kPlain) {
    upper += m.joint[first] * spread_of(tokens) + at.column;
    lower += m.joint[first + 8] * spread_of(tokens) + at.column;
  }
  float s[kTiles][2][4];
  float most[2] = {-HUGE_VALF, -HUGE_VALF};
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile >= tiles) continue;
    multiply_rows<kBfloat16, kWidth>(s[tile], q, m.k + kTile * tile * kStride, at.lane);
    for (int half = 0; half < 2; ++half) {
      const int begin = kTile * tile + 8 * half;
      float (&x)[4] = s[tile][half];
      float term[4] = {0, 0, 0, 0};
      if (p.mode != kPlain) load_terms(term, upper + begin, lower + begin);
      score(p, x, term, begin + at.column);
      for (int i = 0; i < 4; ++i) most[i / 2] = Larger()(most[i / 2], x[i]);
    }
  }
  float shift[2], total[2] = {0, 0};
  for (int i = 0; i < 2; ++i) {
    most[i] = reduce_row(most[i], Larger());
    shift[i] = -most[i] * kLog2E;
  }

  float out[kWidth / 8][4];
  for (int i = 0; i < kWidth / 8; ++i) {
    for (int j = 0; j < 4; ++j) out[i][j] = 0;
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile >= tiles) continue;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        float& x = s[tile][half][i];
        x = tensor_core::power_of_two(fmaf(x, kLog2E, shift[i / 2]));
        total[i / 2] += x;
      }
    }
    uint32_t weights[4];
    as_operand<kBfloat16>(weights, s[tile]);
    multiply_columns<kBfloat16, kWidth>(out, weights, m.v + kTile * tile * kStride, at.lane);
  }
  for (int i = 0; i < 2; ++i) total[i] = reduce_row(total[i], Add());
  if (at.column == 0) {
    for (int i = 0; i < 2; ++i) {
      const int token = first + 8 * i;
      if (token < tokens) f.most[task * tokens + token] = most[i], f.total[task * tokens + token] = total[i];
    }
  }
  uint32_t rounded[kWidth / 8][2];
  round_rows<kBfloat16, kWidth>(rounded, out, 1 / total[0], 1 / total[1]);
  __syncwarp();  // all lanes have the queries, in whose place the result goes
  store_rows<kWidth>(rounded, m.q, f.out, body, head, tokens, at);
}

/// One bit for each token of a joint. A barrier must follow.
__device__ inline void mark_joints(const Problem& p, const int* joint, unsigned* mask, const Place& at) {
  const int used = (p.tokens + 31) / 32;
#pragma unroll 1
  for (int i = at.warp; i < p.joints * used; i += at.threads / 32) {
    const int u = i / used, word = i % used, token = 32 * word + at.lane;
    const unsigned bits = __ballot_sync(kAll, token < p.tokens && joint[token] == u);
    if (at.lane == 0) mask[u * BackwardMemory::kMaskWords + word] = bits;
  }
}

/// Gradients of one body and head; the table's is added to that in shared memory.
template <bool kBfloat16, int kWidth, int kJointTiles>
__device__ void differentiate_body(const Problem& p, const Backward& g, const BackwardMemory& m, int64_t body, int head,
                                   const Place& at) {
  const int tokens = p.tokens, tiles = tiles_of(tokens), pair = BackwardMemory::pair_of(kWidth, tokens);
  const int first = kTile * at.warp + at.row;  // of the two rows of this lane
  constexpr int kStride = stride_of(kWidth), kDtermStride = stride_of(8 * kJointTiles), kFragments = kWidth / 8;

  fetch<kWidth>(p.q, body, head, tokens, m.q, kStride, at);
  fetch<kWidth>(p.k, body, head, tokens, m.k, kStride, at);
  fetch<kWidth>(p.v, body, head, tokens, m.v, kStride, at);
  fetch<kWidth>(g.grad, body, head, tokens, m.grad, kStride, at);
  fetch<kWidth>(g.out, body, head, tokens, m.weight, pair, at);
  float shift[2], inverse[2], delta[2] = {0, 0};
  for (int i = 0; i < 2; ++i) {
    const int token = first + 8 * i;
    const int64_t place = (body * p.heads + head) * tokens + token;
    shift[i] = token < tokens ? -g.most[place] * kLog2E : -HUGE_VALF;
    inverse[i] = token < tokens ? 1 / g.total[place] : 0.0f;
  }
  if (p.mode != kPlain) {
    fetch_joints(p, body, m.joint, at);
    __syncthreads();
    spread(p, head, m.joint, m.term, at);
    mark_joints(p, m.joint, m.mask, at);
  }
  tensor_core::wait_for_copies();
  __syncthreads();

  for (int i = 0; i < 2; ++i) {
    const uint16_t* grad = m.grad + (first + 8 * i) * kStride;
    const uint16_t* out = m.weight + (first + 8 * i) * pair;
    for (int c = at.column; c < kWidth; c += 8) {
      const uint32_t a = *reinterpret_cast<const uint32_t*>(grad + c), b = *reinterpret_cast<const uint32_t*>(out + c);
      for (int bit = 0; bit < 32; bit += 16) {
        delta[i] = fmaf(tensor_core::widen<kBfloat16>(static_cast<uint16_t>(a >> bit)),
                        tensor_core::widen<kBfloat16>(static_cast<uint16_t>(b >> bit)), delta[i]);
      }
    }
    delta[i] = reduce_row(delta[i], Add());
  }
  __syncwarp();  // all lanes have their part of the result, in whose place the weights go

  // With queries as rows: the gradient of the queries and that of the terms, summed over the keys of a joint.
  uint32_t q[kWidth / kTile][4], grad[kWidth / kTile][4];
  load_rows<kWidth>(q, m.q + kTile * at.warp * kStride, kStride, at.lane);
  load_rows<kWidth>(grad, m.grad + kTile * at.warp * kStride, kStride, at.lane);
  const float *upper = m.term, *lower = m.term;
  if (p.mode != kPlain) {
    upper += m.joint[first] * spread_of(tokens) + at.column;
    lower += m.joint[first + 8] * spread_of(tokens) + at.column;
  }
  float dq[kFragments][4], dterm[kJointTiles][4];
  for (int i = 0; i < kFragments; ++i) {
    for (int j = 0; j < 4; ++j) dq[i][j] = 0;
  }
  for (int i = 0; i < kJointTiles; ++i) {
    for (int j = 0; j < 4; ++j) dterm[i][j] = 0;
  }
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    float s[2][4], ds[2][4], dt[2][4];
    multiply_rows<kBfloat16, kWidth>(s, q, m.k + kTile * tile * kStride, at.lane);
    multiply_rows<kBfloat16, kWidth>(ds, grad, m.v + kTile * tile * kStride, at.lane);
    // Weights into s, gradients of products into ds, and of terms, which are the same unless they multiply, into dt.
    for (int half = 0; half < 2; ++half) {
      const int begin = kTile * tile + 8 * half;
      float term[4] = {0, 0, 0, 0}, product[4];
      if (p.mode != kPlain) load_terms(term, upper + begin, lower + begin);
      for (int i = 0; i < 4; ++i) product[i] = s[half][i];
      score(p, s[half], term, begin + at.column);
      for (int i = 0; i < 4; ++i) {
        const float weight = tensor_core::power_of_two(fmaf(s[half][i], kLog2E, shift[i / 2])) * inverse[i / 2];
        s[half][i] = weight;
        ds[half][i] = weight * (ds[half][i] - delta[i / 2]);
      }
      if (p.mode == kScale) {
        for (int i = 0; i < 4; ++i) dt[half][i] = ds[half][i] * product[i] * p.scale, ds[half][i] *= term[i];
      }
    }
    uint32_t weights[4], scores[4];
    as_operand<kBfloat16>(weights, s);
    as_operand<kBfloat16>(scores, ds);
    for (int i = 0; i < 4; ++i) {
      const int place = (first + i % 2 * 8) * pair + kTile * tile + i / 2 * 8 + at.column;
      *reinterpret_cast<uint32_t*>(m.weight + place) = weights[i];
      *reinterpret_cast<uint32_t*>(m.dscore + place) = scores[i];
    }
    multiply_columns<kBfloat16, kWidth>(dq, scores, m.k + kTile * tile * kStride, at.lane);
    if (p.mode != kPlain) {
      if (p.mode == kScale) as_operand<kBfloat16>(scores, dt);
      int joint[4];
      for (int i = 0; i < 4; ++i) joint[i] = m.joint[kTile * tile + i / 2 * 8 + at.column + i % 2];
      const uint32_t one = tensor_core::pack<kBfloat16>(1, 0);
      for (int i = 0; i < kJointTiles; ++i) {
        const int u = 8 * i + at.row;
        const uint32_t b0 = (joint[0] == u ? one : 0) | (joint[1] == u ? one << 16 : 0);
        const uint32_t b1 = (joint[2] == u ? one : 0) | (joint[3] == u ? one << 16 : 0);
        tensor_core::multiply_add<kBfloat16>(dterm[i], scores, b0, b1);
      }
    }
  }
  uint32_t dq_rounded[kFragments][2];
  round_rows<kBfloat16, kWidth>(dq_rounded, dq, p.scale, p.scale);
  __syncthreads();

  if (p.mode != kPlain) {
    for (int i = 0; i < kJointTiles; ++i) {
      for (int j = 0; j < 2; ++j) {
        const int place = (first + 8 * j) * kDtermStride + 8 * i + at.column;
        *reinterpret_cast<Pair*>(m.dterm + place) = {dterm[i][2 * j], dterm[i][2 * j + 1]};
      }
    }
  }
  // With keys as rows: their gradient and that of the values.
  float dk[kFragments][4], dv[kFragments][4];
  for (int i = 0; i < kFragments; ++i) {
    for (int j = 0; j < 4; ++j) dk[i][j] = dv[i][j] = 0;
  }
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    // A tile of the transposed pairs: its second matrix is beside the first before it is turned.
    const int corner_at = kTile * tile * pair + kTile * at.warp + corner<false>(at.lane, pair);
    uint32_t left[4];
    tensor_core::load_transposed(left, m.weight + corner_at);
    multiply_columns<kBfloat16, kWidth>(dv, left, m.grad + kTile * tile * kStride, at.lane);
    tensor_core::load_transposed(left, m.dscore + corner_at);
    multiply_columns<kBfloat16, kWidth>(dk, left, m.q + kTile * tile * kStride, at.lane);
  }
  __syncthreads();

  store_rows<kWidth>(dq_rounded, m.q, g.dq, body, head, tokens, at);
  uint32_t rounded[kFragments][2];
  round_rows<kBfloat16, kWidth>(rounded, dk, p.scale, p.scale);
  store_rows<kWidth>(rounded, m.k, g.dk, body, head, tokens, at);
  round_rows<kBfloat16, kWidth>(rounded, dv, 1, 1);
  store_rows<kWidth>(rounded, m.grad, g.dv, body, head, tokens, at);
  const int words = p.mode != kPlain ? (tokens + 31) / 32 : 0;
#pragma unroll 1
  for (int i = at.thread; i < p.joints * p.joints; i += at.threads) {
    const int u = i / p.joints, v = i % p.joints;
    float sum = 0;
#pragma unroll 1
    for (int word = 0; word < words; ++word) {
#pragma unroll 1
      for (unsigned bits = m.mask[u * BackwardMemory::kMaskWords + word]; bits != 0; bits &= bits - 1) {
        sum += m.dterm[(32 * word + __ffs(static_cast<int>(bits)) - 1) * kDtermStride + v];
      }
    }
    m.dtable[i] += sum;
  }
  __syncthreads();
}

/// Gradients of a part of the bodies at a head; the table's is summed over the bodies and written as one partial table.
/// `kJointTiles`: at least an eighth of the joints. All threads of the block, 32 for each tile of the tokens, call it.
template <bool kBfloat16, int kWidth, int kJointTiles>
__device__ void differentiate(const Problem& p, const Backward& g, unsigned char* memory, int head, int part) {
  const int thread = static_cast<int>(threadIdx.x), tiles = tiles_of(p.tokens), entries = p.joints * p.joints;
  const BackwardMemory m(memory, kWidth, p.tokens, p.joints);
#pragma unroll 1
  for (int i = thread; i < entries; i += 32 * tiles) m.dtable[i] = 0;  // a thread's own ones, to the end
  const int64_t end = p.bodies * (part + 1) / g.parts;
#pragma unroll 1
  for (int64_t body = p.bodies * part / g.parts; body < end; ++body) {
    // Told nothing about the thread, the compiler cannot keep what follows from it in registers from body to body.
    const Place at(tensor_core::untold(threadIdx.x), tiles);
    differentiate_body<kBfloat16, kWidth, kJointTiles>(p, g, m, body, head, at);
  }
  float* partial = g.partial + (static_cast<int64_t>(head) * g.parts + part) * entries;
#pragma unroll 1
  for (int i = thread; i < entries; i += 32 * tiles) partial[i] = m.dtable[i];
}

constexpr int kSumWarps = 8;

/// `to[i] = sum over parts of partial[i / entries, part, i % entries]` for the 32 numbers of block number `task`, in an
/// order that is always the same. `sums`: [kSumWarps * 32] of shared memory. 32 * kSumWarps threads call it.
__device__ inline void add_parts(const float* partial, int parts, int entries, int total, float* to, float* sums,
                                 int task) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, i = 32 * task + thread % 32;
  float sum = 0;
  if (i < total) {
    const float* from = partial + (static_cast<int64_t>(i / entries) * parts) * entries + i % entries;
#pragma unroll 8
    for (int part = warp; part < parts; part += kSumWarps) sum += from[static_cast<int64_t>(part) * entries];
  }
  sums[thread] = sum;
  __syncthreads();
  if (warp == 0 && i < total) {
    for (int other = 1; other < kSumWarps; ++other) sum += sums[32 * other + thread];
    to[i] = sum;
  }
}

}  // namespace

}  // namespace jmm_fast::topology_attention::cuda
