// ForwardPass: the order of a model's operations over paged K/V, on one device or another.
//
//   x = embedding[tokens]
//   each layer:   q, k, v = Wqkv norm(x) + bias;  q and k rotated;  k, v into the blocks
//                 x += Wo attend(q)
//                 x += Wdown (silu(Wgate norm(x)) * Wup norm(x))
//   logits = Wout norm(x)      of the rows that are asked for
//
// as transformers' modeling_llama.py and modeling_qwen2.py have it. The residual x and all sums
// are f32; what goes into a product is rounded to the product's type, what goes into a block to
// the block's. forward_pass_cpu.h and forward_pass_cuda.h each do all of it.
//
// Thread safety: one call at a time.
//
// Invariants:
//   1. Every step computes each row from that row, the weights and the sequence's blocks alone, so
//      rows may be batched in any way. To the last bit on the CPU; on CUDA up to the rounding of
//      sums, see forward_pass_cuda.h.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "client/worker/block_memory.h"
#include "client/worker/model_config.h"
#include "client/worker/transformer.h"
#include "kernels/kv_layout.h"

namespace larder::worker {

class ForwardPass {
 public:
  virtual ~ForwardPass() = default;

  // Chunks that passed Transformer's checks, their blocks in block_memory(); `logits` as
  // Transformer::Forward has it. Everything is computed and written when it returns.
  virtual absl::Status Run(std::span<const Chunk> chunks, std::span<float> logits) = 0;

  virtual BlockMemory& block_memory() = 0;
  virtual uint32_t threads() const = 0;  // of the host, that compute
  // What the bits of K/V depend on besides weights and options, in a few words.
  virtual std::string arithmetic() const = 0;
};

// What both variants tell the kernels.
kernels::DType KernelDtype(Dtype dtype);
// [head_dim / 2], the model's scaling in them; for kernels::RopeAngles.
std::vector<float> RopeFrequencies(const ModelConfig& config);
kernels::KvLayer LayerOfModel(const ModelConfig& config, const TransformerOptions& options,
                              uint32_t layer);
// 1 / sqrt(head_dim).
float AttentionScale(const ModelConfig& config);
// Whether the logits of token `index` of the chunk are asked for.
bool WantsLogits(const Chunk& chunk, size_t index);

}  // namespace larder::worker
