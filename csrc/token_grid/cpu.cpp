// CPU implementations of jmm_fast::token_grid_*; their schemas are defined in Python.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <tuple>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "token_grid/cpu_kernel.h"

namespace jmm_fast::token_grid {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Bodies that share a time step in one task: enough to spread what they share, few enough to keep all threads busy.
constexpr int64_t kTaskBodies = 32;

void gather(Isa isa, const Patches& p, int64_t body) { JMM_DISPATCH(isa, ::jmm_fast::token_grid, gather(p, body)) }
void gather_backward(Isa isa, const Patches& p,
                     int64_t body){JMM_DISPATCH(isa, ::jmm_fast::token_grid, gather_backward(p, body))} int64_t
    scatter_scratch(Isa isa, const Grid& g){JMM_DISPATCH(isa, ::jmm_fast::token_grid, scatter_scratch(g))} int64_t
    sum_scratch(Isa isa, const Grid& g) {
  JMM_DISPATCH(isa, ::jmm_fast::token_grid, sum_scratch(g))
}
void scatter(Isa isa, const Grid& g, float* scratch, int64_t step, int64_t begin, int64_t end) {
  JMM_DISPATCH(isa, ::jmm_fast::token_grid, scatter(g, scratch, step, begin, end))
}
void sum_step(Isa isa, const Grid& g, float* scratch, int64_t step, float* joint, float* time, float* masked) {
  JMM_DISPATCH(isa, ::jmm_fast::token_grid, sum_step(g, scratch, step, joint, time, masked))
}
void sum_over_steps(Isa isa, const float* sums, int64_t steps, int64_t stride, int64_t count, float* total) {
  JMM_DISPATCH(isa, ::jmm_fast::token_grid, sum_over_steps(sums, steps, stride, count, total))
}
void tokens_backward(Isa isa, const Grid& g, int64_t body) {
  JMM_DISPATCH(isa, ::jmm_fast::token_grid, tokens_backward(g, body))
}

void check_floating(const char* name, const Tensor& tensor, int64_t dims) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.dim() == dims && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16), name,
      " must be a float32 or bfloat16 CPU tensor of ", dims, " dimensions");
}

void check_index(const char* name, const Tensor& index, int64_t bodies, int64_t below) {
  STD_TORCH_CHECK(
      index.is_cpu() && index.dim() == 2 && index.scalar_type() == ScalarType::Long && index.size(0) == bodies, name,
      " must be an int64 CPU tensor with a row for each body");
  const int64_t* data = static_cast<const int64_t*>(index.data_ptr());
  const int64_t bodies_stride = index.stride(0), stride = index.stride(1), count = index.size(1);
  for (int64_t b = 0; b < bodies; ++b) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = data[b * bodies_stride + i * stride];
      STD_TORCH_CHECK(at >= 0 && at < below, name, " must be in [0, ", below, "), got ", at);
    }
  }
}

Patches patches(const Tensor& clips, const Tensor& visible, int64_t t_patch) {
  check_floating("clips", clips, 4);
  STD_TORCH_CHECK(t_patch >= 1 && clips.size(1) % t_patch == 0, "the frames must be whole patches");
  check_index("visible", visible, clips.size(0), clips.size(1) / t_patch * clips.size(2));
  Patches p{};
  p.frames = clips.size(1), p.joints = clips.size(2), p.channels = clips.size(3), p.patch = t_patch;
  p.kept = visible.size(1);
  p.bfloat16 = clips.scalar_type() == ScalarType::BFloat16;
  p.clips = clips.data_ptr();
  p.clip_body = clips.stride(0), p.clip_frame = clips.stride(1);
  p.clip_joint = clips.stride(2), p.clip_channel = clips.stride(3);
  p.visible = static_cast<const int64_t*>(visible.data_ptr());
  p.visible_body = visible.stride(0), p.visible_token = visible.stride(1);
  return p;
}

template <typename Run>
void each_body(int64_t bodies, const Run& run) {
  run_tasks(bodies, [&](auto next) {
    for (int64_t body; (body = next()) < bodies;) run(body);
  });
}

