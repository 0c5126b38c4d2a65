// Launch of the joint motion mask: a block for each body.

#include "motion_mask/cuda_body.h"
#include "motion_mask/cuda_kernel.h"

namespace jmm_fast::motion_mask::cuda {

namespace {

// Two blocks a multiprocessor: told nothing, the compiler keeps so few registers that it spills; three would make it
// spill.
template <int kPatch, int kCoordinates>
__global__ void __launch_bounds__(kThreads, 2) draw_masks(Problem p, Result result) {
  extern __shared__ double memory[];
  draw<kPatch, kCoordinates>(p, result, memory, blockIdx.x);
}

const char* words_for(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

int64_t most_tokens() { return kMostTokens; }

const char* launch(const Problem& p, const Result& result, int device, void* stream) {
  const auto kernel =
      p.patch == 4 && p.coordinates == 3 && p.coordinate_stride == 1 ? draw_masks<4, 3> : draw_masks<0, 0>;
  const int bytes = Memory::bytes(static_cast<int>(p.tokens));
  // This module has a CUDA runtime of its own, which knows nothing of the device that torch's has chosen.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess && bytes > 48 << 10) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (error != cudaSuccess) return words_for(error);
  kernel<<<static_cast<unsigned>(p.bodies), kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(p, result);
  return words_for(cudaGetLastError());
}

const char* load_error() {
  cudaFuncAttributes attributes;
  return words_for(cudaFuncGetAttributes(&attributes, draw_masks<4, 3>));
}

}  // namespace jmm_fast::motion_mask::cuda
