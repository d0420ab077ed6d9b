#include "kernels/cuda/mla_kernel.h"

namespace larder::kernels::cuda {

DecodeVariant MlaF16(int group) { return MlaOf<F16>(group); }

}  // namespace larder::kernels::cuda
