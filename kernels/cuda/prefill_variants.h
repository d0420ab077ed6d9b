// The prefill kernels that are compiled apart, a file a storage type. Internal.
//
// Thread safety: as prefill.h.
#pragma once

#include "kernels/cuda/prefill.h"

namespace larder::kernels::cuda {

cudaError_t PrefillBf16(const PrefillParams& p, cudaStream_t stream);
cudaError_t PrefillF16(const PrefillParams& p, cudaStream_t stream);
cudaError_t PrefillE4m3(const PrefillParams& p, cudaStream_t stream);
cudaError_t PrefillInt8(const PrefillParams& p, cudaStream_t stream);

}  // namespace larder::kernels::cuda
