// CUDA implementations of jmm_fast::topology_attention_cuda_{forward,backward}; their schemas are defined in Python.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "topology_attention/cuda_kernel.h"

namespace jmm_fast::topology_attention::cuda {

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

View view(const Tensor& x) {
  View v{x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), false};
  v.wide = v.channel == 1 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.body % 8 == 0 && v.head % 8 == 0 &&
           v.token % 8 == 0;
  return v;
}

void check_like(const char* name, const Tensor& x, const Tensor& q) {
  STD_TORCH_CHECK(x.device() == q.device() && x.dim() == 4 && x.scalar_type() == q.scalar_type(), name,
                  " must be a tensor [B,H,N,D] of q's dtype on q's GPU");
  for (int64_t i = 0; i < 4; ++i) STD_TORCH_CHECK(x.size(i) == q.size(i), name, " must have q's shape");
}

/// Keeps what a Problem points to.
struct Inputs {
  Problem problem;
  std::optional<Tensor> table, joints;
};

Inputs check(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& table,
             const std::optional<Tensor>& joints, bool multiply, double scale) {
  STD_TORCH_CHECK(q.is_cuda() && q.dim() == 4, "q must be a CUDA tensor [B,H,N,D]");
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "q must be bfloat16 or float16");
  check_like("k", k, q);
  check_like("v", v, q);
  STD_TORCH_CHECK(q.size(3) == 16 || q.size(3) == 32 || q.size(3) == 64, "the head width must be 16, 32 or 64, got ",
                  q.size(3));
  STD_TORCH_CHECK(q.size(2) <= kMostTokens, "there must be at most ", kMostTokens, " tokens, got ", q.size(2));
  STD_TORCH_CHECK(q.size(0) * q.size(1) < (int64_t{1} << 31), "too many bodies and heads: ", q.size(0) * q.size(1));
  Inputs inputs{{}, table, joints};
  Problem& p = inputs.problem;
  p.bodies = q.size(0), p.heads = static_cast<int>(q.size(1)), p.tokens = static_cast<int>(q.size(2));
  p.width = static_cast<int>(q.size(3));
  p.q = view(q), p.k = view(k), p.v = view(v);
  p.scale = static_cast<float>(scale), p.bfloat16 = dtype == ScalarType::BFloat16;
  if (!table.has_value()) return inputs;

  STD_TORCH_CHECK(table->device() == q.device() && table->dim() == 3 && table->scalar_type() == ScalarType::Float &&
                      table->size(0) == p.heads && table->size(1) == table->size(2),
                  "table must be a float32 tensor [H,V,V] on q's GPU");
  STD_TORCH_CHECK(table->size(1) >= 1 && table->size(1) <= kMostJoints, "the table must have 1 to ", kMostJoints,
                  " joints, got ", table->size(1));
  STD_TORCH_CHECK(joints.has_value(), "a table needs joints");
  STD_TORCH_CHECK(joints->device() == q.device() && joints->scalar_type() == ScalarType::Long &&
                      (joints->dim() == 1 || (joints->dim() == 2 && joints->size(0) == p.bodies)) &&
                      joints->size(joints->dim() - 1) == p.tokens,
                  "joints must be an int64 tensor [N] or [B,N] on q's GPU");
  inputs.table = torch::stable::contiguous(*table);
  p.mode = multiply ? kScale : kAdd;
  p.joints = static_cast<int>(table->size(1));
  p.table = static_cast<const float*>(inputs.table->const_data_ptr());
  p.joint = static_cast<const int64_t*>(joints->const_data_ptr());
  p.joint_body = joints->dim() == 2 ? joints->stride(0) : 0;
  p.joint_token = joints->stride(joints->dim() - 1);
  return inputs;
}

template <typename... Arguments>
void run(const Tensor& q, const Problem& p, Arguments... arguments) {
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = launch(p, arguments..., device, stream);
  STD_TORCH_CHECK(error == nullptr, "topology_attention on cuda:", device, ": ", error);
}

std::tuple<Tensor, Tensor> run_forward(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> table,
                                       std::optional<Tensor> joints, bool multiply, double scale) {
  const Inputs inputs = check(q, k, v, table, joints, multiply, scale);
  const Problem& p = inputs.problem;
  Tensor out = token_major(q), statistics = empty(q, {2, p.bodies, p.heads, p.tokens}, ScalarType::Float);
  const int64_t rows = p.bodies * p.heads * p.tokens;
  if (rows > 0) {
    float* most = static_cast<float*>(statistics.mutable_data_ptr());
    run(q, p, Forward{view(out), most, most + rows});
  }
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                        const Tensor& v, std::optional<Tensor> table,
                                                        std::optional<Tensor> joints, const Tensor& out,
                                                        const Tensor& statistics_in, bool multiply, double scale) {
  const Inputs inputs = check(q, k, v, table, joints, multiply, scale);
  const Problem& p = inputs.problem;
  check_like("grad_out", grad_out, q);
  check_like("out", out, q);
  STD_TORCH_CHECK(statistics_in.device() == q.device() && statistics_in.dim() == 4 &&
                      statistics_in.scalar_type() == ScalarType::Float && statistics_in.size(0) == 2 &&
                      statistics_in.size(1) == p.bodies && statistics_in.size(2) == p.heads &&
                      statistics_in.size(3) == p.tokens,
                  "statistics must be a float32 tensor [2,B,H,N] on q's GPU");
  const Tensor statistics = torch::stable::contiguous(statistics_in);
  Tensor dq = token_major(q), dk = token_major(q), dv = token_major(q);
  Tensor dtable = p.table != nullptr ? empty(q, {p.heads, p.joints, p.joints}, ScalarType::Float)
                                     : empty(q, {0}, ScalarType::Float);
  const int64_t rows = p.bodies * p.heads * p.tokens;
  if (rows == 0) {
    torch::stable::zero_(dtable);
    return {dq, dk, dv, dtable};
  }
  const int64_t parts = std::min<int64_t>(p.bodies, kMostParts);
  const Tensor partial = empty(q, {p.heads, parts, p.joints, p.joints}, ScalarType::Float);
  const float* most = static_cast<const float*>(statistics.const_data_ptr());
  run(q, p,
      Backward{view(grad_out), view(out), view(dq), view(dk), view(dv), most, most + rows,
               static_cast<float*>(partial.mutable_data_ptr()), static_cast<int>(parts)},
      static_cast<float*>(dtable.mutable_data_ptr()));
  return {dq, dk, dv, dtable};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jmm_fast, CUDA, m) {
  m.impl("topology_attention_cuda_forward", TORCH_BOX(&run_forward));
  m.impl("topology_attention_cuda_backward", TORCH_BOX(&run_backward));
}

}  // namespace jmm_fast::topology_attention::cuda
