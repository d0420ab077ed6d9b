#include "kernels/cuda/decode_kernel.h"

namespace larder::kernels::cuda {

DecodeVariant DecodeF16(const KvLayer& layer, int group) { return DecodeOf<F16>(layer, group); }

}  // namespace larder::kernels::cuda
