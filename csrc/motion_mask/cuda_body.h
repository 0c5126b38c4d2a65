#pragma once

// The joint motion mask of one body, by the threads of one block. tests/cuda/ compiles this file for the CPU as well.
//
// Scores and keys are in double precision, as in the plain twin: a body is 36 KB to read, and GPUs for data centres do
// half as many operations in double precision as in single. So no bound on an error is needed to get the same set.
//
// No thread waits for another one but at the barriers, which all of a block reach together. Sums of floats are added up
// in a fixed order; only integers are added up atomically.

#include "motion_mask/score.h"
#include "philox.h"

namespace jmm_fast::motion_mask::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
/// Keys are sorted into this many bins; only those of the bin where the kept tokens end are compared with one another.
constexpr int kBins = 1024, kBinsOfThread = kBins / kThreads;
constexpr unsigned kAll = 0xffffffffu;

/// Shared memory of a block.
struct Memory {
  double* score;      ///< [L], later e^(z - max z)
  double* key;        ///< [L], the draws at first
  double* partial;    ///< [kWarps] of a reduction
  int* bins;          ///< [kBins] tokens in each bin
  int* candidates;    ///< [L]
  unsigned* words;    ///< [L / 32] one bit for each token: kept
  int* words_before;  ///< [L / 32] kept tokens before each word
  int* cut;           ///< [4] bin of the last kept token, tokens in lower bins, in it, and how many were listed

  JMM_HOST_DEVICE static constexpr int words_of(int tokens) { return (tokens + 31) / 32; }

  JMM_HOST_DEVICE static constexpr int bytes(int tokens) {
    return 8 * (2 * tokens + kWarps) + 4 * (kBins + tokens + 2 * words_of(tokens) + 4);
  }

  __device__ Memory(double* from, int tokens) {
    score = from, key = score + tokens, partial = key + tokens;
    bins = reinterpret_cast<int*>(partial + kWarps), candidates = bins + kBins;
    words = reinterpret_cast<unsigned*>(candidates + tokens);
    words_before = candidates + tokens + words_of(tokens), cut = words_before + words_of(tokens);
  }
};

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};

struct Smaller {
  __device__ double operator()(double a, double b) const { return a < b ? a : b; }
};

/// NaN wins, as in torch.
struct Larger {
  __device__ double operator()(double a, double b) const { return a > b || a != a ? a : b; }
};

/// `combine` over the values of all threads, in an order that is always the same; every thread gets it.
template <typename Combine>
__device__ double reduce(double value, double* partial, Combine combine) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAll, value, distance));
  }
  __syncthreads();  // what the reduction before left there may still be read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = partial[0];
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, partial[warp]);
  return value;
}

/// Sum over the threads before this one. All have met at a barrier since `partial` was last read.
__device__ inline int sum_before(int value, double* partial) {
  const int lane = static_cast<int>(threadIdx.x % 32), own_warp = static_cast<int>(threadIdx.x / 32);
  int sum = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kAll, sum, distance);
    if (lane >= distance) sum += other;
  }
  int* sums = reinterpret_cast<int*>(partial);
  if (lane == 31) sums[own_warp] = sum;
  __syncthreads();
  int before = sum - value;
  for (int warp = 0; warp < own_warp; ++warp) before += sums[warp];
  return before;
}

/// Whether the score of a token compares two tokens that were seen; `token` is not in the first time step.
__device__ inline bool known(const bool* valid, int token, int joints) {
  return valid == nullptr || (valid[token] && valid[token - joints]);
}

/// Keys by size, ties by token; NaN counts as largest.
__device__ inline bool precedes(const double* key, int a, int b) {
  const double x = key[a], y = key[b];
  if (x < y || (x == x && y != y)) return true;
  return (x == y || (x != x && y != y)) && a < b;
}

/// Bins of [low, high], which rise with the key; the last one also holds what is not a number.
struct Binning {
  double low, scale;

  __device__ int operator()(double key) const {
    const double place = (key - low) * scale;
    return place < kBins - 1 ? (place > 0 ? static_cast<int>(place) : 0) : kBins - 1;
  }
};

__device__ inline void fill_draws(const Problem& p, int64_t body, double* to) {
  const int tokens = static_cast<int>(p.tokens), thread = static_cast<int>(threadIdx.x);
  if (p.uniform != nullptr) {
    for (int i = thread; i < tokens; i += kThreads) to[i] = p.uniform[body * p.tokens + i];
    return;
  }
  const PhiloxStream stream = draws_of(p, body);
  for (int i = 4 * thread; i < tokens; i += 4 * kThreads) {
    const PhiloxWords words = stream.block(static_cast<uint32_t>(i / 4));
    to[i] = philox_uniform(words.x0);
    if (i + 1 < tokens) to[i + 1] = philox_uniform(words.x1);
    if (i + 2 < tokens) to[i + 2] = philox_uniform(words.x2);
    if (i + 3 < tokens) to[i + 3] = philox_uniform(words.x3);
  }
}

