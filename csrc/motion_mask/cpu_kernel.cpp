// The joint motion mask, one body at a time. Compiled once per instruction set (JMM_ISA).
//
// Everything is done in float32 on vectors of tokens, with a bound on the error that is known for each body. The kept
// tokens are those below one threshold; tokens so close to it that rounding could decide are looked at again in double
// precision, so the set is the one that the formulas give in double precision.
//
// Ranking the keys z - log(-log u) is ranking e^z / (-log u), and e^z is needed for the probabilities anyway.

#include "motion_mask/cpu_kernel.h"

#include "motion_mask/score.h"
#include "philox.h"
#include "vec.h"

#if JMM_LANES > 4
  #include <immintrin.h>
#elif defined(__SSE2__)
  #include <emmintrin.h>
#endif

namespace jmm_fast::motion_mask::JMM_ISA {

namespace {

constexpr float kEps = 1.1920929e-7f;
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
  float *score, *draw, *weight, *ratio;
  int32_t* index;  ///< tokens of the candidates
  Vec* current;    ///< numbers of a group of tokens
  Vec* before;     ///< for each group of joints: numbers, centred numbers and norm of the time step before
};

int64_t token_row(const Problem& p) { return round_up(p.tokens + kPad, 16); }
int64_t planes_of(const Problem& p) { return p.patch * p.coordinates; }
int64_t groups_of(const Problem& p) { return (p.joints + kLanes - 1) / kLanes; }

Buffers split(const Problem& p, float* scratch) {
  const int64_t tokens = token_row(p);
  Buffers b;
  b.key = reinterpret_cast<double*>(scratch);
  b.score = scratch + 2 * tokens;
  b.draw = b.score + tokens;
  b.weight = b.draw + tokens;
  b.ratio = b.weight + tokens;
  b.index = reinterpret_cast<int32_t*>(b.ratio + tokens);
  b.current = reinterpret_cast<Vec*>(b.ratio + 2 * tokens);
  b.before = b.current + planes_of(p);
  return b;
}

/// Lanes of a vector that hold coordinate `c` of triples (x, y, z), in the `part`-th of three vectors full of them.
constexpr uint32_t triple_bits(int c, int part) {
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) {
    if ((3 * l + c) / kLanes == part) bits |= 1u << (3 * l + c) % kLanes;
  }
  return bits;
}

/// Lane l of `b` where bit l is set, else of `a`.
template <uint32_t kBits>
inline Vec blend(Vec a, Vec b) {
#if JMM_LANES == 16
  return reinterpret_cast<Vec>(_mm512_mask_blend_ps(kBits, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif JMM_LANES == 8
  return reinterpret_cast<Vec>(_mm256_blend_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), kBits));
#else
  IntVec chosen{};
  for (int l = 0; l < kLanes; ++l) chosen[l] = (kBits >> l & 1) != 0 ? -1 : 0;
  return chosen ? b : a;
#endif
}

/// Coordinate `kC` of kLanes triples in three vectors. As 3 does not divide the number of lanes, they lie at different
/// lanes of their vectors: two blends collect them, one permutation puts them in order.
template <int kC>
inline Vec take(Vec a, Vec b, Vec c) {
  const Vec mixed = blend<triple_bits(kC, 2)>(blend<triple_bits(kC, 1)>(a, b), c);
#if defined(__clang__)
  Vec ordered;
  for (int l = 0; l < kLanes; ++l) ordered[l] = mixed[(3 * l + kC) % kLanes];
  return ordered;
#else
  IntVec from{};
  for (int l = 0; l < kLanes; ++l) from[l] = (3 * l + kC) % kLanes;
  return __builtin_shuffle(mixed, from);
#endif
}

inline Vec square_root(Vec x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int l = 0; l < kLanes; ++l) lanes[l] = __builtin_sqrtf(lanes[l]);
  return load(lanes);
}

