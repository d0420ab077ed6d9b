// The decode kernels that are compiled apart, a file a storage type. Internal.
//
// Thread safety: as decode.h.
#pragma once

#include "kernels/cuda/decode.h"

namespace larder::kernels::cuda {

cudaError_t DecodeBf16(const DecodeParams& p, cudaStream_t stream);
cudaError_t DecodeF16(const DecodeParams& p, cudaStream_t stream);
cudaError_t MlaBf16(const DecodeParams& p, cudaStream_t stream);
cudaError_t MlaF16(const DecodeParams& p, cudaStream_t stream);

}  // namespace larder::kernels::cuda
