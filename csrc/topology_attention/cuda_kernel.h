#pragma once

#include "topology_attention/cuda_problem.h"

// What the torch boundary needs of the device code; it is compiled without CUDA's headers.

namespace jmm_fast::topology_attention::cuda {

/// The most tokens of which a block of either pass takes no more than `memory` bytes of shared memory; 0 if even one
/// takes more. `width`: 16, 32 or 64; `joints`: 0 when plain.
int most_tokens(int memory, int width, int joints);

/// Both work on `stream`, a cudaStream_t of GPU number `device`, which becomes the current one. Null, or CUDA's words
/// for what went wrong.
const char* launch(const Problem&, const Forward&, int device, void* stream);
/// `dtable` [H,V,V]: the partial tables added up; not touched when plain.
const char* launch(const Problem&, const Backward&, float* dtable, int device, void* stream);

}  // namespace jmm_fast::topology_attention::cuda
