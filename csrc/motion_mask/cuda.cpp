// CUDA implementation of jmm_fast::motion_mask_cuda; its schema is defined in Python.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "motion_mask/arguments.h"
#include "motion_mask/cuda_kernel.h"

namespace jmm_fast::motion_mask::cuda {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> run(const Tensor& clips, int64_t kept, double tau, int64_t patch,
                                               int64_t variant, double gate, std::optional<Tensor> uniform,
                                               int64_t seed, int64_t epoch, std::optional<Tensor> clip_ids,
                                               std::optional<Tensor> valid, std::optional<Tensor> epoch_at) {
  const Call call = make_call("CUDA", clips.is_cuda(), clips, kept, tau, patch, variant, gate, uniform, seed, epoch,
                              clip_ids, valid, epoch_at);
  const Problem& p = call.problem;
  STD_TORCH_CHECK(p.tokens <= most_tokens(), "clips must have at most ", most_tokens(), " tokens a body, got ",
                  p.tokens);
  STD_TORCH_CHECK(p.bodies < (int64_t{1} << 31), "too many bodies: ", p.bodies);
  if (p.bodies > 0) {
    const int32_t device = clips.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const char* error = launch(p, call.result, device, stream);
    STD_TORCH_CHECK(error == nullptr, "motion_mask on cuda:", device, ": ", error);
  }
  return {call.visible, call.mask, call.restore, call.probability};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jmm_fast, CUDA, m) { m.impl("motion_mask_cuda", TORCH_BOX(&run)); }

}  // namespace jmm_fast::motion_mask::cuda
