#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace jmm_fast {

/// Scratch of the calling thread: at least `floats` floats, 64-byte aligned, contents undefined. It is kept for the
/// next call, because mapping and clearing fresh pages would cost more than small problems take.
inline float* thread_scratch(int64_t floats) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    memory.reset();
    size = 0;
    const auto bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (memory == nullptr) throw std::bad_alloc();
    size = floats;
  }
  return memory.get();
}

/// Runs `work(next)` on torch's threads; each call takes tasks with `next()` until it returns `count` or more. Tasks go
/// to whoever is free, so results must not depend on which thread runs a task: each writes its own part of the output.
template <typename Work>
void run_tasks(int64_t count, const Work& work) {
  std::atomic<int64_t> taken{0};
  const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(
      0, workers, 1, [&](int64_t, int64_t) { work([&] { return taken.fetch_add(1, std::memory_order_relaxed); }); });
}

}  // namespace jmm_fast
