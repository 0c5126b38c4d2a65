// CPU implementations of jmm_fast::topology_attention_{forward,backward}; their schemas are defined in Python.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "topology_attention/arguments.h"
#include "topology_attention/cpu_kernel.h"

namespace jmm_fast::topology_attention {

namespace {

constexpr const char* kDevice = "CPU";
// Enough tasks to keep many cores busy; a constant, so that the split never depends on the machine.
constexpr int64_t kForwardTasks = 64;
// Bodies are summed into this many partial tables per head, which are then added in order.
constexpr int64_t kTableParts = 32;
constexpr int64_t kLeastQueries = 96;

int64_t forward_scratch(Isa isa,
                        const Problem& p){JMM_DISPATCH(isa, ::jmm_fast::topology_attention, forward_scratch(p))} int64_t
    backward_scratch(Isa isa, const Problem& p) {
  JMM_DISPATCH(isa, ::jmm_fast::topology_attention, backward_scratch(p))
}
void forward(Isa isa, const Problem& p, const Forward& f, Worker& worker, int64_t body, int64_t head, int64_t begin,
             int64_t end) {
  JMM_DISPATCH(isa, ::jmm_fast::topology_attention, forward(p, f, worker, body, head, begin, end))
}
void backward(Isa isa, const Problem& p, const Backward& g, Worker& worker, int64_t body, int64_t head, double* dtable){
    JMM_DISPATCH(isa, ::jmm_fast::topology_attention, backward(p, g, worker, body, head, dtable))}

View view(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

Inputs<Problem> check(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& table,
                      const std::optional<Tensor>& joints, bool multiply, double scale) {
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "q must be float32 or bfloat16");
  Inputs<Problem> inputs = make_inputs<Problem>(kDevice, q.is_cpu(), q, k, v, table, joints, scale);
  Problem& p = inputs.problem;
  STD_TORCH_CHECK(p.width >= 1 && p.width <= 128, "the head width must be 1 to 128, got ", p.width);
  p.q = view(q), p.k = view(k), p.v = view(v);
  if (p.table == nullptr) return inputs;
  p.multiply = multiply;
  // The public function looks too, but not while it is compiled, and a wrong joint would read another's memory.
  for (int64_t b = 0; b < (p.joint_body != 0 ? p.bodies : 1); ++b) {
    for (int64_t i = 0; i < p.tokens; ++i) {
      const int64_t joint = p.joint[b * p.joint_body + i * p.joint_token];
      STD_TORCH_CHECK(joint >= 0 && joint < p.joints, "joints must be in [0, ", p.joints, "), got ", joint);
    }
  }
  return inputs;
}

std::tuple<Tensor, Tensor> run_forward(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> table,
                                       std::optional<Tensor> joints, bool multiply, double scale) {
  const Inputs<Problem> inputs = check(q, k, v, table, joints, multiply, scale);
  const Problem& p = inputs.problem;
  Tensor out = token_major(q), statistics = empty(q, {2, p.bodies, p.heads, p.tokens}, ScalarType::Float);
  const int64_t pairs = p.bodies * p.heads;
  if (pairs == 0 || p.tokens == 0) return {out, statistics};

  float* shift = static_cast<float*>(statistics.data_ptr());
  const Forward f{view(out), {shift, shift + pairs * p.tokens}};
  const int64_t wanted = (kForwardTasks + pairs - 1) / pairs;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, p.tokens / kLeastQueries));
  const int64_t queries = (p.tokens + parts - 1) / parts;
  const Isa isa = active_isa();
  const int64_t scratch = forward_scratch(isa, p);
  // Heads outside: a thread meets the same head again and again and keeps its expanded table.
  run_tasks(pairs * parts, [&](auto next) {
    Worker worker{thread_scratch(scratch), -1};
    for (int64_t task; (task = next()) < pairs * parts;) {
      const int64_t begin = task % parts * queries, pair = task / parts;
      forward(isa, p, f, worker, pair % p.bodies, pair / p.bodies, begin, std::min(begin + queries, p.tokens));
    }
  });
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                        const Tensor& v, std::optional<Tensor> table,
                                                        std::optional<Tensor> joints, const Tensor& out,
                                                        const Tensor& statistics_in, bool multiply, double scale) {
  const Inputs<Problem> inputs = check(q, k, v, table, joints, multiply, scale);
  const Problem& p = inputs.problem;
  check_like(kDevice, "grad_out", grad_out, q);
  check_like(kDevice, "out", out, q);
  const Tensor statistics = check_statistics(kDevice, statistics_in, q);
  Tensor dq = token_major(q), dk = token_major(q), dv = token_major(q);
  const int64_t entries = p.table != nullptr ? p.joints * p.joints : 0;
  Tensor dtable = table_like(q, table);

  const bool nothing = p.bodies == 0 || p.heads == 0 || p.tokens == 0;
  const int64_t parts = nothing ? 0 : (p.table != nullptr ? std::min(p.bodies, kTableParts) : p.bodies);
  std::vector<double> partial(static_cast<size_t>(p.heads * parts * entries));
  const float* shift = static_cast<const float*>(statistics.data_ptr());
  const Backward g{view(grad_out), view(out), view(dq),
                   view(dk),       view(dv),  {shift, shift + p.bodies * p.heads * p.tokens}};
  const Isa isa = active_isa();
  const int64_t scratch = nothing ? 0 : backward_scratch(isa, p);
  run_tasks(p.heads * parts, [&](auto next) {
    Worker worker{thread_scratch(scratch), -1};
    for (int64_t task; (task = next()) < p.heads * parts;) {
      const int64_t head = task / parts, part = task % parts;
      for (int64_t body = part * p.bodies / parts; body < (part + 1) * p.bodies / parts; ++body) {
        backward(isa, p, g, worker, body, head, partial.data() + task * entries);
      }
    }
  });
  for (int64_t head = 0; head < (entries > 0 ? p.heads : 0); ++head) {
    float* to = static_cast<float*>(dtable.data_ptr()) + head * entries;
    for (int64_t i = 0; i < entries; ++i) {
      double total = 0.0;
      for (int64_t part = 0; part < parts; ++part) {
        total += partial[static_cast<size_t>((head * parts + part) * entries + i)];
      }
      to[i] = static_cast<float>(total);
    }
  }
  return {dq, dk, dv, dtable};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jmm_fast, CPU, m) {
  m.impl("topology_attention_forward", TORCH_BOX(&run_forward));
  m.impl("topology_attention_backward", TORCH_BOX(&run_backward));
}

}  // namespace jmm_fast::topology_attention
