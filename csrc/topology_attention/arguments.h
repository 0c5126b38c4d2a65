#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>

// What the torch boundaries of all devices have in common: the operators' arguments checked, room for results. What a
// kernel takes of dtypes and sizes, its boundary says.

namespace jmm_fast::topology_attention {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

/// Empty `[B,H,N,D]` with memory order B,N,H,D: joining the heads again is then a view.
Tensor token_major(const Tensor& like) {
  const Tensor joined = empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)}, like.scalar_type());
  return torch::stable::transpose(joined, 1, 2);
}

/// Room for the table's gradient; of nothing without a table.
Tensor table_like(const Tensor& q, const std::optional<Tensor>& table) {
  if (!table.has_value()) return empty(q, {0}, ScalarType::Float);
  return empty(q, {table->size(0), table->size(1), table->size(2)}, ScalarType::Float);
}

void check_like(const char* device, const char* name, const Tensor& x, const Tensor& q) {
  STD_TORCH_CHECK(x.device() == q.device() && x.dim() == 4 && x.scalar_type() == q.scalar_type(), name, " must be a ",
                  device, " tensor [B,H,N,D] of q's dtype on q's device");
  for (int64_t i = 0; i < 4; ++i) STD_TORCH_CHECK(x.size(i) == q.size(i), name, " must have q's shape");
}

/// The statistics that a backward pass gets, contiguous.
Tensor check_statistics(const char* device, const Tensor& x, const Tensor& q) {
  STD_TORCH_CHECK(x.device() == q.device() && x.dim() == 4 && x.scalar_type() == ScalarType::Float && x.size(0) == 2 &&
                      x.size(1) == q.size(0) && x.size(2) == q.size(1) && x.size(3) == q.size(2),
                  "statistics must be a float32 ", device, " tensor [2,B,H,N] on q's device");
  return torch::stable::contiguous(x);
}

/// A device's problem and what it points to beside the arguments.
template <typename Problem>
struct Inputs {
  Problem problem{};
  std::optional<Tensor> table;  ///< contiguous
};

template <typename To>
void set(To& to, int64_t size) {
  to = static_cast<To>(size);
}

/// The arguments of either pass that all devices have, checked: sizes, table and joints of the problem. `here`: whether
/// `q` lies on a `device`; all other tensors must lie with it.
template <typename Problem>
Inputs<Problem> make_inputs(const char* device, bool here, const Tensor& q, const Tensor& k, const Tensor& v,
                            const std::optional<Tensor>& table, const std::optional<Tensor>& joints, double scale) {
  STD_TORCH_CHECK(here && q.dim() == 4, "q must be a ", device, " tensor [B,H,N,D]");
  check_like(device, "k", k, q);
  check_like(device, "v", v, q);
  Inputs<Problem> inputs;
  Problem& p = inputs.problem;
  set(p.bodies, q.size(0)), set(p.heads, q.size(1)), set(p.tokens, q.size(2)), set(p.width, q.size(3));
  p.bfloat16 = q.scalar_type() == ScalarType::BFloat16;
  p.scale = static_cast<float>(scale);
  if (!table.has_value()) return inputs;

  STD_TORCH_CHECK(table->device() == q.device() && table->dim() == 3 && table->scalar_type() == ScalarType::Float &&
                      table->size(0) == q.size(1) && table->size(1) == table->size(2),
                  "table must be a float32 ", device, " tensor [H,V,V] on q's device");
  STD_TORCH_CHECK(joints.has_value(), "a table needs joints");
  STD_TORCH_CHECK(joints->device() == q.device() && joints->scalar_type() == ScalarType::Long &&
                      (joints->dim() == 1 || (joints->dim() == 2 && joints->size(0) == q.size(0))) &&
                      joints->size(joints->dim() - 1) == q.size(2),
                  "joints must be an int64 ", device, " tensor [N] or [B,N] on q's device");
  inputs.table = torch::stable::contiguous(*table);
  set(p.joints, table->size(1));
  p.table = static_cast<const float*>(inputs.table->const_data_ptr());
  p.joint = static_cast<const int64_t*>(joints->const_data_ptr());
  p.joint_body = joints->dim() == 2 ? joints->stride(0) : 0;
  p.joint_token = joints->stride(joints->dim() - 1);
  return inputs;
}

}  // namespace

}  // namespace jmm_fast::topology_attention