/// Joints [joint, joint + kLanes) of one frame, a vector for each coordinate. Lanes without a joint hold anything.
/// `spare`: floats that may be read behind this frame.
template <bool kPacked>
inline void read_joints(const Problem& p, const float* frame, int64_t spare, int64_t joint, Vec* to) {
  const int64_t count = smaller(kLanes, p.joints - joint);
  if constexpr (kPacked) {
    const float* from = frame + 3 * joint;
    float tail[3 * kLanes];
    if (3 * (kLanes - count) > spare) {
      for (int64_t i = 0; i < 3 * kLanes; ++i) tail[i] = i < 3 * count ? from[i] : 0.0f;
      from = tail;
    }
    const Vec a = load(from), b = load(from + kLanes), c = load(from + 2 * kLanes);
    to[0] = take<0>(a, b, c);
    to[1] = take<1>(a, b, c);
    to[2] = take<2>(a, b, c);
  } else {
    for (int64_t c = 0; c < p.coordinates; ++c) {
      const float* from = frame + joint * p.joint_stride + c * p.coordinate_stride;
      float lanes[kLanes] = {};
      for (int64_t l = 0; l < count; ++l) lanes[l] = from[l * p.joint_stride];
      to[c] = load(lanes);
    }
  }
}

struct Extent {
  Vec largest, sum, norm;
};

/// Scores of the body into `b.score`; `kPlanes` is the size of a token, 0 if only known when running.
template <int kVariant, int kPlanes, bool kPacked>
Extent score_body(const Problem& p, const Buffers& b, const float* body) {
  const int64_t planes = kPlanes != 0 ? kPlanes : planes_of(p), groups = groups_of(p);
  const int64_t patch = kPacked && kPlanes != 0 ? kPlanes / 3 : p.patch, state = 2 * planes + 1;
  const int64_t frame_floats = p.frame_stride >= 3 * p.joints ? 3 * p.joints : 0;
  const float share = 1.0f / static_cast<float>(planes);
  const float gate = static_cast<float>(p.gate), rest = static_cast<float>(1.0 - p.gate);
  for (int64_t i = 0; i < groups * state; ++i) b.before[i] = Vec{};
  Extent extent{};
  for (int64_t step = 0; step < p.steps; ++step) {
    for (int64_t group = 0; group < groups; ++group) {
      // An array of known size stays in registers.
      Vec known[kPlanes != 0 ? kPlanes : 1];
      Vec* x = kPlanes != 0 ? known : b.current;
      const int64_t joint = group * kLanes;
#pragma GCC unroll 4
      for (int64_t f = 0; f < patch; ++f) {
        const int64_t t = step * patch + f;
        const int64_t spare = (p.steps * patch - 1 - t) * frame_floats;
        read_joints<kPacked>(p, body + t * p.frame_stride, spare, joint, x + f * p.coordinates);
      }

      Vec* before = b.before + group * state;
      Vec even{}, odd{};
#pragma GCC unroll 12
      for (int64_t j = 0; j < planes; ++j) {
        (j & 1 ? odd : even) += magnitude(x[j] - before[j]);
        before[j] = x[j];
      }
      Vec value = (even + odd) * share, norm{};
      if constexpr (kVariant != kMamp) {
        // Seen from the first number: far from the origin, the rounding of a mean would drown small differences.
        const Vec first = x[0];
        even = Vec{}, odd = Vec{};
#pragma GCC unroll 12
        for (int64_t j = 0; j < planes; ++j) {
          x[j] -= first;
          (j & 1 ? odd : even) += x[j];
        }
        const Vec mean = (even + odd) * share;
        Vec* centred = before + planes;
        Vec even_squares{}, odd_squares{};
        even = Vec{}, odd = Vec{};
#pragma GCC unroll 12
        for (int64_t j = 0; j < planes; ++j) {
          const Vec c = x[j] - mean;
          const Vec product = c * centred[j];
          (j & 1 ? odd_squares : even_squares) += c * c;
          (j & 1 ? odd : even) += kVariant == kReleased ? magnitude(product) : product;
          centred[j] = c;
        }
        const Vec length = square_root(even_squares + odd_squares);
        norm = length * before[2 * planes];
        before[2 * planes] = length;
        const Vec similar = (even + odd) / (norm + 1e-10f);
        value = kVariant == kReleased ? value + similar * share : gate * value + rest * magnitude(similar);
      }
      if (step == 0) continue;
      store(b.score + step * p.joints + joint, value);
      if (p.joints - joint < kLanes) {
        // Lanes without a joint hold something else.
        const IntVec inside = lane_numbers() < static_cast<int32_t>(p.joints - joint);
        value = inside ? value : Vec{};
        norm = inside ? norm : Vec{};
      }
      extent.largest = larger(extent.largest, value);
      extent.sum += value;
      extent.norm = larger(extent.norm, norm);
    }
  }
  for (int64_t v = 0; v < p.joints; ++v) b.score[v] = b.score[p.joints + v];
  return extent;
}

