// The joint motion mask, one body at a time. Compiled once per instruction set (JMM_ISA).
//
// Everything is done in float32 on vectors of tokens, with a bound on the error that is known for each body. The kept
// tokens are those below one threshold; tokens so close to it that rounding could decide are looked at again in double
// precision, so the set is the one that the formulas give in double precision.
//
// Ranking the keys z - log(-log u) is ranking e^z / (-log u), and e^z is needed for the probabilities anyway.

#include "motion_mask/cpu_kernel.h"

#include "philox.h"
#include "vec.h"

#if JMM_LANES > 4
  #include <immintrin.h>
#endif

namespace jmm_fast::motion_mask::JMM_ISA {

namespace {

constexpr float kEps = 1.1920929e-7f;
/// Tokens scored together: their planes, raw and centred, stay in the first cache.
constexpr int64_t kChunk = 256;
/// Rows of tokens may be written and read past their end by less than this.
constexpr int64_t kPad = 64;
/// The search for the threshold stops when so few keys are left that sorting them costs less.
constexpr int64_t kFew = 12;
/// Below this ratio the float32 exponential may have lost digits.
constexpr float kSmallest = 1e-25f;

inline Vec magnitude(Vec x) {
  const IntVec bits = reinterpret_cast<const IntVec&>(x) & 0x7fffffff;
  return reinterpret_cast<const Vec&>(bits);
}

inline IntVec lane_numbers() {
  IntVec x{};
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

inline int32_t count_lanes(IntVec x) {
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

/// log x of a normal positive x, relative error below 3 * 2^-23 (near 1 too).
inline Vec log_positive(Vec x) {
  // x = 2^e (1 + r) with 1 + r in [sqrt(1/2), sqrt 2); log(1 + r) = r + r^2 times its minimax polynomial.
  const IntVec bits = reinterpret_cast<const IntVec&>(x);
  const IntVec exponent = (bits - 0x3f3504f3) >> 23;
  const IntVec scaled = bits - (exponent << 23);
  const Vec r = reinterpret_cast<const Vec&>(scaled) - 1.0f;
  constexpr float c0 = -0.499999881f, c1 = 0.333333254f, c2 = -0.250015825f, c3 = 0.200019747f, c4 = -0.166090816f,
                  c5 = 0.141818136f, c6 = -0.132429853f, c7 = 0.129044935f, c8 = -0.0762185603f;
  const Vec p = (((((((c8 * r + c7) * r + c6) * r + c5) * r + c4) * r + c3) * r + c2) * r + c1) * r + c0;
  return __builtin_convertvector(exponent, Vec) * kLn2 + (r * r * p + r);
}

/// Where a thread keeps what belongs to one body.
struct Buffers {
  double* key;  ///< of candidates, in double precision
  float *raw, *centred, *norm, *score, *draw, *weight, *ratio;
  int32_t* index;  ///< tokens of the candidates
  int64_t row;     ///< floats between two planes
};

int64_t chunk_steps(const Problem& p) { return kChunk > p.joints ? kChunk / p.joints : 1; }

/// One cache line more than a power of two times something: planes must not share cache sets.
int64_t plane_row(const Problem& p) { return round_up((chunk_steps(p) + 1) * p.joints + kPad, 32) + 16; }

int64_t token_row(const Problem& p) { return round_up(p.tokens + kPad, 16); }

Buffers split(const Problem& p, float* scratch) {
  const int64_t planes = p.patch * p.coordinates, tokens = token_row(p);
  Buffers b;
  b.row = plane_row(p);
  b.key = reinterpret_cast<double*>(scratch);
  b.score = scratch + 2 * tokens;
  b.draw = b.score + tokens;
  b.weight = b.draw + tokens;
  b.ratio = b.weight + tokens;
  b.index = reinterpret_cast<int32_t*>(b.ratio + tokens);
  b.norm = b.ratio + 2 * tokens;
  b.raw = b.norm + b.row;
  b.centred = b.raw + planes * b.row;
  return b;
}

// ---- Scores --------------------------------------------------------------------------------------------------------

/// One frame of a body, `[V,C]`, to planes `to + c * stride`; may write up to kLanes values more in each.
/// `spare`: floats that may be read behind this frame.
inline void unpack_frame(const Problem& p, const float* __restrict from, int64_t spare, float* __restrict to,
                         int64_t stride) {
  if (p.joint_stride == 3 && p.coordinate_stride == 1 && p.coordinates == 3) {
    float* __restrict x = to;
    float* __restrict y = to + stride;
    float* __restrict z = to + 2 * stride;
    int64_t v = 0;
    for (; v < p.joints && (v + kLanes - p.joints) * 3 <= spare; v += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        x[v + l] = from[3 * (v + l)];
        y[v + l] = from[3 * (v + l) + 1];
        z[v + l] = from[3 * (v + l) + 2];
      }
    }
    for (; v < p.joints; ++v) x[v] = from[3 * v], y[v] = from[3 * v + 1], z[v] = from[3 * v + 2];
    return;
  }
  for (int64_t c = 0; c < p.coordinates; ++c) {
    const float* source = from + c * p.coordinate_stride;
    for (int64_t v = 0; v < p.joints; ++v) to[c * stride + v] = source[v * p.joint_stride];
  }
}

/// Centres the `kPlanes` (0: `planes`) numbers of tokens [begin, end) and takes their norm.
template <int kPlanes>
void centre(const Buffers& b, int64_t planes, int64_t begin, int64_t end) {
  const int64_t count = kPlanes != 0 ? kPlanes : planes, row = b.row;
  const float share = 1.0f / static_cast<float>(count);
  const float* __restrict raw = b.raw;
  float* __restrict centred = b.centred;
  float* __restrict norm = b.norm;
  for (int64_t i = begin; i < end; i += kLanes) {
    // Seen from the first number: far from the origin, the rounding of a mean would drown small differences.
    const Vec first = load(raw + i);
    Vec even{}, odd{};
#pragma GCC unroll 12
    for (int64_t j = 1; j < count; ++j) {
      const Vec d = load(raw + j * row + i) - first;
      (j & 1 ? odd : even) += d;
    }
    const Vec mean = (even + odd) * share;
    Vec even_squares = mean * mean, odd_squares{};
    store(centred + i, -mean);
#pragma GCC unroll 12
    for (int64_t j = 1; j < count; ++j) {
      const Vec c = load(raw + j * row + i) - first - mean;
      (j & 1 ? odd_squares : even_squares) += c * c;
      store(centred + j * row + i, c);
    }
    store(norm + i, even_squares + odd_squares);
  }
  for (int64_t i = begin; i < end; ++i) norm[i] = __builtin_sqrtf(norm[i]);
}

struct Extent {
  Vec largest, sum, norm;
};

/// Scores of tokens [begin, end) of the planes, each against the token one row of joints before.
template <int kVariant, int kPlanes>
void score_tokens(const Problem& p, const Buffers& b, int64_t planes, int64_t begin, int64_t end, float* __restrict to,
                  Extent& extent) {
  const int64_t count = kPlanes != 0 ? kPlanes : planes, row = b.row, before = p.joints;
  const float share = 1.0f / static_cast<float>(count);
  const float gate = static_cast<float>(p.gate), rest = static_cast<float>(1.0 - p.gate);
  const float* __restrict raw = b.raw;
  const float* __restrict centred = b.centred;
  for (int64_t i = begin; i < end; i += kLanes) {
    Vec even{}, odd{}, product_even{}, product_odd{};
#pragma GCC unroll 12
    for (int64_t j = 0; j < count; ++j) {
      const float* at = raw + j * row + i;
      (j & 1 ? odd : even) += magnitude(load(at) - load(at - before));
      if constexpr (kVariant != kMamp) {
        const float* c = centred + j * row + i;
        const Vec product = load(c) * load(c - before);
        (j & 1 ? product_odd : product_even) += kVariant == kReleased ? magnitude(product) : product;
      }
    }
    Vec value = (even + odd) * share, norm{};
    if constexpr (kVariant != kMamp) {
      norm = load(b.norm + i) * load(b.norm + i - before);
      const Vec similar = (product_even + product_odd) / (norm + 1e-10f);
      value = kVariant == kReleased ? value + similar * share : gate * value + rest * magnitude(similar);
    }
    store(to + i - begin, value);
    if (end - i < kLanes) {
      // What lies behind the last token is left from another body, or nothing at all.
      const IntVec inside = lane_numbers() < static_cast<int32_t>(end - i);
      value = inside ? value : Vec{};
      norm = inside ? norm : Vec{};
    }
    extent.largest = larger(extent.largest, value);
    extent.sum += value;
    extent.norm = larger(extent.norm, norm);
  }
}

/// Scores of the body into `b.score`.
template <int kVariant, int kPlanes>
Extent score_body(const Problem& p, const Buffers& b, const float* body) {
  const int64_t planes = p.patch * p.coordinates, joints = p.joints, rows = chunk_steps(p);
  const int64_t frame = joints * p.coordinates;
  Extent extent{};
  // Row 0 of the planes holds the time step before the chunk.
  for (int64_t step = 0; step < p.steps; step += rows) {
    const int64_t here = smaller(rows, p.steps - step);
    for (int64_t s = 0; s < here; ++s) {
      for (int64_t f = 0; f < p.patch; ++f) {
        const int64_t t = (step + s) * p.patch + f;
        const int64_t spare = p.frame_stride >= frame ? (p.steps * p.patch - 1 - t) * frame : 0;
        unpack_frame(p, body + t * p.frame_stride, spare, b.raw + f * p.coordinates * b.row + (s + 1) * joints, b.row);
      }
    }
    const int64_t end = (here + 1) * joints;
    if constexpr (kVariant != kMamp) centre<kPlanes>(b, planes, joints, end);
    const int64_t first = step == 0 ? 1 : 0;
    score_tokens<kVariant, kPlanes>(p, b, planes, (1 + first) * joints, end, b.score + (step + first) * joints, extent);
    for (int64_t j = 0; j < planes; ++j) {
      for (int64_t v = 0; v < joints; ++v) b.raw[j * b.row + v] = b.raw[j * b.row + end - joints + v];
      if constexpr (kVariant != kMamp) {
        for (int64_t v = 0; v < joints; ++v) b.centred[j * b.row + v] = b.centred[j * b.row + end - joints + v];
      }
    }
    if constexpr (kVariant != kMamp) {
      for (int64_t v = 0; v < joints; ++v) b.norm[v] = b.norm[end - joints + v];
    }
  }
  for (int64_t v = 0; v < joints; ++v) b.score[v] = b.score[joints + v];
  return extent;
}

template <int kVariant>
Extent score_body(const Problem& p, const Buffers& b, const float* body) {
  if (p.patch * p.coordinates == 12) return score_body<kVariant, 12>(p, b, body);
  return score_body<kVariant, 0>(p, b, body);
}

// ---- The same in double precision, for the few tokens where it matters
// -----------------------------------------------

double exact_score(const Problem& p, const float* body, int64_t token) {
  const int64_t step = token < p.joints ? 1 : token / p.joints;
  const float* from = body + token % p.joints * p.joint_stride + step * p.patch * p.frame_stride;
  const float* before = from - p.patch * p.frame_stride;
  const int64_t count = p.patch * p.coordinates;
  double difference = 0, mean_a = 0, mean_b = 0;
  auto each = [&](auto&& take) {
    for (int64_t f = 0; f < p.patch; ++f) {
      for (int64_t c = 0; c < p.coordinates; ++c) {
        const int64_t at = f * p.frame_stride + c * p.coordinate_stride;
        take(static_cast<double>(from[at]), static_cast<double>(before[at]));
      }
    }
  };
  each([&](double a, double b) {
    difference += __builtin_fabs(a - b);
    mean_a += a;
    mean_b += b;
  });
  const double n = static_cast<double>(count);
  difference /= n, mean_a /= n, mean_b /= n;
  if (p.variant == kMamp) return difference;
  double squares_a = 0, squares_b = 0, product = 0, products = 0;
  each([&](double a, double b) {
    a -= mean_a, b -= mean_b;
    squares_a += a * a;
    squares_b += b * b;
    product += a * b;
    products += __builtin_fabs(a * b);
  });
  const double norm = __builtin_sqrt(squares_a) * __builtin_sqrt(squares_b) + 1e-10;
  if (p.variant == kReleased) return difference + products / norm / n;
  return p.gate * difference + (1 - p.gate) * __builtin_fabs(product) / norm;
}

/// Moves the `wanted` smallest keys to the front, ties by token (`b.index` ascends at first); NaN counts as largest.
void select_exact(const Problem& p, const Buffers& b, const float* body, const float* draws, int64_t candidates,
                  int64_t wanted, float least_of_largest) {
  double largest = 0;
  for (int64_t token = p.joints; token < p.tokens; ++token) {
    // Written so that NaN is looked at as well, and wins.
    if (b.score[token] < least_of_largest) continue;
    const double score = exact_score(p, body, token);
    if (!(score <= largest)) largest = score;
    if (score != score) break;
  }
  const double scale = largest * p.tau + 1e-10;
  for (int64_t i = 0; i < candidates; ++i) {
    const int32_t token = b.index[i];
    const double z = exact_score(p, body, token) / scale;
    b.key[i] = z - __builtin_log(-__builtin_log(static_cast<double>(draws[token]) + 1e-10) + 1e-10);
  }
  // Insertion sort of no more than the wanted ones: stable, and the candidates are few unless keys are equal.
  auto precedes = [](double x, double y) { return x < y || (x == x && y != y); };
  for (int64_t i = 0; i < candidates; ++i) {
    const double key = b.key[i];
    const int32_t token = b.index[i];
    int64_t at = smaller(i, wanted);
    if (at == wanted && !precedes(key, b.key[--at])) continue;
    for (; at > 0 && precedes(key, b.key[at - 1]); --at) {
      b.key[at] = b.key[at - 1];
      b.index[at] = b.index[at - 1];
    }
    b.key[at] = key;
    b.index[at] = token;
  }
}

// ---- Draws and ratios ----------------------------------------------------------------------------------------------

void fill_draws(const Problem& p, int64_t body, float* __restrict to) {
  if (p.uniform != nullptr) {
    const float* from = p.uniform + body * p.tokens;
    for (int64_t i = 0; i < p.tokens; ++i) to[i] = from[i];
    for (int64_t i = p.tokens; i < p.tokens + kLanes; ++i) to[i] = 0.5f;
    return;
  }
  const uint64_t clip = static_cast<uint64_t>(p.clip_ids != nullptr ? p.clip_ids[body] : body);
  const PhiloxStream stream = philox_stream(p.seed, Purpose::kMask, clip, p.epoch);
  for (int64_t i = 0; i < p.tokens; i += 64) {
    const uint32_t first = static_cast<uint32_t>(i / 4);
    for (uint32_t l = 0; l < 16; ++l) {
      const PhiloxWords words = stream.block(first + l);
      to[i + 4 * l] = philox_uniform(words.x0);
      to[i + 4 * l + 1] = philox_uniform(words.x1);
      to[i + 4 * l + 2] = philox_uniform(words.x2);
      to[i + 4 * l + 3] = philox_uniform(words.x3);
    }
  }
}

/// Weights e^(z - max z) to `weight` and ratios weight / (-log u) to `ratio`, whose bits order as they do; lanes behind
/// the last token get the largest ratio. Returns the sum of the weights.
float fill_ratios(const Buffers& b, int64_t tokens, float largest, float scale, int32_t& least, int32_t& most) {
  const float inverse = 1.0f / scale;
  const IntVec lane = lane_numbers();
  // Summed in two levels: a single sum of so many would lose digits where vectors are short.
  Vec total{}, partial{};
  IntVec low = lane - lane + 0x7fffffff, high = -1 - low;
  for (int64_t i = 0; i < tokens; i += kLanes) {
    const IntVec inside = lane < static_cast<int32_t>(smaller(tokens - i, kLanes));
    const Vec weight = exp_nonpositive((load(b.score + i) - largest) * inverse);
    partial += inside ? weight : Vec{};
    if ((i / kLanes) % 8 == 7) total += partial, partial = Vec{};
    store(b.weight + i, weight);
    // The second 1e-10 of the key is left out: it takes back what the first one adds to draws near 1, which a float
    // cannot hold, and is nothing next to the logarithm of the others.
    const Vec ratio = weight / -log_positive(load(b.draw + i) + 1e-10f);
    const IntVec bits = reinterpret_cast<const IntVec&>(ratio);
    const IntVec lowest = inside ? bits : lane - lane + 0x7fffffff;
    const IntVec highest = inside ? bits : lane - lane;
    low = low < lowest ? low : lowest;
    high = high > highest ? high : highest;
    *reinterpret_cast<IntVec*>(b.ratio + i) = lowest;
  }
  least = low[0], most = high[0];
  for (int l = 1; l < kLanes; ++l) {
    least = low[l] < least ? low[l] : least;
    most = high[l] > most ? high[l] : most;
  }
  return sum_lanes(total + partial);
}

// ---- The threshold -------------------------------------------------------------------------------------------------

inline IntVec bits_at(const float* ratio, int64_t i) { return *reinterpret_cast<const IntVec*>(ratio + i); }

/// One bit for each lane that is -1.
inline uint32_t lane_bits(IntVec set) {
#if JMM_LANES == 16
  return static_cast<uint32_t>(_mm512_movepi32_mask(reinterpret_cast<const __m512i&>(set)));
#elif JMM_LANES == 8
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<const __m256&>(set)));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= static_cast<uint32_t>(set[l] & 1) << l;
  return bits;
#endif
}

int64_t count_below(const float* ratio, int64_t tokens, int32_t bound) {
  IntVec first{}, second{};
  int64_t i = 0;
  for (; i + kLanes < tokens; i += 2 * kLanes) {
    first -= bits_at(ratio, i) < bound;
    second -= bits_at(ratio, i + kLanes) < bound;
  }
  if (i < tokens) first -= bits_at(ratio, i) < bound;
  return count_lanes(first + second);
}

struct Cut {
  int32_t bound;      ///< bits of the ratio: tokens below it are kept
  int64_t ambiguous;  ///< tokens in `b.index` that double precision must choose from; 0 when the bound says all
  int64_t wanted;     ///< how many of them
};

/// Where the kept tokens end, when each ratio may be off by `slack` units in the last place either way.
Cut find_cut(const Buffers& b, int64_t tokens, int64_t kept, int32_t least, int32_t most, int32_t slack) {
  int32_t low = least, high = most + 1;
  int64_t below_low = 0, below_high = tokens;
  while (below_high - below_low > kFew && high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    const int64_t below = count_below(b.ratio, tokens, middle);
    if (below < kept) {
      low = middle, below_low = below;
    } else {
      high = middle, below_high = below;
    }
  }
  // All that could lie within the slack of the threshold, which is in [low, high).
  int64_t count = 0;
  int32_t few[kFew] = {};
  int64_t found = 0;
  for (int64_t i = 0; i < tokens; i += kLanes) {
    const IntVec bits = bits_at(b.ratio, i);
    for (uint32_t set = lane_bits((bits >= low - slack) & (bits < high + slack)); set != 0; set &= set - 1) {
      const int32_t token = static_cast<int32_t>(i) + __builtin_ctz(set);
      b.index[count++] = token;
      const int32_t value = bits[token - static_cast<int32_t>(i)];
      if (value < low || value >= high || found == kFew) continue;
      int64_t at = found++;
      for (; at > 0 && few[at - 1] > value; --at) few[at] = few[at - 1];
      few[at] = value;
    }
  }
  const int32_t threshold = high - low > 1 ? few[kept - below_low - 1] : low;
  int64_t sure = below_low, ambiguous = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t token = b.index[i], value = bits_at(b.ratio, token)[0];
    sure += (value >= low && value < threshold - slack) - (value < low && value >= threshold - slack);
    if (value < threshold - slack || value > threshold + slack) continue;
    b.index[ambiguous++] = token;
  }
  if (sure + ambiguous == kept) return {threshold + slack + 1, 0, 0};
  return {threshold - slack, ambiguous, kept - sure};
}

