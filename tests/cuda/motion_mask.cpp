// The device code of the motion mask, compiled for the CPU: see host.h.

#include "host.h"

// After the words of CUDA.
#include "motion_mask/cuda_body.h"

using namespace jmm_fast::motion_mask;

/// Draws all bodies, threads in the given order. Returns 0; 1 if threads of a block parted; 2 if memory behind the
/// shared memory was written. `fixed`: the instance for tokens of 4 x 3 numbers.
extern "C" int draw(const Problem* p, const Result* result, int order, int fixed) {
  constexpr int kGuard = 4096;
  const int bytes = cuda::Memory::bytes(static_cast<int>(p->tokens));
  std::vector<double> memory((bytes + kGuard) / sizeof(double) + 1);
  auto* raw = reinterpret_cast<unsigned char*>(memory.data());
  for (int64_t body = 0; body < p->bodies; ++body) {
    // NaN, and integers that are nothing: whatever the block before left there.
    std::memset(raw, 0xff, bytes + kGuard);
    auto thread = [&] {
      fixed ? cuda::draw<4, 3>(*p, *result, memory.data(), body) : cuda::draw<0, 0>(*p, *result, memory.data(), body);
    };
    if (!host::run_block(cuda::kThreads, order, thread)) return 1;
    for (int i = bytes; i < bytes + kGuard; ++i) {
      if (raw[i] != 0xff) return 2;
    }
  }
  return 0;
}

extern "C" int most_tokens() { return cuda::kMostTokens; }
