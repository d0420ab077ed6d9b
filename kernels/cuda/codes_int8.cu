#include "kernels/cuda/codes_kernel.h"

namespace larder::kernels::cuda {

DecodeVariant CodesInt8(const KvLayer& layer, int group) { return CodesOf<Int8>(layer, group); }

}  // namespace larder::kernels::cuda
