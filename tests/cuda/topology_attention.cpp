// The device code of topology attention, compiled for the CPU: see host.h.

#include "tensor_core.h"

// After the words of CUDA.
#include "topology_attention/cuda_body.h"

using namespace jmm_fast::topology_attention::cuda;
namespace tensor_core = jmm_fast::tensor_core;

namespace {

constexpr int kGuard = 4096;

/// Runs `work(memory, block)` for every block. Returns 0; 1 if threads of a block parted; 2 if memory behind the shared
/// memory was written; 3 if a copy was not waited for.
template <typename Work>
int run(int64_t blocks, int threads, int bytes, int order, Work work) {
  std::vector<Quad> memory((bytes + kGuard) / sizeof(Quad) + 1);
  auto* raw = reinterpret_cast<unsigned char*>(memory.data());
  for (int64_t block = 0; block < blocks; ++block) {
    // NaN, and integers that are nothing: whatever the block before left there.
    std::memset(raw, 0xff, bytes + kGuard);
    auto thread = [&] { work(raw, block); };
    const bool met = host::run_block(threads, order, thread), left = tensor_core::forget_copies();
    if (!met || left) return met ? 3 : 1;
    for (int i = bytes; i < bytes + kGuard; ++i) {
      if (raw[i] != 0xff) return 2;
    }
  }
  return 0;
}

template <bool kBfloat16, int kWidth>
int run(const Problem& p, const Forward& f, int order) {
  const int bytes = ForwardMemory::bytes(kWidth, p.tokens, p.joints), tiles = tiles_of(p.tokens);
  return run(p.bodies * p.heads, 32 * tiles, bytes, order, [&](unsigned char* memory, int64_t block) {
    tiles <= kFewTiles ? attend<kBfloat16, kWidth, kFewTiles>(p, f, memory, block)
                       : attend<kBfloat16, kWidth, kMostTiles>(p, f, memory, block);
  });
}

template <bool kBfloat16, int kWidth>
int run(const Problem& p, const Backward& g, int order) {
  const int bytes = BackwardMemory::bytes(kWidth, p.tokens, p.joints);
  return run(p.heads * g.parts, 32 * tiles_of(p.tokens), bytes, order, [&](unsigned char* memory, int64_t block) {
    const int head = static_cast<int>(block % p.heads), part = static_cast<int>(block / p.heads);
    p.joints <= 8 * kFewJointTiles ? differentiate<kBfloat16, kWidth, kFewJointTiles>(p, g, memory, head, part)
                                   : differentiate<kBfloat16, kWidth, kMostJointTiles>(p, g, memory, head, part);
  });
}

template <bool kBfloat16, typename Pass>
int choose(const Problem& p, const Pass& pass, int order) {
  return p.width == 16   ? run<kBfloat16, 16>(p, pass, order)
         : p.width == 32 ? run<kBfloat16, 32>(p, pass, order)
                         : run<kBfloat16, 64>(p, pass, order);
}

}  // namespace

extern "C" int forward(const Problem* p, const Forward* f, int order) {
  return p->bfloat16 ? choose<true>(*p, *f, order) : choose<false>(*p, *f, order);
}

extern "C" int backward(const Problem* p, const Backward* g, float* dtable, int order) {
  const int code = p->bfloat16 ? choose<true>(*p, *g, order) : choose<false>(*p, *g, order);
  const int entries = p->joints * p->joints, total = p->heads * entries;
  if (code != 0 || total == 0) return code;
  return run((total + 31) / 32, 32 * kSumWarps, 4 * 32 * kSumWarps, order, [&](unsigned char* memory, int64_t block) {
    add_parts(g->partial, g->parts, entries, total, dtable, reinterpret_cast<float*>(memory), static_cast<int>(block));
  });
}

extern "C" int forward_memory(int width, int tokens, int joints) { return ForwardMemory::bytes(width, tokens, joints); }
extern "C" int backward_memory(int width, int tokens, int joints) {
  return BackwardMemory::bytes(width, tokens, joints);
}
extern "C" int fitting(int memory, int width, int joints) { return fitting_tokens(memory, width, joints); }
extern "C" int most_tokens() { return kMostTokens; }
extern "C" int most_joints() { return kMostJoints; }
extern "C" int most_parts() { return kMostParts; }
