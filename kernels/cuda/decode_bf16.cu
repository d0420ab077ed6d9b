#include "kernels/cuda/decode_kernel.h"

namespace larder::kernels::cuda {

DecodeVariant DecodeBf16(const KvLayer& layer, int group) { return DecodeOf<Bf16>(layer, group); }

}  // namespace larder::kernels::cuda