// ---- Results -------------------------------------------------------------------------------------------------------

typedef int64_t Long8 __attribute__((vector_size(64), aligned(8), may_alias));
typedef uint8_t Byte8 __attribute__((vector_size(8), aligned(8), may_alias));

/// For each of eight bits: how many lower ones are set, and whether it is.
struct Prefixes {
  alignas(8) uint8_t before[256][8];
  constexpr Prefixes() : before{} {
    for (int bits = 0; bits < 256; ++bits) {
      for (int i = 0, seen = 0; i < 8; seen += bits >> i & 1, ++i) {
        before[bits][i] = static_cast<uint8_t>(seen);
      }
    }
  }
};
constexpr Prefixes kPrefixes;

void write(const Problem& p, const Result& result, const Buffers& b, int64_t body, int32_t bound, float total) {
  const int64_t tokens = p.tokens, kept = p.kept;
  float* __restrict probability = result.probability + body * tokens;
  const float share = 1.0f / total;
  for (int64_t i = 0; i < tokens; ++i) probability[i] = b.weight[i] * share;

  int64_t* __restrict visible = result.visible + body * kept;
  int64_t* __restrict restore = result.restore + body * tokens;
  uint8_t* __restrict mask = reinterpret_cast<uint8_t*>(result.mask) + body * tokens;
  const int32_t* __restrict bits = reinterpret_cast<const int32_t*>(b.ratio);
  for (int64_t i = 0; i < tokens; ++i) mask[i] = bits[i] >= bound;

  const Long8 lane{0, 1, 2, 3, 4, 5, 6, 7};
  int64_t seen = 0;
  for (int64_t i = 0; i < tokens; i += 8) {
    uint32_t set = 0;
#if JMM_LANES == 16
    set = lane_bits(bits_at(b.ratio, i) < bound) & 0xff;
#else
    for (int64_t j = 0; j < 8; j += kLanes) set |= lane_bits(bits_at(b.ratio, i + j) < bound) << j;
#endif
    if (tokens - i < 8) set &= (1u << (tokens - i)) - 1;
    const Long8 before = __builtin_convertvector(*reinterpret_cast<const Byte8*>(kPrefixes.before[set]), Long8) + seen;
    const Long8 chosen = (static_cast<int64_t>(set) >> lane & 1) != 0;
    const Long8 place = chosen ? before : lane + (kept + i) - before;
    if (tokens - i >= 8) {
      *reinterpret_cast<Long8*>(restore + i) = place;
    } else {
      for (int64_t l = 0; l < tokens - i; ++l) restore[i + l] = place[l];
    }
    for (; set != 0; set &= set - 1) visible[seen++] = i + __builtin_ctz(set);
  }
}

}  // namespace

