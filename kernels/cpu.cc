#include "kernels/cpu.h"

namespace larder::kernels {

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

bool IsSupported(Isa isa) {
#if defined(__x86_64__)
  // The compiler's runtime asks cpuid, and XGETBV whether the kernel saves the registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kPortable;
}

Isa BestIsa() {
  static const Isa best = [] {
    Isa found = Isa::kPortable;
    for (const Isa isa : kIsas) {
      if (IsSupported(isa)) found = isa;
    }
    return found;
  }();
  return best;
}

}  // namespace larder::kernels
