#pragma once

// What device code asks of CUDA, on the CPU: threads are fibers, in an order that the test chooses. A warp runs from
// shuffle to shuffle until all of it waits for the block; then the next warp runs. Whoever depends on the order has a
// race.

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <vector>

#define __device__

namespace host {

/// What a thread waits for.
enum Barrier : int { kEnd, kBlock, kShuffle };

constexpr int kMostThreads = 1024, kStack = 64 << 10;

/// What a lane shows the others of its warp.
struct Words {
  uint32_t word[8];
};

struct Block {
  int running = 0;
  ucontext_t scheduler;
  std::vector<ucontext_t> fibers = std::vector<ucontext_t>(kMostThreads);
  std::vector<char> stacks = std::vector<char>(static_cast<size_t>(kMostThreads) * kStack);
  std::vector<int> waiting = std::vector<int>(kMostThreads);  ///< a Barrier
  std::vector<int> turn = std::vector<int>(kMostThreads);     ///< shuffles so far
  uint64_t slots[2][kMostThreads];                            ///< of the shuffles, two sets in turn
  Words shown[2][kMostThreads];                               ///< the same of larger things
};

inline Block block;
inline void (*work)(void*) = nullptr;
inline void* argument = nullptr;

inline void wait(int kind) {
  block.waiting[block.running] = kind;
  swapcontext(&block.fibers[block.running], &block.scheduler);
}

inline void fiber() {
  work(argument);
  block.waiting[block.running] = kEnd;
}

template <typename T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t* slots = block.slots[block.turn[block.running]++ % 2];
  std::memcpy(&slots[block.running], &value, sizeof(T));
  wait(kShuffle);
  std::memcpy(&value, &slots[from], sizeof(T));
  return value;
}

/// Shows `words` to the warp, waits for what the other lanes show, and returns that of the first lane.
inline const Words* show(const Words& words) {
  Words* shown = block.shown[block.turn[block.running]++ % 2];
  shown[block.running] = words;
  wait(kShuffle);
  return shown + block.running / 32 * 32;
}

}  // namespace host

struct ThreadIndex {
  struct X {
    operator unsigned() const { return static_cast<unsigned>(host::block.running); }
  } x;
} inline constexpr threadIdx{};

inline void __syncthreads() { host::wait(host::kBlock); }

inline void __syncwarp() {
  ++host::block.turn[host::block.running];
  host::wait(host::kShuffle);
}

// A shuffle of all lanes; blocks of whole warps only.
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host::exchange(value, host::block.running ^ mask);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = host::block.running % 32;
  return host::exchange(value, host::block.running - (lane >= distance ? distance : 0));
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  const host::Words* lanes = host::show({{predicate}});
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= lanes[lane].word[0] << lane;
  return bits;
}

inline int __ffs(int x) { return __builtin_ffs(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

template <typename T>
T atomicOr(T* at, T value) {
  const T before = *at;
  *at |= value;
  return before;
}

namespace host {

[[gnu::noinline]] inline void resume(int thread) {
  block.running = thread;
  swapcontext(&block.scheduler, &block.fibers[thread]);
}

/// The `i`-th of `count` in an order: upwards (0), downwards (1) or mixed up (numbers from 3 on that have no divisor
/// in common with it).
inline int pick(int i, int count, int order) { return order == 0 ? i : order == 1 ? count - 1 - i : i * order % count; }

/// Runs a warp up to the next barrier of its block. Returns that barrier, or -1 if its threads parted.
inline int run_warp(int warp, int order) {
  int kind = kShuffle;
  while (kind == kShuffle) {
    for (int i = 0; i < 32; ++i) resume(32 * warp + pick(i, 32, order));
    kind = block.waiting[32 * warp];
    for (int i = 1; i < 32; ++i) {
      if (block.waiting[32 * warp + i] != kind) return -1;
    }
  }
  return kind;
}

/// Runs `body` as a block of `threads`, warps and threads in the given order. Returns whether all met at the same
/// barriers.
template <typename Body>
bool run_block(int threads, int order, Body& body) {
  work = [](void* it) { (*static_cast<Body*>(it))(); };
  argument = &body;
  for (int i = 0; i < threads; ++i) {
    getcontext(&block.fibers[i]);
    block.fibers[i].uc_stack.ss_sp = block.stacks.data() + static_cast<size_t>(i) * kStack;
    block.fibers[i].uc_stack.ss_size = kStack;
    block.fibers[i].uc_link = &block.scheduler;
    block.turn[i] = 0;
    makecontext(&block.fibers[i], fiber, 0);
  }
  for (int kind = kBlock; kind != kEnd;) {
    const int warps = threads / 32;
    for (int i = 0; i < warps; ++i) {
      const int met = run_warp(pick(i, warps, order), order);
      if (met < 0 || (i > 0 && met != kind)) return false;
      kind = met;
    }
  }
  return true;
}

}  // namespace host
