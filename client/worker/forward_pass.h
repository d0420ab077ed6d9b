// ForwardPass: a packed model, its activations, and the order of operations.
//
//   x = embedding[tokens]
//   each layer:   q, k, v = Wqkv norm(x) + bias;  q and k rotated;  k, v into the blocks
//                 x += Wo attend(q)
//                 x += Wdown (silu(Wgate norm(x)) * Wup norm(x))
//   logits = Wout norm(x)      of the rows that are asked for
//
// as transformers' modeling_llama.py and modeling_qwen2.py have it. The residual x and all sums
// are f32; what goes into a product is rounded to the product's type, what goes into a block to
// the block's.
//
// Thread safety: one call at a time.
//
// Invariants:
//   1. Every step computes each row from that row, the weights and the sequence's blocks alone
//      (kernels/ and Matmul see to it), so rows may be batched in any way.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "client/worker/buffer.h"
#include "client/worker/matmul.h"
#include "client/worker/packed_model.h"
#include "client/worker/transformer.h"
#include "kernels/attention.h"
#include "kernels/cpu.h"
#include "kernels/thread_pool.h"

namespace larder::worker {

class ForwardPass {
 public:
  // `options`: valid, with arithmetic and threads chosen. UNIMPLEMENTED and RESOURCE_EXHAUSTED
  // as Transformer::Create.
  static absl::StatusOr<std::unique_ptr<ForwardPass>> Create(Weights weights,
                                                             const TransformerOptions& options);

  int threads() const { return pool_.threads(); }

  // Chunks that passed Transformer's checks; `logits` as Transformer::Forward has it.
  absl::Status Run(std::span<const Chunk> chunks, std::span<float> logits);

 private:
  ForwardPass(Weights weights, const TransformerOptions& options);

  absl::Status Allocate();
  absl::Status Prepare(std::span<const Chunk> chunks);
  absl::Status ExtendKeyAngles(uint32_t positions);
  void RunLayer(uint32_t index);
  kernels::AttentionParams Attention(uint32_t layer) const;
  void WriteLogits(std::span<const Chunk> chunks, std::span<float> logits);
  void Norm(const std::vector<float>& weight, const float* x, uint32_t rows);

  Weights weights_;  // the embedding; all else is packed
  const ModelConfig config_;
  const TransformerOptions options_;
  const uint32_t q_width_;          // floats: all query heads of a row
  const uint32_t kv_width_;         // all key heads
  const uint32_t qkv_width_;        // queries, keys and values
  std::vector<float> frequencies_;  // [head_dim / 2]
  kernels::ThreadPool pool_;
  const kernels::Cpu cpu_;
  std::unique_ptr<Matmul> matmul_;
  PackedModel model_;

  // Of the call under way: [rows_max][width] each.
  uint32_t rows_ = 0;
  std::vector<kernels::SequenceChunk> chunks_;
  std::vector<int32_t> positions_;
  Buffer x_, normed_, qkv_, attended_, gate_up_;
  Buffer angles_;      // of the rows, [rows][2][head_dim / 2]
  Buffer key_angles_;  // of block table indices from 0 on, where keys are cached before RoPE
  uint32_t key_angle_positions_ = 0;
  Buffer workspace_;  // of Attend
};

}  // namespace larder::worker