/// Bits of the kept tokens into `m.words`, from the keys in [low, high] or not finite. Where `valid` is given, more
/// than `kept` tokens are valid, and the others have no key.
__device__ inline void select(const Memory& m, const bool* valid, int tokens, int kept, double low, double high) {
  const int thread = static_cast<int>(threadIdx.x);
  const Binning bin{low, kBins / (high - low)};
  for (int i = thread; i < kBins; i += kThreads) m.bins[i] = 0;
  for (int i = thread; i < Memory::words_of(tokens); i += kThreads) m.words[i] = 0;
  if (thread == 0) m.cut[3] = 0;
  __syncthreads();
  for (int i = thread; i < tokens; i += kThreads) {
    if (valid == nullptr || valid[i]) atomicAdd(&m.bins[bin(m.key[i])], 1);
  }
  __syncthreads();
  const int* own = m.bins + kBinsOfThread * thread;
  int count = 0;
  for (int i = 0; i < kBinsOfThread; ++i) count += own[i];
  int below = sum_before(count, m.partial);
  if (below < kept && kept <= below + count) {
    int i = 0;
    for (; below + own[i] < kept; ++i) below += own[i];
    m.cut[0] = kBinsOfThread * thread + i, m.cut[1] = below, m.cut[2] = own[i];
  }
  __syncthreads();
  const int last = m.cut[0], wanted = kept - m.cut[1];
  const bool all = wanted == m.cut[2];
  for (int i = thread; i < tokens; i += kThreads) {
    if (valid != nullptr && !valid[i]) continue;
    const int at = bin(m.key[i]);
    if (at < last || (at == last && all)) {
      atomicOr(&m.words[i / 32], 1u << i % 32);
    } else if (at == last) {
      m.candidates[atomicAdd(&m.cut[3], 1)] = i;
    }
  }
  __syncthreads();
  // The order of the list is a matter of chance, the number of candidates that precede one is not.
  const int candidates = m.cut[3];
  for (int c = thread; c < candidates; c += kThreads) {
    const int token = m.candidates[c];
    int rank = 0;
    for (int i = 0; i < candidates; ++i) rank += precedes(m.key, m.candidates[i], token);
    if (rank < wanted) atomicOr(&m.words[token / 32], 1u << token % 32);
  }
  __syncthreads();
}

/// Draws the mask of a body. `memory`: `Memory::bytes` of shared memory. All threads of a block call it. The sizes are
/// those of `exact_score`.
template <int kPatch, int kCoordinates>
__device__ void draw(const Problem& p, const Result& result, double* memory, int64_t body) {
  const int tokens = static_cast<int>(p.tokens), joints = static_cast<int>(p.joints), kept = static_cast<int>(p.kept);
  const int thread = static_cast<int>(threadIdx.x);
  const Memory m(memory, tokens);
  const float* clip = p.clips + body * p.body_stride;
  const bool* valid = p.valid != nullptr ? p.valid + body * p.tokens : nullptr;

  fill_draws(p, body, m.key);
  double largest = 0;
  for (int i = joints + thread; i < tokens; i += kThreads) {
    const int step = i / joints, joint = i - step * joints;
    const double score = known(valid, i, joints) ? exact_score<kPatch, kCoordinates>(p, clip, step, joint) : 0.0;
    m.score[i] = score;
    if (step == 1) m.score[joint] = score;
    largest = Larger()(largest, score);
  }
  largest = reduce(largest, m.partial, Larger());

  const double infinity = HUGE_VAL, scale = largest * p.tau + 1e-10, largest_z = largest / scale;
  double total = 0, low = infinity, high = -infinity, seen = 0;
  for (int i = thread; i < tokens; i += kThreads) {
    const double z = m.score[i] / scale, weight = exp(z - largest_z);
    const double key = z - log(-log(m.key[i] + 1e-10) + 1e-10);
    m.score[i] = weight;
    m.key[i] = key;
    total += weight;
    if (valid != nullptr && !valid[i]) continue;
    seen += 1;
    if (fabs(key) < infinity) low = Smaller()(low, key), high = Larger()(high, key);
  }
  total = reduce(total, m.partial, Add());
  low = reduce(low, m.partial, Smaller());
  high = reduce(high, m.partial, Larger());
  const bool* choice = valid;
  if (valid != nullptr && (seen = reduce(seen, m.partial, Add())) <= kept) {
    // All that were seen, then the others in the order of the grid: as keys that say so.
    for (int i = thread; i < tokens; i += kThreads) m.key[i] = valid[i] ? -tokens : i;
    choice = nullptr, low = -tokens, high = tokens;
  }
  if (!(low < high)) {
    // One finite key at most, as where a clip holds what is not a number: all tokens would meet in one bin, each to be
    // compared with each. Keys of the same order that differ.
    for (int i = thread; i < tokens; i += kThreads) {
      const double key = m.key[i];
      const int kind = key == -infinity ? 0 : key < infinity ? 1 : key == infinity ? 2 : 3;
      m.key[i] = kind * tokens + i;
    }
    low = 0, high = 4 * tokens;
  }
  select(m, choice, tokens, kept, low, high);

  const int words = Memory::words_of(tokens);
  const int before = sum_before(thread < words ? __popc(m.words[thread]) : 0, m.partial);
  if (thread < words) m.words_before[thread] = before;
  __syncthreads();
  for (int i = thread; i < tokens; i += kThreads) {
    const int64_t at = body * p.tokens + i;
    const unsigned word = m.words[i / 32];
    const bool keep = (word >> i % 32 & 1) != 0;
    const int rank = m.words_before[i / 32] + __popc(word & ((1u << i % 32) - 1));
    result.probability[at] = static_cast<float>(m.score[i] / total);
    result.mask[at] = !keep;
    result.restore[at] = keep ? rank : kept + i - rank;
    if (keep) result.visible[body * p.kept + rank] = i;
  }
}

}  // namespace

/// Words of a body's tokens are counted by one thread each; 4096 tokens take 86 KB of shared memory, which every GPU
/// has from compute capability 8.0 on.
constexpr int kMostTokens = 4096;
static_assert(Memory::words_of(kMostTokens) <= kThreads && Memory::bytes(kMostTokens) <= 99 << 10);

}  // namespace jmm_fast::motion_mask::cuda
