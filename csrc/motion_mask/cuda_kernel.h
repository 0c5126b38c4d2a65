#pragma once

#include "motion_mask/problem.h"

// What the torch boundary needs of the device code; it is compiled without CUDA's headers.

namespace jmm_fast::motion_mask::cuda {

/// The most tokens of a body that `launch` takes.
int64_t most_tokens();

/// Draws the masks on `stream`, a cudaStream_t of GPU number `device`, which becomes the current one. Null, or CUDA's
/// words for what went wrong.
const char* launch(const Problem&, const Result&, int device, void* stream);

/// Null when the kernel can be loaded on the current device, else CUDA's words for why not.
const char* load_error();

}  // namespace jmm_fast::motion_mask::cuda
