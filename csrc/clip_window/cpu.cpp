// CPU implementation of jmm_fast::clip_window_cpu; its schema is defined in Python.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "clip_window/cpu_kernel.h"
#include "isa.h"
#include "parallel.h"

namespace jmm_fast::clip_window {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t scratch(Isa isa, const Problem& p) { JMM_DISPATCH(isa, ::jmm_fast::clip_window, scratch(p)) }

void cut(Isa isa, const Problem& p, float* memory, int64_t clip) {
  JMM_DISPATCH(isa, ::jmm_fast::clip_window, cut(p, memory, clip))
}

/// Rz(c) Ry(b) Rx(a), each turning coordinates by the negative angle, row by row.
void rotation_matrix(const float* angles, double* to) {
  const double a = angles[0], b = angles[1], c = angles[2];
  const double sa = std::sin(a), ca = std::cos(a), sb = std::sin(b), cb = std::cos(b), sc = std::sin(c),
               cc = std::cos(c);
  const double first[] = {cb, sb * sa, -sb * ca}, second[] = {0, ca, sa}, third[] = {sb, -cb * sa, cb * ca};
  for (int i = 0; i < 3; ++i) {
    to[i] = cc * first[i] + sc * second[i];
    to[3 + i] = cc * second[i] - sc * first[i];
    to[6 + i] = third[i];
  }
}

Tensor run(const Tensor& frames, const Tensor& start_in, const Tensor& length_in, std::optional<Tensor> angles,
           int64_t window) {
  STD_TORCH_CHECK(frames.is_cpu() && frames.dim() == 3 && frames.size(2) == 3 && frames.size(1) >= 1 &&
                      frames.scalar_type() == ScalarType::Float,
                  "frames must be a float32 CPU tensor [F,V,3]");
  STD_TORCH_CHECK(start_in.is_cpu() && start_in.dim() == 1 && start_in.scalar_type() == ScalarType::Long &&
                      length_in.is_cpu() && length_in.dim() == 1 && length_in.scalar_type() == ScalarType::Long &&
                      length_in.size(0) == start_in.size(0),
                  "start and length must be int64 CPU tensors [B]");
  STD_TORCH_CHECK(window >= 1, "window must be positive, got ", window);
  const Tensor start = torch::stable::contiguous(start_in), length = torch::stable::contiguous(length_in);
  const int64_t clips = start.size(0);
  Problem p{};
  p.frames = static_cast<const float*>(frames.const_data_ptr());
  p.frame_stride = frames.stride(0), p.joint_stride = frames.stride(1), p.coordinate_stride = frames.stride(2);
  p.rows = frames.size(0), p.joints = frames.size(1), p.window = window;
  p.start = static_cast<const int64_t*>(start.const_data_ptr());
  p.length = static_cast<const int64_t*>(length.const_data_ptr());
  for (int64_t b = 0; b < clips; ++b) {
    const int64_t first = p.start[b], count = p.length[b];
    const bool inside = count == 0 || (count > 0 && first >= 0 && first <= p.rows && count <= p.rows - first);
    STD_TORCH_CHECK(inside, "start and length must stay inside the ", p.rows, " frames, got start ", first,
                    " and length ", count, " for clip ", b);
  }
  const float* turns = nullptr;
  if (angles.has_value()) {
    STD_TORCH_CHECK(angles->is_cpu() && angles->dim() == 2 && angles->size(0) == clips && angles->size(1) == 3 &&
                        angles->scalar_type() == ScalarType::Float,
                    "angles must be a float32 CPU tensor [B,3]");
    angles = torch::stable::contiguous(*angles);
    turns = static_cast<const float*>(angles->const_data_ptr());
  }

  const std::array<int64_t, 4> sizes{clips, window, p.joints, 3};
  Tensor out = torch::stable::new_empty(frames, {sizes.data(), sizes.size()}, ScalarType::Float);
  if (clips == 0) return out;
  p.out = static_cast<float*>(out.mutable_data_ptr());
  std::vector<double> rotation(turns != nullptr ? static_cast<size_t>(9 * clips) : 0);
  p.rotation = turns != nullptr ? rotation.data() : nullptr;
  const Isa isa = active_isa();
  const int64_t memory = scratch(isa, p);
  run_tasks(clips, [&](auto next) {
    float* own = thread_scratch(memory);
    for (int64_t clip; (clip = next()) < clips;) {
      if (turns != nullptr) rotation_matrix(turns + 3 * clip, rotation.data() + 9 * clip);
      cut(isa, p, own, clip);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jmm_fast, CPU, m) { m.impl("clip_window_cpu", TORCH_BOX(&run)); }

}  // namespace jmm_fast::clip_window
