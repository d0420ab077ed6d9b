// CpuForwardPass: the forward pass on this machine's processor: kernels/ and the packed model.
//
// Thread safety: as ForwardPass; Run uses threads of its own.
//
// Invariants:
//   1. A row's bits depend on nothing but what ForwardPass's first invariant names (kernels/ and
//      Matmul see to it).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/worker/buffer.h"
#include "client/worker/forward_pass.h"
#include "client/worker/matmul.h"
#include "client/worker/packed_model.h"
#include "client/worker/transformer.h"
#include "kernels/attention.h"
#include "kernels/cpu.h"
#include "kernels/thread_pool.h"

namespace larder::worker {

class CpuForwardPass final : public ForwardPass {
 public:
  // `options`: valid, with arithmetic and threads chosen. UNIMPLEMENTED and RESOURCE_EXHAUSTED
  // as Transformer::Create.
  static absl::StatusOr<std::unique_ptr<ForwardPass>> Create(Weights weights,
                                                             const TransformerOptions& options);

  absl::Status Run(std::span<const Chunk> chunks, std::span<float> logits) override;
  BlockMemory& block_memory() override { return HostBlockMemory(); }
  uint32_t threads() const override { return static_cast<uint32_t>(pool_.threads()); }
  std::string arithmetic() const override;

 private:
  CpuForwardPass(Weights weights, const TransformerOptions& options);

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
