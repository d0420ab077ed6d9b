#include "kernels/cuda/decode_variants.h"
#include "kernels/cuda/mla_kernel.h"

namespace larder::kernels::cuda {

cudaError_t MlaF16(const DecodeParams& p, cudaStream_t stream) { return LaunchMla<F16>(p, stream); }

}  // namespace larder::kernels::cuda
