#include "kernels/cuda/decode_kernel.h"
#include "kernels/cuda/decode_variants.h"

namespace larder::kernels::cuda {

cudaError_t DecodeF16(const DecodeParams& p, cudaStream_t stream) {
  return LaunchDecode<F16>(p, stream);
}

}  // namespace larder::kernels::cuda
