// CPU implementation of jmm_fast::motion_mask_cpu; its schema is defined in Python.

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>

#include "isa.h"
#include "motion_mask/arguments.h"
#include "motion_mask/cpu_kernel.h"
#include "parallel.h"

namespace jmm_fast::motion_mask {

namespace {

int64_t scratch(Isa isa, const Problem& p) { JMM_DISPATCH(isa, ::jmm_fast::motion_mask, scratch(p)) }

bool draw(Isa isa, const Problem& p, const Result& result, float* memory,
          int64_t body){JMM_DISPATCH(isa, ::jmm_fast::motion_mask, draw(p, result, memory, body))}

/// The fifth result counts the bodies whose set was settled in double precision.
std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t> run(const Tensor& clips, int64_t kept, double tau, int64_t patch,
                                                        int64_t variant, double gate, std::optional<Tensor> uniform,
                                                        int64_t seed, int64_t epoch, std::optional<Tensor> clip_ids,
                                                        std::optional<Tensor> valid, std::optional<Tensor> epoch_at) {
  const Call call = make_call("CPU", clips.is_cpu(), clips, kept, tau, patch, variant, gate, uniform, seed, epoch,
                              clip_ids, valid, epoch_at);
  const Problem& p = call.problem;
  std::atomic<int64_t> settled{0};
  if (p.bodies > 0) {
    const Isa isa = active_isa();
    const int64_t memory = scratch(isa, p);
    run_tasks(p.bodies, [&](auto next) {
      float* own = thread_scratch(memory);
      for (int64_t body; (body = next()) < p.bodies;) {
        if (draw(isa, p, call.result, own, body)) settled.fetch_add(1, std::memory_order_relaxed);
      }
    });
  }
  return {call.visible, call.mask, call.restore, call.probability, settled.load()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jmm_fast, CPU, m) { m.impl("motion_mask_cpu", TORCH_BOX(&run)); }

}  // namespace jmm_fast::motion_mask
