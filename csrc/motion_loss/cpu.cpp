// CPU implementation of jmm_fast::motion_loss_forward; its schema is defined in Python.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "isa.h"
#include "motion_loss/cpu_kernel.h"
#include "parallel.h"

namespace jmm_fast::motion_loss {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t scratch_size(Isa isa, const Problem& p){JMM_DISPATCH(isa, ::jmm_fast::motion_loss, scratch(p))} int64_t
    count_masked(Isa isa, const Problem& p,
                 int64_t body){JMM_DISPATCH(isa, ::jmm_fast::motion_loss, count_masked(p, body))} int64_t
    count_predicted(Isa isa, const Problem& p, int64_t body) {
  JMM_DISPATCH(isa, ::jmm_fast::motion_loss, count_predicted(p, body))
}
double body_loss(Isa isa, const Problem& p, float* scratch,
                 int64_t body){JMM_DISPATCH(isa, ::jmm_fast::motion_loss, body_loss(p, scratch, body))}

std::tuple<Tensor, Tensor> run_forward(const Tensor& prediction, const Tensor& clips, const Tensor& mask,
                                       int64_t t_patch, int64_t stride, bool normalize, bool differentiate,
                                       const std::optional<Tensor>& valid) {
  STD_TORCH_CHECK(clips.is_cpu() && clips.dim() == 4 && clips.scalar_type() == ScalarType::Float,
                  "clips must be a float32 CPU tensor [B,T,V,C]");
  const ScalarType dtype = prediction.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "prediction must be float32 or bfloat16");
  const int64_t bodies = clips.size(0), frames = clips.size(1), joints = clips.size(2), channels = clips.size(3);
  STD_TORCH_CHECK(t_patch >= 1 && frames % t_patch == 0, "the frames must be whole patches");
  STD_TORCH_CHECK(stride >= 1 && stride < frames, "stride must be in [1, frames)");
  const int64_t tokens = frames / t_patch * joints, numbers = t_patch * channels;
  STD_TORCH_CHECK(prediction.is_cpu() && prediction.dim() == 3 && prediction.size(0) == bodies &&
                      prediction.size(1) <= tokens && prediction.size(2) == numbers,
                  "prediction must be a CPU tensor [B,L,u*C] or [B,M,u*C]");
  STD_TORCH_CHECK(mask.is_cpu() && mask.dim() == 2 && mask.scalar_type() == ScalarType::Bool &&
                      mask.size(0) == bodies && mask.size(1) == tokens,
                  "mask must be a bool CPU tensor [B,L]");
  STD_TORCH_CHECK(
      !valid.has_value() || (valid->is_cpu() && valid->dim() == 2 && valid->scalar_type() == ScalarType::Bool &&
                             valid->size(0) == bodies && valid->size(1) == tokens),
      "valid must be a bool CPU tensor [B,L]");

  Problem p{};
  p.frames = frames, p.joints = joints, p.channels = channels, p.patch = t_patch, p.stride = stride;
  p.rows = prediction.size(1), p.masked_only = p.rows != tokens, p.normalize = normalize;
  p.bfloat16 = dtype == ScalarType::BFloat16;
  p.clips = static_cast<const float*>(clips.data_ptr());
  p.clip_body = clips.stride(0), p.clip_frame = clips.stride(1);
  p.clip_joint = clips.stride(2), p.clip_channel = clips.stride(3);
  p.mask = static_cast<const uint8_t*>(mask.data_ptr());
  p.mask_body = mask.stride(0), p.mask_token = mask.stride(1);
  if (valid.has_value()) {
    p.valid = static_cast<const uint8_t*>(valid->data_ptr());
    p.valid_body = valid->stride(0), p.valid_token = valid->stride(1);
  }
  p.prediction = prediction.data_ptr();
  p.prediction_body = prediction.stride(0), p.prediction_row = prediction.stride(1);
  p.prediction_number = prediction.stride(2);

  const Isa isa = active_isa();
  int64_t predicted = 0;
  for (int64_t body = 0; body < bodies; ++body) {
    const int64_t count = count_masked(isa, p, body);
    // More masked tokens than rows would read past the prediction. The public function looks too, but not while it is
    // compiled.
    STD_TORCH_CHECK(!p.masked_only || count == p.rows, "prediction has ", p.rows,
                    " rows, of the masked tokens alone, but a body has ", count, " masked tokens");
    predicted += valid.has_value() ? count_predicted(isa, p, body) : count;
  }
  p.scale =
      static_cast<float>(2.0 / (static_cast<double>(numbers) * static_cast<double>(std::max<int64_t>(predicted, 1))));

  const std::array<int64_t, 3> sizes{differentiate ? bodies : 0, p.rows, numbers};
  Tensor gradient = torch::stable::new_empty(prediction, {sizes.data(), sizes.size()});
  p.gradient = differentiate ? gradient.data_ptr() : nullptr;
  std::vector<double> sums(static_cast<size_t>(bodies));
  const int64_t scratch = scratch_size(isa, p);
  run_tasks(p.rows > 0 ? bodies : 0, [&](auto next) {
    float* memory = thread_scratch(scratch);
    for (int64_t body; (body = next()) < bodies;) sums[static_cast<size_t>(body)] = body_loss(isa, p, memory, body);
  });
  // In the order of the bodies, whichever thread summed them.
  double total = 0.0;
  for (double sum : sums) total += sum;
  Tensor loss = torch::stable::new_empty(prediction, {}, ScalarType::Float);
  *static_cast<float*>(loss.data_ptr()) =
      static_cast<float>(total / static_cast<double>(numbers) / static_cast<double>(std::max<int64_t>(predicted, 1)));
  return {loss, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jmm_fast, CPU, m) { m.impl("motion_loss_forward", TORCH_BOX(&run_forward)); }

}  // namespace jmm_fast::motion_loss
