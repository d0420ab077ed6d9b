#include "kernels/cuda/mla_kernel.h"

namespace larder::kernels::cuda {

DecodeVariant MlaBf16(int group) { return MlaOf<Bf16>(group); }

}  // namespace larder::kernels::cuda
