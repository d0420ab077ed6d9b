#include "kernels/cuda/decode_variants.h"
#include "kernels/cuda/mla_kernel.h"

namespace larder::kernels::cuda {

cudaError_t MlaBf16(const DecodeParams& p, cudaStream_t stream) { return LaunchMla<Bf16>(p, stream); }

}  // namespace larder::kernels::cuda
