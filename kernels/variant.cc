#include "kernels/variant.h"

#include <cstdio>
#include <cstdlib>

#include "kernels/variant_table.h"

namespace larder::kernels {

const Variant& VariantOf(Isa isa) {
  if (!IsSupported(isa)) {
    std::fprintf(stderr, "kernels: variant %s does not run on this machine\n", IsaName(isa));
    std::abort();
  }
#if defined(__x86_64__)
  if (isa == Isa::kAvx2) return kAvx2Variant;
  if (isa == Isa::kAvx512) return kAvx512Variant;
#endif
  return kPortableVariant;
}

}  // namespace larder::kernels
