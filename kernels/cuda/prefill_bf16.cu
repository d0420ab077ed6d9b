#include "kernels/cuda/prefill_kernel.h"
#include "kernels/cuda/prefill_variants.h"

namespace larder::kernels::cuda {

cudaError_t PrefillBf16(const PrefillParams& p, cudaStream_t stream) {
  return PrefillAs<Bf16>(p, stream);
}

}  // namespace larder::kernels::cuda
