// CPU implementation of jmm_fast::philox_uniform_cpu; its schema is defined in Python.

#include "philox.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>

namespace jmm_fast {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor uniform(int64_t seed, int64_t purpose, const Tensor& clip_ids, int64_t epoch, int64_t count) {
  STD_TORCH_CHECK(clip_ids.is_cpu() && clip_ids.dim() == 1 && clip_ids.scalar_type() == ScalarType::Long,
                  "clip_ids must be an int64 CPU tensor [B]");
  STD_TORCH_CHECK(count >= 0, "count must not be negative, got ", count);
  const std::array<int64_t, 2> sizes{clip_ids.size(0), count};
  Tensor out = torch::stable::new_empty(clip_ids, {sizes.data(), sizes.size()}, ScalarType::Float);
  const auto* ids = static_cast<const int64_t*>(clip_ids.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t stride = clip_ids.stride(0);
  for (int64_t b = 0; b < sizes[0]; ++b) {
    const PhiloxStream stream = philox_stream(static_cast<uint64_t>(seed), static_cast<Purpose>(purpose),
                                              static_cast<uint64_t>(ids[b * stride]), static_cast<uint64_t>(epoch));
    for (int64_t i = 0; i < count; i += 4) {
      const PhiloxWords words = stream.block(static_cast<uint32_t>(i / 4));
      const float four[] = {philox_uniform(words.x0), philox_uniform(words.x1), philox_uniform(words.x2),
                            philox_uniform(words.x3)};
      for (int64_t j = 0; j < std::min<int64_t>(4, count - i); ++j) *to++ = four[j];
    }
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jmm_fast, CPU, m) { m.impl("philox_uniform_cpu", TORCH_BOX(&uniform)); }

}  // namespace jmm_fast
