#include "kernels/cuda/prefill_kernel.h"
#include "kernels/cuda/prefill_variants.h"

namespace larder::kernels::cuda {

cudaError_t PrefillInt8(const PrefillParams& p, cudaStream_t stream) {
  return PrefillCodesAs<Int8>(p, stream);
}

}  // namespace larder::kernels::cuda
