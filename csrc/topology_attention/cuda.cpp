// CUDA implementations of jmm_fast::topology_attention_cuda_{forward,backward}; their schemas are defined in Python.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "topology_attention/arguments.h"
#include "topology_attention/cuda_kernel.h"

namespace jmm_fast::topology_attention::cuda {

namespace {

constexpr const char* kDevice = "CUDA";

View view(const Tensor& x) {
  View v{x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), false};
  v.wide = v.channel == 1 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.body % 8 == 0 && v.head % 8 == 0 &&
           v.token % 8 == 0;
  return v;
}

Inputs<Problem> check(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& table,
                      const std::optional<Tensor>& joints, bool multiply, double scale) {
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "q must be bfloat16 or float16");
  Inputs<Problem> inputs = make_inputs<Problem>(kDevice, q.is_cuda(), q, k, v, table, joints, scale);
  Problem& p = inputs.problem;
  STD_TORCH_CHECK(q.size(3) == 16 || q.size(3) == 32 || q.size(3) == 64, "the head width must be 16, 32 or 64, got ",
                  q.size(3));
  STD_TORCH_CHECK(q.size(2) <= kMostTokens, "there must be at most ", kMostTokens, " tokens, got ", q.size(2));
  STD_TORCH_CHECK(q.size(0) * q.size(1) < (int64_t{1} << 31), "too many bodies and heads: ", q.size(0) * q.size(1));
  p.q = view(q), p.k = view(k), p.v = view(v);
  if (p.table == nullptr) return inputs;
  STD_TORCH_CHECK(table->size(1) >= 1 && table->size(1) <= kMostJoints, "the table must have 1 to ", kMostJoints,
                  " joints, got ", table->size(1));
  p.mode = multiply ? kScale : kAdd;
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
  const Inputs<Problem> inputs = check(q, k, v, table, joints, multiply, scale);
  const Problem& p = inputs.problem;
  Tensor out = token_major(q), statistics = empty(q, {2, p.bodies, p.heads, p.tokens}, ScalarType::Float);
  const int64_t rows = p.bodies * p.heads * p.tokens;
  if (rows > 0) {
    float* most = static_cast<float*>(statistics.mutable_data_ptr());
    run(q, p, Forward{view(out), most, most + rows});
  }
  return {out, statistics};
}

/// Fills `dq`, `dk` and `dv`, views of anything that a single instruction may write eight channels of; gives the
/// table's gradient.
Tensor run_backward_into(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                         std::optional<Tensor> table, std::optional<Tensor> joints, const Tensor& out,
                         const Tensor& statistics_in, bool multiply, double scale, Tensor dq, Tensor dk, Tensor dv) {
  const Inputs<Problem> inputs = check(q, k, v, table, joints, multiply, scale);
  const Problem& p = inputs.problem;
  check_like(kDevice, "grad_out", grad_out, q);
  check_like(kDevice, "out", out, q);
  check_like(kDevice, "dq", dq, q);
  check_like(kDevice, "dk", dk, q);
  check_like(kDevice, "dv", dv, q);
  const Tensor statistics = check_statistics(kDevice, statistics_in, q);
  Tensor dtable = table_like(q, table);
  const int64_t rows = p.bodies * p.heads * p.tokens;
  if (rows == 0) {
    torch::stable::zero_(dtable);
    return dtable;
  }
  const int64_t parts = std::min<int64_t>(p.bodies, kMostParts);
  const Tensor partial = empty(q, {p.heads, parts, p.joints, p.joints}, ScalarType::Float);
  const float* most = static_cast<const float*>(statistics.const_data_ptr());
  const Backward g{view(grad_out),
                   view(out),
                   view(dq),
                   view(dk),
                   view(dv),
                   most,
                   most + rows,
                   static_cast<float*>(partial.mutable_data_ptr()),
                   static_cast<int>(parts)};
  STD_TORCH_CHECK(g.dq.wide && g.dk.wide && g.dv.wide, "dq, dk and dv must have rows of 16 bytes that lie together");
  run(q, p, g, static_cast<float*>(dtable.mutable_data_ptr()));
  return dtable;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                        const Tensor& v, std::optional<Tensor> table,
                                                        std::optional<Tensor> joints, const Tensor& out,
                                                        const Tensor& statistics, bool multiply, double scale) {
  STD_TORCH_CHECK(q.dim() == 4, "q must be [B,H,N,D]");
  Tensor dq = token_major(q), dk = token_major(q), dv = token_major(q);
  const Tensor dtable =
      run_backward_into(grad_out, q, k, v, table, joints, out, statistics, multiply, scale, dq, dk, dv);
  return {dq, dk, dv, dtable};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jmm_fast, CUDA, m) {
  m.impl("topology_attention_cuda_forward", TORCH_BOX(&run_forward));
  m.impl("topology_attention_cuda_backward", TORCH_BOX(&run_backward));
  m.impl("topology_attention_cuda_backward_into", TORCH_BOX(&run_backward_into));
}

}  // namespace jmm_fast::topology_attention::cuda
