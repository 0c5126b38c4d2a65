#pragma once

#include <cstdint>

#include "device.h"

// Philox4x32-10 (Salmon et al., SC 2011) as plain integer code, for the host, for vectorising compilers and for CUDA.
// Internal linkage: files compiled for different instruction sets include this.

namespace jmm_fast {

namespace {

/// Kinds of draws: the low byte of the counter's second word, so that no two kinds share numbers.
enum class Purpose : uint32_t { kMask = 0, kCrop = 1, kRotation = 2, kOrder = 3, kDrop = 4 };

struct PhiloxWords {
  uint32_t x0, x1, x2, x3;
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u, kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

JMM_HOST_DEVICE constexpr PhiloxWords philox4x32(PhiloxWords x, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * x.x0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * x.x2;
    x = {static_cast<uint32_t>(p1 >> 32) ^ x.x1 ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ x.x3 ^ k1, static_cast<uint32_t>(p0)};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return x;
}

/// What a clip's draws of one kind are made from: all of the counter but its first word, and the key.
struct PhiloxStream {
  uint32_t word, clip, epoch, k0, k1;

  /// Numbers 4 * block to 4 * block + 3 of the stream.
  JMM_HOST_DEVICE constexpr PhiloxWords block(uint32_t index) const {
    return philox4x32({index, word, clip, epoch}, k0, k1);
  }
};

/// `clip_id`: index in the data set, plus the number of the body << 32, which joins the purpose.
JMM_HOST_DEVICE constexpr PhiloxStream philox_stream(uint64_t seed, Purpose purpose, uint64_t clip_id, uint64_t epoch) {
  return {static_cast<uint32_t>(purpose) + (static_cast<uint32_t>(clip_id >> 32) << 8), static_cast<uint32_t>(clip_id),
          static_cast<uint32_t>(epoch), static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
}

/// The 24 high bits over 2^24: in [0, 1), exact in float32.
JMM_HOST_DEVICE constexpr float philox_uniform(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 8)) * (1.0f / 16777216.0f);
}

// The first vector that the authors publish, so that a slip does not even compile.
static_assert(philox4x32({0, 0, 0, 0}, 0, 0).x0 == 0x6627E8D5u && philox4x32({0, 0, 0, 0}, 0, 0).x3 == 0x9B00DBD8u);

}  // namespace

}  // namespace jmm_fast