template <int kVariant>
Extent score_body(const Problem& p, const Buffers& b, const float* body) {
  // The same arithmetic however the clip lies in memory, so that the probabilities are equal too.
  const bool packed = p.joint_stride == 3 && p.coordinate_stride == 1 && p.coordinates == 3;
  if (planes_of(p) == 12) {
    return packed ? score_body<kVariant, 12, true>(p, b, body) : score_body<kVariant, 12, false>(p, b, body);
  }
  return packed ? score_body<kVariant, 0, true>(p, b, body) : score_body<kVariant, 0, false>(p, b, body);
}

/// Whether the score of a token compares two tokens that were seen; `valid` is the body's, or null.
inline bool known(const Problem& p, const bool* valid, int64_t token) {
  const int64_t later = token < p.joints ? token + p.joints : token;
  return valid == nullptr || (valid[later] && valid[later - p.joints]);
}

/// Scores that are not known become 0; what `score_body` found out about all scores is found out about the rest.
void forget_unknown(const Problem& p, const bool* __restrict valid, float* score, Extent& extent) {
  // On the bits, without branches: nobody can predict which tokens were seen.
  typedef int32_t Bits __attribute__((may_alias));
  Bits* __restrict bits = reinterpret_cast<Bits*>(score);
  for (int64_t i = p.joints; i < p.tokens; ++i) bits[i] &= -static_cast<int32_t>(valid[i] & valid[i - p.joints]);
  for (int64_t v = 0; v < p.joints; ++v) bits[v] = bits[p.joints + v];
  for (int64_t i = p.tokens; i < p.tokens + kLanes; ++i) bits[i] = 0;
  extent.largest = extent.sum = Vec{};
  for (int64_t i = 0; i < p.tokens; i += kLanes) {
    const Vec value = load(score + i);
    extent.largest = larger(extent.largest, value);
    extent.sum += value;
  }
}

/// The score in double precision; the first time step takes the second's.
double exact_score(const Problem& p, const float* body, int64_t token) {
  const int64_t step = token < p.joints ? 1 : token / p.joints;
  return motion_mask::exact_score(p, body, step, token % p.joints);
}

/// Moves the `wanted` smallest keys to the front, ties by token (`b.index` ascends at first); NaN counts as largest.
void select_exact(const Problem& p, const Buffers& b, const float* body, const bool* valid, const float* draws,
                  int64_t candidates, int64_t wanted, float least_of_largest) {
  double largest = 0;
  for (int64_t token = p.joints; token < p.tokens; ++token) {
    // Written so that NaN is looked at as well, and wins.
    if (b.score[token] < least_of_largest || !known(p, valid, token)) continue;
    const double score = exact_score(p, body, token);
    if (!(score <= largest)) largest = score;
    if (score != score) break;
  }
  const double scale = largest * p.tau + 1e-10;
  for (int64_t i = 0; i < candidates; ++i) {
    const int32_t token = b.index[i];
    const double z = (known(p, valid, token) ? exact_score(p, body, token) : 0.0) / scale;
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

typedef uint64_t Wide __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
constexpr int kWide = kLanes / 2;

/// Products of the low halves of each lane; the high halves do not matter.
inline Wide product(Wide a, uint32_t b) {
  const Wide factor = Wide{} + b;
#if JMM_LANES == 16
  return reinterpret_cast<Wide>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(factor)));
#elif JMM_LANES == 8
  return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(factor)));
