#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace jmm_fast {

/// Instruction sets the kernels are compiled for, in rising order.
enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

std::string_view isa_name(Isa isa);

/// Those compiled into this binary that this processor can run, in rising order; never empty.
std::vector<Isa> usable_isas();

/// The one the kernels run: the best usable, unless JMM_FAST_ISA or set_isa says otherwise.
Isa active_isa();

/// Choose by name; throws std::invalid_argument for an unknown or unusable one.
void set_isa(std::string_view name);

/// Calls `JMM_KERNEL(isa)::function(arguments)` for the active instruction set.
#if defined(JMM_HAVE_avx512)
  #define JMM_CALL_AVX512(call)    \
    case ::jmm_fast::Isa::kAvx512: \
      return ::jmm_fast::avx512::call;
#else
  #define JMM_CALL_AVX512(call)
#endif
#if defined(JMM_HAVE_avx2)
  #define JMM_CALL_AVX2(call)    \
    case ::jmm_fast::Isa::kAvx2: \
      return ::jmm_fast::avx2::call;
#else
  #define JMM_CALL_AVX2(call)
#endif
#define JMM_DISPATCH(isa, call)          \
  switch (isa) {                         \
    JMM_CALL_AVX512(call)                \
    JMM_CALL_AVX2(call)                  \
    default:                             \
      return ::jmm_fast::baseline::call; \
  }

}  // namespace jmm_fast
