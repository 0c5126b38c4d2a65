#include "host/scan_clips.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

namespace jmm_fast {

namespace {

// The bits of a float without its sign order as the absolute value does, and everything from here on is not finite.
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kMagnitude = 0x7fffffffu;

}  // namespace

ClipScan scan_clip(const float* frames, int64_t begin, int64_t end, int64_t width) {
  int64_t nonfinite = 0, zero_frames = 0;
  uint32_t largest = 0;
  for (int64_t row = begin; row < end; ++row) {
    const float* frame = frames + row * width;
    uint32_t any = 0, bad = 0;
    // Integer sums and maxima have no order to keep, so the compiler makes vectors of this loop without fast-math.
    for (int64_t i = 0; i < width; ++i) {
      uint32_t bits;
      std::memcpy(&bits, frame + i, sizeof bits);
      bits &= kMagnitude;
      const uint32_t infinite = bits >= kInfinity;
      any |= bits;
      bad += infinite;
      largest = std::max(largest, infinite ? 0u : bits);
    }
    nonfinite += bad;
    zero_frames += any == 0;
  }
  float max_abs;
  std::memcpy(&max_abs, &largest, sizeof max_abs);
  return {nonfinite, zero_frames, max_abs};
}

void scan_clips(const float* frames, const int64_t* offsets, int64_t count, int64_t width, unsigned threads,
                int64_t* nonfinite, int64_t* zero_frames, float* max_abs) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      const ClipScan scan = scan_clip(frames, offsets[i], offsets[i + 1], width);
      nonfinite[i] = scan.nonfinite;
      zero_frames[i] = scan.zero_frames;
      max_abs[i] = scan.max_abs;
    }
  };
  if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
  // A thread costs about as much as scanning a megabyte.
  const int64_t values = count > 0 ? (offsets[count] - offsets[0]) * width : 0;
  const int64_t useful = std::min<int64_t>({threads, count, 1 + values / (1 << 18)});
  std::vector<std::jthread> others;
  for (int64_t t = 1; t < useful; ++t) others.emplace_back(work);
  work();
}

}  // namespace jmm_fast
