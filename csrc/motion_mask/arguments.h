#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>

#include "motion_mask/problem.h"

// What the torch boundaries of all devices have in common: the operator's arguments checked, its results made.

namespace jmm_fast::motion_mask {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Call {
  Problem problem{};
  Result result{};
  Tensor visible, mask, restore, probability;
  std::optional<Tensor> uniform, clip_ids, valid, epoch_at;  ///< contiguous: `problem` points into them
};

Tensor empty(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const std::array<int64_t, 2> sizes{rows, columns};
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
}

/// Arguments of the schema in their order. `here`: whether `clips` lies on a `device`; all other tensors must lie with
/// it.
Call make_call(const char* device, bool here, const Tensor& clips, int64_t kept, double tau, int64_t patch,
               int64_t variant, double gate, std::optional<Tensor> uniform, int64_t seed, int64_t epoch,
               std::optional<Tensor> clip_ids, std::optional<Tensor> valid, std::optional<Tensor> epoch_at) {
  STD_TORCH_CHECK(here && clips.dim() == 4 && clips.scalar_type() == ScalarType::Float, "clips must be a float32 ",
                  device, " tensor [B,T,V,C]");
  STD_TORCH_CHECK(patch >= 1 && clips.size(1) % patch == 0 && clips.size(1) >= 2 * patch,
                  "clips must have whole patches, two at least");
  STD_TORCH_CHECK(clips.size(2) >= 1 && clips.size(3) >= 1, "clips must have joints and coordinates");
  STD_TORCH_CHECK(variant >= kReleased && variant <= kMamp, "variant must be 0, 1 or 2, got ", variant);
  STD_TORCH_CHECK(tau > 0, "tau must be positive, got ", tau);
  Call call;
  Problem& p = call.problem;
  p.clips = static_cast<const float*>(clips.const_data_ptr());
  p.body_stride = clips.stride(0), p.frame_stride = clips.stride(1);
  p.joint_stride = clips.stride(2), p.coordinate_stride = clips.stride(3);
  p.bodies = clips.size(0), p.steps = clips.size(1) / patch, p.joints = clips.size(2), p.coordinates = clips.size(3);
  p.patch = patch, p.tokens = p.steps * p.joints, p.kept = kept;
  p.variant = static_cast<Variant>(variant), p.tau = tau, p.gate = gate;
  p.seed = static_cast<uint64_t>(seed), p.epoch = static_cast<uint64_t>(epoch);
  STD_TORCH_CHECK(p.tokens < (int64_t{1} << 30), "too many tokens: ", p.tokens);
  STD_TORCH_CHECK(kept >= 1 && kept <= p.tokens, "kept must be in [1, ", p.tokens, "], got ", kept);
  auto fits = [&](const Tensor& x, ScalarType dtype, int64_t columns) {
    return x.device() == clips.device() && x.scalar_type() == dtype && x.dim() == (columns != 0 ? 2 : 1) &&
           x.size(0) == p.bodies && (columns == 0 || x.size(1) == columns);
  };
  if (uniform.has_value()) {
    STD_TORCH_CHECK(fits(*uniform, ScalarType::Float, p.tokens), "uniform must be a float32 ", device, " tensor [B,L]");
    call.uniform = torch::stable::contiguous(*uniform);
    p.uniform = static_cast<const float*>(call.uniform->const_data_ptr());
  } else if (clip_ids.has_value()) {
    STD_TORCH_CHECK(fits(*clip_ids, ScalarType::Long, 0), "clip_ids must be an int64 ", device, " tensor [B]");
    call.clip_ids = torch::stable::contiguous(*clip_ids);
    p.clip_ids = static_cast<const int64_t*>(call.clip_ids->const_data_ptr());
  }
  if (valid.has_value()) {
    STD_TORCH_CHECK(fits(*valid, ScalarType::Bool, p.tokens), "valid must be a bool ", device, " tensor [B,L]");
    call.valid = torch::stable::contiguous(*valid);
    p.valid = static_cast<const bool*>(call.valid->const_data_ptr());
  }
  if (epoch_at.has_value()) {
    STD_TORCH_CHECK(
        epoch_at->device() == clips.device() && epoch_at->scalar_type() == ScalarType::Long && epoch_at->dim() == 0,
        "epoch_at must be an int64 ", device, " tensor []");
    call.epoch_at = epoch_at;
    p.epoch_at = static_cast<const int64_t*>(epoch_at->const_data_ptr());
  }

  call.visible = empty(clips, p.bodies, kept, ScalarType::Long);
  call.mask = empty(clips, p.bodies, p.tokens, ScalarType::Bool);
  call.restore = empty(clips, p.bodies, p.tokens, ScalarType::Long);
  call.probability = empty(clips, p.bodies, p.tokens, ScalarType::Float);
  call.result = {
      static_cast<int64_t*>(call.visible.mutable_data_ptr()), static_cast<int64_t*>(call.restore.mutable_data_ptr()),
      static_cast<bool*>(call.mask.mutable_data_ptr()), static_cast<float*>(call.probability.mutable_data_ptr())};
  return call;
}

}  // namespace

}  // namespace jmm_fast::motion_mask
