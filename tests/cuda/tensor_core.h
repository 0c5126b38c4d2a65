#pragma once

// The instructions of csrc/tensor_core.h on the CPU, by threads of host.h. Sums are float32, products exact. What a
// lane hands over is read when it calls, as a warp does; what was copied arrives when it is waited for and not before.

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "host.h"

namespace jmm_fast::tensor_core {

namespace {

template <bool kBfloat16>
float widen(uint16_t half) {
  if constexpr (kBfloat16) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  } else {
    _Float16 value;
    std::memcpy(&value, &half, sizeof(value));
    return static_cast<float>(value);
  }
}

template <bool kBfloat16>
uint16_t narrow(float value) {
  uint16_t half;
  if constexpr (kBfloat16) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) return 0x7fff;
    half = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else {
    const _Float16 rounded = static_cast<_Float16>(value);
    std::memcpy(&half, &rounded, sizeof(half));
  }
  return half;
}

template <bool kBfloat16>
uint32_t pack(float low, float high) {
  return narrow<kBfloat16>(low) | static_cast<uint32_t>(narrow<kBfloat16>(high)) << 16;
}

template <bool kBfloat16>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const host::Words* lanes = host::show({{a[0], a[1], a[2], a[3], b0, b1}});
  const int lane = host::block.running % 32;
  auto half = [](uint32_t word, int k) { return widen<kBfloat16>(static_cast<uint16_t>(word >> 16 * (k % 2))); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int quarter = k % 8 / 2;
      const float left = half(lanes[4 * row + quarter].word[i / 2 + 2 * (k / 8)], k);
      const float right = half(lanes[4 * column + quarter].word[4 + k / 8], k);
      c[i] += left * right;
    }
  }
}

inline const host::Words* show_row(const uint16_t* row) {
  host::Words words{};
  std::memcpy(words.word, row, 16);
  return host::show(words);
}

inline void load_matrices(uint32_t (&to)[4], const uint16_t* row) {
  const host::Words* rows = show_row(row);
  const int lane = host::block.running % 32;
  for (int i = 0; i < 4; ++i) to[i] = rows[8 * i + lane / 4].word[lane % 4];
}

inline void load_transposed(uint32_t (&to)[4], const uint16_t* row) {
  const host::Words* rows = show_row(row);
  const int lane = host::block.running % 32, column = lane / 4;
  for (int i = 0; i < 4; ++i) {
    auto at = [&](int r) { return rows[8 * i + r].word[column / 2] >> 16 * (column % 2) & 0xffff; };
    to[i] = at(2 * (lane % 4)) | at(2 * (lane % 4) + 1) << 16;
  }
}

inline std::vector<std::pair<uint16_t*, const uint16_t*>> copies[host::kMostThreads];

inline void start_copy(uint16_t* to, const uint16_t* from, bool there) {
  copies[host::block.running].emplace_back(to, there ? from : nullptr);
}

inline void wait_for_copies() {
  auto& own = copies[host::block.running];
  for (auto [to, from] : own) from != nullptr ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
  own.clear();
}

/// Whether a thread ended without waiting for its copies; they are dropped.
inline bool forget_copies() {
  bool left = false;
  for (auto& own : copies) {
    left |= !own.empty();
    own.clear();
  }
  return left;
}

/// With the error that the instruction may have.
inline float power_of_two(float x) {
  const float value = std::exp2(x) * (1 + 0x1p-22f * static_cast<float>(host::block.running % 2));
  return value < 0x1p-126f ? 0 : value;
}

inline unsigned untold(unsigned x) { return x; }

}  // namespace

}  // namespace jmm_fast::tensor_core