#elif defined(__SSE2__)
  return reinterpret_cast<Wide>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(factor)));
#else
  return (a & 0xffffffffu) * factor;
#endif
}

/// Lanes of `a` and `b` in turn, from lane `first` on.
template <int kFirst>
inline Wide in_turn(Wide a, Wide b) {
#if defined(__clang__)
  Wide mixed;
  for (int l = 0; l < kWide; ++l) mixed[l] = l % 2 == 0 ? a[kFirst + l / 2] : b[kFirst + l / 2];
  return mixed;
#else
  Wide from{};
  for (int l = 0; l < kWide; ++l) from[l] = static_cast<uint64_t>(kFirst + l / 2 + l % 2 * kWide);
  return __builtin_shuffle(a, b, from);
#endif
}

/// Numbers of the stream, `kLanes * 2` at a time; fills `to` up to the next multiple of that.
void fill_uniform(const PhiloxStream& stream, int64_t tokens, float* to) {
  Wide lane{};
  for (int l = 0; l < kWide; ++l) lane[l] = static_cast<uint64_t>(l);
  for (int64_t i = 0; i < tokens; i += 4 * kWide) {
    // philox4x32 with each word in the low half of a lane: what products leave in the high halves is never looked at.
    Wide x0 = lane + static_cast<uint64_t>(i / 4), x1 = Wide{} + stream.word, x2 = Wide{} + stream.clip,
         x3 = Wide{} + stream.epoch;
    uint32_t k0 = stream.k0, k1 = stream.k1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Wide p0 = product(x0, kPhiloxM0), p1 = product(x2, kPhiloxM1);
      x0 = (p1 >> 32) ^ x1 ^ k0;
      x2 = (p0 >> 32) ^ x3 ^ k1;
      x1 = p1;
      x3 = p0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    const Wide first = (x0 & 0xffffffffu) | (x1 << 32), second = (x2 & 0xffffffffu) | (x3 << 32);
    const Wide halves[] = {in_turn<0>(first, second), in_turn<kWide / 2>(first, second)};
    for (int h = 0; h < 2; ++h) {
      const Words words = reinterpret_cast<Words>(halves[h]) >> 8;
      store(to + i + h * kLanes, __builtin_convertvector(reinterpret_cast<IntVec>(words), Vec) * (1.0f / 16777216.0f));
    }
  }
}

void fill_draws(const Problem& p, int64_t body, float* __restrict to) {
  if (p.uniform != nullptr) {
    const float* from = p.uniform + body * p.tokens;
    for (int64_t i = 0; i < p.tokens; ++i) to[i] = from[i];
    for (int64_t i = p.tokens; i < p.tokens + kLanes; ++i) to[i] = 0.5f;
    return;
  }
  fill_uniform(draws_of(p, body), p.tokens, to);
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

inline IntVec bits_at(const float* ratio, int64_t i) { return *reinterpret_cast<const IntVec*>(ratio + i); }

/// One bit for each lane that is -1.
inline uint32_t lane_bits(IntVec set) {
#if JMM_LANES == 16
  return static_cast<uint32_t>(_mm512_movepi32_mask(__builtin_bit_cast(__m512i, set)));
#elif JMM_LANES == 8
  return static_cast<uint32_t>(_mm256_movemask_ps(__builtin_bit_cast(__m256, set)));
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

/// Where the kept tokens end, when each ratio may be off by `slack` units in the last place either way. At least
/// `kept` ratios lie in [least, most].
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

void write(const Problem& p, const Result& result, const Buffers& b, int64_t body, int32_t bound, float total) {
  const int64_t tokens = p.tokens, kept = p.kept;
  float* __restrict probability = result.probability + body * tokens;
  const float share = 1.0f / total;
  for (int64_t i = 0; i < tokens; ++i) probability[i] = b.weight[i] * share;

  bool* __restrict mask = result.mask + body * tokens;
  const int32_t* __restrict bits = reinterpret_cast<const int32_t*>(b.ratio);
  for (int64_t i = 0; i < tokens; ++i) mask[i] = bits[i] >= bound;

  // Without branches: where the kept tokens are, nobody can predict. Each token is noted as the next kept one, and
  // stays noted if it is.
  int64_t* __restrict restore = result.restore + body * tokens;
  int32_t* __restrict noted = b.index;
  int64_t seen = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    noted[seen] = static_cast<int32_t>(i);
    const bool keep = bits[i] < bound;
    restore[i] = keep ? seen : kept + i - seen;
    seen += keep;
  }
  int64_t* __restrict visible = result.visible + body * kept;
  for (int64_t i = 0; i < kept; ++i) visible[i] = noted[i];
}

}  // namespace

