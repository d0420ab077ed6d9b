#include "client/worker/forward_pass.h"

#include <cmath>

#include "kernels/rope.h"

namespace larder::worker {

kernels::DType KernelDtype(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBf16:
      return kernels::DType::kBf16;
    case Dtype::kF16:
      return kernels::DType::kF16;
    case Dtype::kF32:
      return kernels::DType::kF32;
    case Dtype::kF8E4M3:
      return kernels::DType::kF8E4M3;
    case Dtype::kI8:
      return kernels::DType::kI8;
  }
  return kernels::DType::kBf16;
}

std::vector<float> RopeFrequencies(const ModelConfig& config) {
  kernels::RopeConfig rope;
  rope.dim = static_cast<int32_t>(config.head_dim);
  rope.theta = config.rope_theta;
  const RopeScaling& scaling = config.rope_scaling;
  if (scaling.type == RopeScalingType::kLlama3) {
    rope.llama3 = kernels::Llama3RopeScaling{
        .factor = scaling.factor,
        .low_freq_factor = scaling.low_freq_factor,
        .high_freq_factor = scaling.high_freq_factor,
        .original_max_position_embeddings = static_cast<double>(scaling.original_max_positions)};
  }
  std::vector<float> frequencies = kernels::InverseFrequencies(rope);
  if (scaling.type == RopeScalingType::kLinear) {
    for (float& frequency : frequencies) frequency /= static_cast<float>(scaling.factor);
  }
  return frequencies;
}

kernels::KvLayer LayerOfModel(const ModelConfig& config, const TransformerOptions& options,
                              uint32_t layer) {
  return kernels::LayerOf({.dtype = KernelDtype(options.kv_dtype),
                           .layers = static_cast<int32_t>(config.layers),
                           .kv_heads = static_cast<int32_t>(config.kv_heads),
                           .head_dim = static_cast<int32_t>(config.head_dim),
                           .block_tokens = static_cast<int32_t>(options.block_tokens)},
                          static_cast<int32_t>(layer));
}

float AttentionScale(const ModelConfig& config) {
  return static_cast<float>(1 / std::sqrt(static_cast<double>(config.head_dim)));
}

bool WantsLogits(const Chunk& chunk, size_t index) {
  return chunk.logits == Logits::kAll ||
         (chunk.logits == Logits::kLast && index + 1 == chunk.tokens.size());
}

}  // namespace larder::worker