int64_t scratch(const Problem& p) { return 7 * token_row(p) + (1 + 2 * p.patch * p.coordinates) * plane_row(p); }

bool draw(const Problem& p, const Result& result, float* memory, int64_t body) {
  const Buffers b = split(p, memory);
  const float* clip = p.clips + body * p.body_stride;
  fill_draws(p, body, b.draw);
  const Extent extent = p.variant == kReleased ? score_body<kReleased>(p, b, clip)
                        : p.variant == kPaper  ? score_body<kPaper>(p, b, clip)
                                               : score_body<kMamp>(p, b, clip);
  const float largest = max_lanes(extent.largest), norm = max_lanes(extent.norm), sum = sum_lanes(extent.sum);
  const float tau = static_cast<float>(p.tau), scale = largest * tau + 1e-10f;
  int32_t least = 0, most = 0;
  const float total = fill_ratios(b, p.tokens, largest, scale, least, most);

  // How far a score can be from the formula, worst case: sums of up to n numbers lose n / 2 units. The mean that is
  // taken off first enters the absolute products of `released`; both vanish with the norms.
  const float count = static_cast<float>(p.patch * p.coordinates);
  const float similar = p.variant == kMamp    ? 0.0f
                        : p.variant == kPaper ? static_cast<float>(1.0 - p.gate)
                                              : 1.0f / count;
  const float error = kEps * ((count / 2 + 4) * largest + 8 * (count + 4) * similar * norm / (norm + 1e-10f));
  // The same for a ratio, relative: score and largest score, rounding of z and of e^z, logarithm and quotient.
  const float ratio_error = 2 * error / scale + kEps * (4 / tau + 8);
  constexpr int32_t infinite = 0x7f800000;
  const bool finite = sum < kInfinity && ratio_error < 0.125f && least >= 0 && most < infinite;
  Cut cut{0, 0, 0};
  // Two ratios are each off by this much, in units in the last place of which there are 2^23 to 2^24 in a factor of 2.
  const int32_t slack = finite ? static_cast<int32_t>(2 * ratio_error * 16777216.0f) + 4 : 0;
  if (finite) cut = find_cut(b, p.tokens, p.kept, least, most, slack);
  const bool trusted = finite && cut.bound > __builtin_bit_cast(int32_t, kSmallest);
  if (!trusted) {
    for (int64_t i = 0; i < p.tokens; ++i) b.index[i] = static_cast<int32_t>(i);
    cut = {0, p.tokens, p.kept};
  }
  if (cut.ambiguous > 0) {
    select_exact(p, b, clip, b.draw, cut.ambiguous, cut.wanted, trusted ? largest - 2 * error : -1.0f);
    constexpr int32_t lowest = -0x7fffffff - 1;
    int32_t* bits = reinterpret_cast<int32_t*>(b.ratio);
    if (!trusted) {
      for (int64_t i = 0; i < p.tokens; ++i) bits[i] = 0x7fffffff;
      cut.bound = 0;
    }
    for (int64_t i = 0; i < cut.wanted; ++i) bits[b.index[i]] = lowest;
  }
  write(p, result, b, body, cut.bound, total);
  return cut.ambiguous > 0;
}

}  // namespace jmm_fast::motion_mask::JMM_ISA