int64_t scratch(const Problem& p) {
  return 7 * token_row(p) + (planes_of(p) + groups_of(p) * (2 * planes_of(p) + 1)) * kLanes;
}

bool draw(const Problem& p, const Result& result, float* memory, int64_t body) {
  const Buffers b = split(p, memory);
  const float* clip = p.clips + body * p.body_stride;
  fill_draws(p, body, b.draw);
  Extent extent = p.variant == kReleased ? score_body<kReleased>(p, b, clip)
                  : p.variant == kPaper  ? score_body<kPaper>(p, b, clip)
                                         : score_body<kMamp>(p, b, clip);
  const bool* valid = p.valid != nullptr ? p.valid + body * p.tokens : nullptr;
  if (valid != nullptr) forget_unknown(p, valid, b.score, extent);
  const float largest = max_lanes(extent.largest), norm = max_lanes(extent.norm), sum = sum_lanes(extent.sum);
  const float tau = static_cast<float>(p.tau), scale = largest * tau + 1e-10f;
  int32_t least = 0, most = 0;
  const float total = fill_ratios(b, p.tokens, largest, scale, least, most);
  int32_t* bits = reinterpret_cast<int32_t*>(b.ratio);
  constexpr int32_t lowest = -0x7fffffff - 1, highest = 0x7fffffff;
  if (valid != nullptr) {
    int64_t seen = 0;
    for (int64_t i = 0; i < p.tokens; ++i) seen += valid[i];
    for (int64_t i = 0; i < p.tokens; ++i) {
      bits[i] = (bits[i] & -static_cast<int32_t>(valid[i])) | ((static_cast<int32_t>(valid[i]) - 1) & highest);
    }
    if (seen <= p.kept) {
      int64_t spare = p.kept - seen;
      for (int64_t i = 0; i < p.tokens; ++i) {
        if (valid[i] || spare-- > 0) bits[i] = lowest;
      }
      write(p, result, b, body, 0, total);
      return false;
    }
  }

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
    int64_t seen = 0;
    for (int64_t i = 0; i < p.tokens; ++i) {
      if (valid == nullptr || valid[i]) b.index[seen++] = static_cast<int32_t>(i);
    }
    cut = {0, seen, p.kept};
  }
  if (cut.ambiguous > 0) {
    select_exact(p, b, clip, valid, b.draw, cut.ambiguous, cut.wanted, trusted ? largest - 2 * error : -1.0f);
    if (!trusted) {
      for (int64_t i = 0; i < p.tokens; ++i) bits[i] = highest;
      cut.bound = 0;
    }
    for (int64_t i = 0; i < cut.wanted; ++i) bits[b.index[i]] = lowest;
  }
  write(p, result, b, body, cut.bound, total);
  return cut.ambiguous > 0;
}

}  // namespace jmm_fast::motion_mask::JMM_ISA