Tensor run_gather(const Tensor& clips, const Tensor& visible, int64_t t_patch) {
  Patches p = patches(clips, visible, t_patch);
  const int64_t bodies = clips.size(0);
  const std::array<int64_t, 3> sizes{bodies, p.kept, p.patch * p.channels};
  Tensor out = torch::stable::new_empty(clips, {sizes.data(), sizes.size()});
  p.patches = out.data_ptr();
  const Isa isa = active_isa();
  each_body(bodies, [&](int64_t body) { gather(isa, p, body); });
  return out;
}

Tensor run_gather_backward(const Tensor& grad_out, const Tensor& visible, int64_t t_patch, int64_t frames,
                           int64_t joints, int64_t channels) {
  check_floating("grad_out", grad_out, 3);
  const int64_t bodies = grad_out.size(0);
  const std::array<int64_t, 4> sizes{bodies, frames, joints, channels};
  Tensor clips = torch::stable::new_zeros(grad_out, {sizes.data(), sizes.size()});
  Patches p = patches(clips, visible, t_patch);
  STD_TORCH_CHECK(grad_out.size(1) == p.kept && grad_out.size(2) == t_patch * channels,
                  "grad_out must be [B,K,u*C] as the patches are");
  const Tensor rows = torch::stable::contiguous(grad_out);
  p.patches = rows.data_ptr();
  const Isa isa = active_isa();
  each_body(bodies, [&](int64_t body) { gather_backward(isa, p, body); });
  return clips;
}

/// `tensor` itself when its rows are dense, else a copy.
Tensor dense_rows(const Tensor& tensor) { return tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor); }

Grid grid(const Tensor& tokens, const Tensor& restore, int64_t joints, int64_t steps) {
  STD_TORCH_CHECK(restore.dim() == 2 && restore.size(1) == joints * steps && restore.size(1) >= tokens.size(1),
                  "restore must be [B,L] with L = T' * V tokens, at least as many as are visible");
  check_index("restore", restore, tokens.size(0), restore.size(1));
  Grid g{};
  g.bodies = tokens.size(0), g.kept = tokens.size(1), g.width = tokens.size(2);
  g.steps = steps, g.joints = joints;
  g.bfloat16_tokens = tokens.scalar_type() == ScalarType::BFloat16;
  g.restore = static_cast<const int64_t*>(restore.data_ptr());
  g.restore_body = restore.stride(0), g.restore_token = restore.stride(1);
  g.tokens = tokens.data_ptr(), g.token_body = tokens.stride(0), g.token_row = tokens.stride(1);
  return g;
}

