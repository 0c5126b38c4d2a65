// Launch of topology attention for few tokens: forward a block for each body and head, backward one for each head and
// part of the bodies.

#include "tensor_core.h"

// After the words of the matrix units.
#include "topology_attention/cuda_body.h"
#include "topology_attention/cuda_kernel.h"

namespace jmm_fast::topology_attention::cuda {

namespace {

// How many blocks a multiprocessor holds at least: told nothing, the compiler sometimes keeps so few registers that it
// spills, or takes so many that fewer blocks fit than shared memory has room for.
constexpr int attend_blocks(int width, int tiles) { return tiles > kFewTiles ? 2 : width < 64 ? 4 : 3; }
constexpr int differentiate_blocks(int width, int joint_tiles) {
  return width < 64 && joint_tiles <= kFewJointTiles ? 2 : 1;
}

template <bool kBfloat16, int kWidth, int kTiles>
__global__ void __launch_bounds__(32 * kTiles, attend_blocks(kWidth, kTiles)) attend_bodies(Problem p, Forward f) {
  extern __shared__ __align__(16) unsigned char memory[];
  attend<kBfloat16, kWidth, kTiles>(p, f, memory, blockIdx.x);
}

template <bool kBfloat16, int kWidth, int kJointTiles>
__global__ void __launch_bounds__(32 * kMostTiles, differentiate_blocks(kWidth, kJointTiles))
    differentiate_bodies(Problem p, Backward g) {
  extern __shared__ __align__(16) unsigned char memory[];
  // Heads of a body lie side by side in memory.
  differentiate<kBfloat16, kWidth, kJointTiles>(p, g, memory, static_cast<int>(blockIdx.x) % p.heads,
                                                static_cast<int>(blockIdx.x) / p.heads);
}

__global__ void __launch_bounds__(32 * kSumWarps)
    add_partial_tables(const float* partial, int parts, int entries, int total, float* to) {
  __shared__ float sums[32 * kSumWarps];
  add_parts(partial, parts, entries, total, to, sums, static_cast<int>(blockIdx.x));
}

template <typename Kernel, typename Arguments>
cudaError_t start(Kernel kernel, int64_t blocks, int bytes, void* stream, const Problem& p,
                  const Arguments& arguments) {
  cudaError_t error = cudaSuccess;
  if (bytes > 48 << 10) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), 32 * tiles_of(p.tokens), bytes, static_cast<cudaStream_t>(stream)>>>(
      p, arguments);
  return cudaGetLastError();
}

template <bool kBfloat16, int kWidth>
cudaError_t start(const Problem& p, const Forward& f, void* stream) {
  const int64_t blocks = p.bodies * p.heads;
  const int bytes = ForwardMemory::bytes(kWidth, p.tokens, p.joints);
  return tiles_of(p.tokens) <= kFewTiles
             ? start(attend_bodies<kBfloat16, kWidth, kFewTiles>, blocks, bytes, stream, p, f)
             : start(attend_bodies<kBfloat16, kWidth, kMostTiles>, blocks, bytes, stream, p, f);
}

template <bool kBfloat16, int kWidth>
cudaError_t start(const Problem& p, const Backward& g, void* stream) {
  const int64_t blocks = static_cast<int64_t>(p.heads) * g.parts;
  const int bytes = BackwardMemory::bytes(kWidth, p.tokens, p.joints);
  return p.joints <= 8 * kFewJointTiles
             ? start(differentiate_bodies<kBfloat16, kWidth, kFewJointTiles>, blocks, bytes, stream, p, g)
             : start(differentiate_bodies<kBfloat16, kWidth, kMostJointTiles>, blocks, bytes, stream, p, g);
}

template <bool kBfloat16, typename Pass>
cudaError_t choose_width(const Problem& p, const Pass& pass, void* stream) {
  switch (p.width) {
    case 16:
      return start<kBfloat16, 16>(p, pass, stream);
    case 32:
      return start<kBfloat16, 32>(p, pass, stream);
    default:
      return start<kBfloat16, 64>(p, pass, stream);
  }
}

template <typename Pass>
cudaError_t run(const Problem& p, const Pass& pass, int device, void* stream) {
  // This module has a CUDA runtime of its own, which knows nothing of the device that torch's has chosen.
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  return p.bfloat16 ? choose_width<true>(p, pass, stream) : choose_width<false>(p, pass, stream);
}

const char* words_for(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

int most_tokens(int memory, int width, int joints) { return fitting_tokens(memory, width, joints); }

const char* launch(const Problem& p, const Forward& f, int device, void* stream) {
  return words_for(run(p, f, device, stream));
}

const char* launch(const Problem& p, const Backward& g, float* dtable, int device, void* stream) {
  cudaError_t error = run(p, g, device, stream);
  const int entries = p.joints * p.joints, total = p.heads * entries;
  if (error == cudaSuccess && total > 0) {
    add_partial_tables<<<(total + 31) / 32, 32 * kSumWarps, 0, static_cast<cudaStream_t>(stream)>>>(
        g.partial, g.parts, entries, total, dtable);
    error = cudaGetLastError();
  }
  return words_for(error);
}

}  // namespace jmm_fast::topology_attention::cuda
