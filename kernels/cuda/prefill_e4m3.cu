#include "kernels/cuda/prefill_kernel.h"
#include "kernels/cuda/prefill_variants.h"

namespace larder::kernels::cuda {

cudaError_t PrefillE4m3(const PrefillParams& p, cudaStream_t stream) {
  return PrefillCodesAs<E4m3>(p, stream);
}

}  // namespace larder::kernels::cuda
