#include "kernels/cuda/decode.h"

#include <algorithm>

#include "kernels/cuda/decode_shape.h"
#include "kernels/cuda/decode_variants.h"
#include "kernels/cuda/group_merge.h"
#include "kernels/cuda/mla_shape.h"

namespace larder::kernels::cuda {
namespace {

// What an SM keeps of its shared memory for each block, and at most 9 KiB of static shared memory.
constexpr size_t kReservedBytes = 10 * 1024;
constexpr int32_t kSmRegisters = 64 * 1024;
// An upper bound for every kernel here (README.md has the figures).
constexpr int32_t kThreadRegisters = 255;

bool IsMla(const KvLayer& layer) {
  return layer.kv_heads == 1 && layer.key_dim == kLatentRowDim && layer.value_dim == kLatentDim;
}

}  // namespace

size_t DecodeCounterBytes(const DecodeParams& params) { return WorkspaceOf(params).counter_bytes; }
size_t DecodeWorkspaceBytes(const DecodeParams& params) { return WorkspaceOf(params).bytes; }

int32_t DecodeBlocksPerSm(const KvLayer& layer, int32_t q_heads, size_t shared_bytes) {
  const auto fitting = [&](auto shape) {
    const auto by_shared =
        static_cast<int32_t>(shared_bytes / (shape.kSharedBytes + kReservedBytes));
    return std::min(by_shared, kSmRegisters / (kThreadRegisters * shape.kThreads));
  };
  if (layer.latent) return IsMla(layer) ? WithMlaShape(q_heads, fitting) : 0;
  return WithDecodeShape(layer.key_dim, q_heads / layer.kv_heads, fitting, 0);
}

cudaError_t Decode(const DecodeParams& p, cudaStream_t stream) {
  const KvLayer& layer = p.layer;
  const int64_t strides = layer.key_offset_bytes | layer.value_offset_bytes |
                          layer.head_stride_bytes | layer.token_stride_bytes;
  const bool right = layer.kv_heads > 0 && p.q_heads > 0 && p.q_heads % layer.kv_heads == 0 &&
                     layer.block_tokens > 0 && strides % 16 == 0 && p.q_stride % 2 == 0 &&
                     (p.out_dtype == DType::kF32 || p.out_dtype == layer.dtype) &&
                     (layer.latent ? IsMla(layer) && p.q_stride % 8 == 0
                                   : layer.value_dim == layer.key_dim);
  if (!right || layer.dtype == DType::kF32) return cudaErrorInvalidValue;
  const bool bf16 = layer.dtype == DType::kBf16;
  if (layer.latent) return bf16 ? MlaBf16(p, stream) : MlaF16(p, stream);
  return bf16 ? DecodeBf16(p, stream) : DecodeF16(p, stream);
}

}  // namespace larder::kernels::cuda