Tensor run_scatter(const Tensor& tokens_in, const Tensor& restore, const Tensor& mask_token, const Tensor& joint,
                   const Tensor& time) {
  check_floating("tokens", tokens_in, 3);
  check_floating("mask_token", mask_token, 1);
  check_floating("joint_embedding", joint, 2);
  check_floating("time_embedding", time, 2);
  const int64_t width = tokens_in.size(2);
  STD_TORCH_CHECK(mask_token.size(0) == width && joint.size(1) == width && time.size(1) == width,
                  "mask token and embeddings must be as wide as the tokens");
  const Tensor tokens = dense_rows(tokens_in);
  Grid g = grid(tokens, restore, joint.size(0), time.size(0));
  // The type the sum of all of them has, as in the plain twin.
  g.bfloat16_grid =
      g.bfloat16_tokens && joint.scalar_type() == ScalarType::BFloat16 && time.scalar_type() == ScalarType::BFloat16;
  const std::array<int64_t, 3> sizes{g.bodies, g.steps * g.joints, width};
  Tensor out = torch::stable::new_empty(tokens, {sizes.data(), sizes.size()},
                                        g.bfloat16_grid ? ScalarType::BFloat16 : ScalarType::Float);
  g.grid = out.data_ptr(), g.grid_body = g.steps * g.joints * width, g.grid_row = width;
  const auto single = [](const Tensor& t) {
    return torch::stable::contiguous(t.scalar_type() == ScalarType::Float ? t
                                                                          : torch::stable::to(t, ScalarType::Float));
  };
  const Tensor mask_single = single(mask_token), joint_single = single(joint), time_single = single(time);
  g.mask_token = static_cast<const float*>(mask_single.data_ptr());
  g.joint = static_cast<const float*>(joint_single.data_ptr());
  g.time = static_cast<const float*>(time_single.data_ptr());

  const int64_t parts = (g.bodies + kTaskBodies - 1) / kTaskBodies, tasks = g.steps * parts;
  const Isa isa = active_isa();
  const int64_t scratch = scatter_scratch(isa, g);
  run_tasks(tasks, [&](auto next) {
    float* memory = thread_scratch(scratch);
    for (int64_t task; (task = next()) < tasks;) {
      const int64_t begin = task / g.steps * kTaskBodies;
      scatter(isa, g, memory, task % g.steps, begin, std::min(begin + kTaskBodies, g.bodies));
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run_scatter_backward(const Tensor& grad_in, const Tensor& restore,
                                                                int64_t kept, int64_t joints, int64_t steps,
                                                                ScalarType dtype) {
  check_floating("grad_out", grad_in, 3);
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "tokens must be float32 or bfloat16");
  const Tensor grad = dense_rows(grad_in);
  const int64_t bodies = grad.size(0), width = grad.size(2);
  const std::array<int64_t, 3> token_sizes{bodies, kept, width};
  Tensor tokens = torch::stable::new_empty(grad, {token_sizes.data(), token_sizes.size()}, dtype);
  STD_TORCH_CHECK(grad.size(1) == joints * steps, "grad_out must be [B,L,d] with L = T' * V tokens");
  Grid g = grid(tokens, restore, joints, steps);
  g.bfloat16_grid = grad.scalar_type() == ScalarType::BFloat16;
  g.grid = grad.data_ptr(), g.grid_body = grad.stride(0), g.grid_row = grad.stride(1);

  const std::array<int64_t, 1> mask_sizes{width};
  const std::array<int64_t, 2> joint_sizes{joints, width}, time_sizes{steps, width};
  const auto result = [&](auto sizes) {
    return torch::stable::new_empty(grad, {sizes.data(), sizes.size()}, ScalarType::Float);
  };
  Tensor mask_token = result(mask_sizes), joint = result(joint_sizes), time = result(time_sizes);
  float* time_sums = static_cast<float*>(time.data_ptr());
  // A row for each joint and one for the masked tokens, of each time step.
  const int64_t count = (joints + 1) * width;
  const Tensor partial =
      torch::stable::new_empty(grad, {std::array<int64_t, 1>{steps * count}.data(), 1}, ScalarType::Float);
  float* sums = static_cast<float*>(partial.data_ptr());
  const Isa isa = active_isa();
  const int64_t scratch = sum_scratch(isa, g);
  run_tasks(steps + bodies, [&](auto next) {
    float* memory = thread_scratch(scratch);
    for (int64_t task; (task = next()) < steps + bodies;) {
      if (task < steps) {
        float* to = sums + task * count;
        sum_step(isa, g, memory, task, to, time_sums + task * width, to + joints * width);
      } else {
        tokens_backward(isa, g, task - steps);
      }
    }
  });
  sum_over_steps(isa, sums, steps, count, joints * width, static_cast<float*>(joint.data_ptr()));
  sum_over_steps(isa, sums + joints * width, steps, count, width, static_cast<float*>(mask_token.data_ptr()));
  return {tokens, mask_token, joint, time};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jmm_fast, CPU, m) {
  m.impl("token_grid_gather_forward", TORCH_BOX(&run_gather));
  m.impl("token_grid_gather_backward", TORCH_BOX(&run_gather_backward));
  m.impl("token_grid_scatter_forward", TORCH_BOX(&run_scatter));
  m.impl("token_grid_scatter_backward", TORCH_BOX(&run_scatter_backward));
}

}  // namespace jmm_fast::token_grid
