#include "kernels/cuda/codes_kernel.h"

namespace larder::kernels::cuda {

DecodeVariant CodesE4m3(const KvLayer& layer, int group) { return CodesOf<E4m3>(layer, group); }

}  // namespace larder::kernels::cuda
