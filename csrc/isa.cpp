#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace jmm_fast {

namespace {

Isa parse(std::string_view name) {
  std::string known;
  for (Isa isa : usable_isas()) {
    if (isa_name(isa) == name) return isa;
    known += (known.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("instruction set must be one of " + known + " on this machine, got " + std::string(name));
}

Isa initial() {
  const char* wish = std::getenv("JMM_FAST_ISA");
  return wish != nullptr && *wish != '\0' ? parse(wish) : usable_isas().back();
}

constexpr int kUnset = -1;
std::atomic<int> current{kUnset};

}  // namespace

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<Isa> usable_isas() {
  std::vector<Isa> isas{Isa::kBaseline};
#if defined(JMM_HAVE_avx2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    isas.push_back(Isa::kAvx2);
  #if defined(JMM_HAVE_avx512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      isas.push_back(Isa::kAvx512);
    #if defined(JMM_HAVE_avx512bf16)
      if (__builtin_cpu_supports("avx512bf16")) isas.push_back(Isa::kAvx512Bf16);
    #endif
    }
  #endif
  }
#endif
  return isas;
}

Isa active_isa() {
  int isa = current.load(std::memory_order_relaxed);
  if (isa == kUnset) {
    isa = static_cast<int>(initial());
    current.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(std::string_view name) { current.store(static_cast<int>(parse(name)), std::memory_order_relaxed); }

}  // namespace jmm_fast
