#include "kernels/cuda/prefill.h"
#include "kernels/cuda/prefill_variants.h"

namespace larder::kernels::cuda {

cudaError_t Prefill(const PrefillParams& p, cudaStream_t stream) {
  const KvLayer& layer = p.layer;
  const int64_t strides = layer.key_offset_bytes | layer.value_offset_bytes |
                          layer.head_stride_bytes | layer.token_stride_bytes;
  const int64_t scales =
      layer.key_scale_offset_bytes | layer.value_scale_offset_bytes | layer.head_scale_stride_bytes;
  const bool right =
      layer.kv_heads > 0 && p.q_heads > 0 && p.q_heads % layer.kv_heads == 0 &&
      layer.block_tokens > 0 && strides % 16 == 0 && scales % kScaleBytes == 0 &&
      p.q_stride % 8 == 0 && p.out_stride % 2 == 0 && !layer.latent &&
      layer.value_dim == layer.key_dim &&
      (p.out_dtype == DType::kF32 || p.out_dtype == PrefillQueryType(layer)) &&
      (p.plan.tile_rows == kPrefillRowsSmall || p.plan.tile_rows == kPrefillRowsLarge);
  if (!right) return cudaErrorInvalidValue;
  switch (layer.dtype) {
    case DType::kBf16:
      return PrefillBf16(p, stream);
    case DType::kF16:
      return PrefillF16(p, stream);
    case DType::kF8E4M3:
      return PrefillE4m3(p, stream);
    case DType::kI8:
      return PrefillInt8(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace larder::kernels::cuda
