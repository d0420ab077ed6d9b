#include "kernels/cuda/decode.h"
#include "kernels/cuda/decode_variants.h"
#include "kernels/cuda/group_merge.h"
#include "kernels/cuda/mla_shape.h"

namespace larder::kernels::cuda {
namespace {

DecodeVariant VariantOf(const KvLayer& layer, int32_t q_heads) {
  if (layer.kv_heads <= 0 || q_heads <= 0 || q_heads % layer.kv_heads != 0) return {};
  const int group = q_heads / layer.kv_heads;
  if (IsQuantised(layer.dtype)) {
    const int64_t scales = layer.key_scale_offset_bytes | layer.value_scale_offset_bytes |
                           layer.head_scale_stride_bytes;
    if (layer.latent || layer.value_dim != layer.key_dim || scales % kScaleBytes != 0) return {};
    return layer.dtype == DType::kI8 ? CodesInt8(layer, group) : CodesE4m3(layer, group);
  }
  const bool bf16 = layer.dtype == DType::kBf16;
  if (!bf16 && layer.dtype != DType::kF16) return {};
  if (!layer.latent) {
    if (layer.value_dim != layer.key_dim) return {};
    return bf16 ? DecodeBf16(layer, group) : DecodeF16(layer, group);
  }
  if (layer.kv_heads != 1 || layer.key_dim != kLatentRowDim || layer.value_dim != kLatentDim)
    return {};
  return bf16 ? MlaBf16(group) : MlaF16(group);
}

LaunchShape ShapeOf(const DecodeVariant& variant, const KvLayer& layer, int32_t q_heads,
                    int32_t pieces) {
  const int tiles = CeilDiv(q_heads / layer.kv_heads, variant.heads);
  return {dim3(pieces, tiles), static_cast<unsigned>(variant.threads), variant.shared_bytes};
}

}  // namespace

size_t DecodeCounterBytes(const DecodeParams& params) { return WorkspaceOf(params).counter_bytes; }
size_t DecodeWorkspaceBytes(const DecodeParams& params) { return WorkspaceOf(params).bytes; }

cudaError_t DecodeBlocksAtOnce(const KvLayer& layer, int32_t q_heads, int32_t* blocks) {
  const DecodeVariant variant = VariantOf(layer, q_heads);
  if (variant.kernel == nullptr) return cudaErrorInvalidValue;
  const LaunchShape shape = ShapeOf(variant, layer, q_heads, 1);
  int all = 0;
  const cudaError_t error = BlocksAtOnce(variant.kernel, shape, &all);
  *blocks = max(1, all / static_cast<int>(shape.blocks.y));
  return error;
}

cudaError_t Decode(const DecodeParams& p, cudaStream_t stream) {
  const KvLayer& layer = p.layer;
  const DecodeVariant variant = VariantOf(layer, p.q_heads);
  const int64_t strides = layer.key_offset_bytes | layer.value_offset_bytes |
                          layer.head_stride_bytes | layer.token_stride_bytes;
  if (variant.kernel == nullptr || layer.block_tokens <= 0 || strides % 16 != 0 ||
      p.q_stride % (layer.latent ? 8 : 2) != 0 ||
      (p.out_dtype != DType::kF32 && p.out_dtype != DecodeQueryType(layer))) {
    return cudaErrorInvalidValue;
  }
  return Launch(variant.kernel, ShapeOf(variant, layer, p.q_heads, p.plan.piece_count), stream, p);
}

}  // namespace larder::kernels::cuda
