// CPU implementation of jmm_fast::motion_mask_cpu; its schema is defined in Python.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <atomic>
#include <optional>
#include <tuple>

#include "isa.h"
#include "motion_mask/cpu_kernel.h"
#include "parallel.h"

namespace jmm_fast::motion_mask {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t scratch(Isa isa, const Problem& p) { JMM_DISPATCH(isa, ::jmm_fast::motion_mask, scratch(p)) }

bool draw(Isa isa, const Problem& p, const Result& result, float* memory,
          int64_t body){JMM_DISPATCH(isa, ::jmm_fast::motion_mask, draw(p, result, memory, body))}

Tensor empty(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const std::array<int64_t, 2> sizes{rows, columns};
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
}

/// The fifth result counts the bodies whose set was settled in double precision.
std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t> run(const Tensor& clips, int64_t kept, double tau, int64_t patch,
                                                        int64_t variant, double gate, std::optional<Tensor> uniform,
                                                        int64_t seed, int64_t epoch, std::optional<Tensor> clip_ids,
                                                        std::optional<Tensor> valid) {
  STD_TORCH_CHECK(clips.is_cpu() && clips.dim() == 4 && clips.scalar_type() == ScalarType::Float,
                  "clips must be a float32 CPU tensor [B,T,V,C]");
  STD_TORCH_CHECK(patch >= 1 && clips.size(1) % patch == 0 && clips.size(1) >= 2 * patch,
                  "clips must have whole patches, two at least");
  STD_TORCH_CHECK(clips.size(2) >= 1 && clips.size(3) >= 1, "clips must have joints and coordinates");
  STD_TORCH_CHECK(variant >= kReleased && variant <= kMamp, "variant must be 0, 1 or 2, got ", variant);
  STD_TORCH_CHECK(tau > 0, "tau must be positive, got ", tau);
  Problem p{};
  p.clips = static_cast<const float*>(clips.const_data_ptr());
  p.body_stride = clips.stride(0), p.frame_stride = clips.stride(1);
  p.joint_stride = clips.stride(2), p.coordinate_stride = clips.stride(3);
  p.bodies = clips.size(0), p.steps = clips.size(1) / patch, p.joints = clips.size(2), p.coordinates = clips.size(3);
  p.patch = patch, p.tokens = p.steps * p.joints, p.kept = kept;
  p.variant = static_cast<Variant>(variant), p.tau = tau, p.gate = gate;
  p.seed = static_cast<uint64_t>(seed), p.epoch = static_cast<uint64_t>(epoch);
  STD_TORCH_CHECK(p.tokens < (int64_t{1} << 30), "too many tokens: ", p.tokens);
  STD_TORCH_CHECK(kept >= 1 && kept <= p.tokens, "kept must be in [1, ", p.tokens, "], got ", kept);
  if (uniform.has_value()) {
    STD_TORCH_CHECK(uniform->is_cpu() && uniform->dim() == 2 && uniform->scalar_type() == ScalarType::Float &&
                        uniform->size(0) == p.bodies && uniform->size(1) == p.tokens,
                    "uniform must be a float32 CPU tensor [B,L]");
    uniform = torch::stable::contiguous(*uniform);
    p.uniform = static_cast<const float*>(uniform->const_data_ptr());
  } else if (clip_ids.has_value()) {
    STD_TORCH_CHECK(clip_ids->is_cpu() && clip_ids->dim() == 1 && clip_ids->scalar_type() == ScalarType::Long &&
                        clip_ids->size(0) == p.bodies,
                    "clip_ids must be an int64 CPU tensor [B]");
    clip_ids = torch::stable::contiguous(*clip_ids);
    p.clip_ids = static_cast<const int64_t*>(clip_ids->const_data_ptr());
  }
  if (valid.has_value()) {
    STD_TORCH_CHECK(valid->is_cpu() && valid->dim() == 2 && valid->scalar_type() == ScalarType::Bool &&
                        valid->size(0) == p.bodies && valid->size(1) == p.tokens,
                    "valid must be a bool CPU tensor [B,L]");
    valid = torch::stable::contiguous(*valid);
    p.valid = static_cast<const bool*>(valid->const_data_ptr());
  }

  Tensor visible = empty(clips, p.bodies, kept, ScalarType::Long);
  Tensor mask = empty(clips, p.bodies, p.tokens, ScalarType::Bool);
  Tensor restore = empty(clips, p.bodies, p.tokens, ScalarType::Long);
  Tensor probability = empty(clips, p.bodies, p.tokens, ScalarType::Float);
  if (p.bodies == 0) return {visible, mask, restore, probability, 0};
  const Result result{static_cast<int64_t*>(visible.mutable_data_ptr()),
                      static_cast<int64_t*>(restore.mutable_data_ptr()), static_cast<bool*>(mask.mutable_data_ptr()),
                      static_cast<float*>(probability.mutable_data_ptr())};
  const Isa isa = active_isa();
  const int64_t memory = scratch(isa, p);
  std::atomic<int64_t> settled{0};
  run_tasks(p.bodies, [&](auto next) {
    float* own = thread_scratch(memory);
    for (int64_t body; (body = next()) < p.bodies;) {
      if (draw(isa, p, result, own, body)) settled.fetch_add(1, std::memory_order_relaxed);
    }
  });
  return {visible, mask, restore, probability, settled.load()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jmm_fast, CPU, m) { m.impl("motion_mask_cpu", TORCH_BOX(&run)); }

}  // namespace jmm_fast::motion_mask
