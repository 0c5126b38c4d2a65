#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace jmm_fast {

/// Instruction sets the kernels are compiled for, in rising order.
enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

std::string_view isa_name(Isa isa);

/// Those compiled into this binary that this processor can run, in rising order; never empty.
std::vector<Isa> usable_isas();

/// The one the kernels run: the best usable, unless JMM_FAST_ISA or set_isa says otherwise.
Isa active_isa();

/// Choose by name; throws std::invalid_argument for an unknown or unusable one.
void set_isa(std::string_view name);

/// `return`s the call made in the namespace of the instruction set: JMM_DISPATCH(isa, jmm_fast::op, run(x)) is
/// `jmm_fast::op::avx512::run(x)` where `isa` is kAvx512.
#if defined(JMM_HAVE_avx512bf16)
  #define JMM_CASE_AVX512_BF16(op, call) \
    case Isa::kAvx512Bf16:               \
      return op::avx512bf16::call;
#else
  #define JMM_CASE_AVX512_BF16(op, call)
#endif
#if defined(JMM_HAVE_avx512)
  #define JMM_CASE_AVX512(op, call) \
    case Isa::kAvx512:              \
      return op::avx512::call;
#else
  #define JMM_CASE_AVX512(op, call)
#endif
#if defined(JMM_HAVE_avx2)
  #define JMM_CASE_AVX2(op, call) \
    case Isa::kAvx2:              \
      return op::avx2::call;
#else
  #define JMM_CASE_AVX2(op, call)
#endif
#define JMM_DISPATCH(isa, op, call) \
  switch (isa) {                    \
    JMM_CASE_AVX512_BF16(op, call)  \
    JMM_CASE_AVX512(op, call)       \
    JMM_CASE_AVX2(op, call)         \
    default:                        \
      return op::baseline::call;    \
  }

}  // namespace jmm_fast
