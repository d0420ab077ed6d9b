// Decode attention on the GPU: one query token a row over K/V in blocks, MHA to MQA, and MLA. The
// formula, windows, sinks and what a row sees are those of kernels/attention.h.
//
//   grid    one thread block a piece of the plan; above 16 heads a kv head, one for each 8 or 16 of
//   them warp    16 keys at a time, from its own ring of stages: no barrier between warps until the
//   end
//           (MLA, whose rows are too long for that: tiles of 32 that the block shares)
//   S^T = K Q^T and O^T += V^T P^T on tensor cores, keys the long side, heads the short one
//
// Thread safety: host functions that launch on `stream`; one workspace for each call under way.
//
// 1. Nothing but visible keys and values is read; no other contributes, not even a NaN.
// 2. Scores and sums are float32, weights are rounded to the storage type before they meet the
// values.
// 3. The result depends on the row's pieces only (plan.h, rule 2), not on which block ends first.
// 4. Nothing is allocated, nothing is waited for.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/plan.h"
#include "kernels/kv_layout.h"

namespace larder::kernels::cuda {

// A DecodePlan whose arrays were copied to the device. It may have more than the plan: pieces of a
// row below 0, whose blocks return at once, groups that no piece names, and slots. So steps whose
// plans differ can be launched alike.
struct DevicePlan {
  const DecodePiece* pieces = nullptr;  // device [piece_count]
  const DecodeGroup* groups = nullptr;  // device [group_count]
  int32_t piece_count = 0;
  int32_t group_count = 0;
  int32_t slots = 0;
  friend bool operator==(const DevicePlan&, const DevicePlan&) = default;
};

// Of queries: the storage type; f16 for codes, which become f16 on their way to tensor cores.
constexpr DType DecodeQueryType(const KvLayer& layer) {
  return IsQuantised(layer.dtype) ? DType::kF16 : layer.dtype;
}

struct DecodeParams {
  KvLayer layer;        // bf16 or f16. Heads: key_dim = value_dim, one of 16, 32, 64, 80, 96,
                        // 128, 256. e4m3 or int8: 64, 96, 128, 256. Latent, bf16 or f16: 512 + 64.
                        // Offsets and strides multiples of 16, like block addresses; scales' of 4
  int32_t q_heads = 0;  // a multiple of layer.kv_heads
  float scale = 0;
  int32_t window = 0;  // as the plan was made for
  int32_t sinks = 0;

  const void* q = nullptr;  // device [rows][q_heads][layer.key_dim], DecodeQueryType, aligned to 4;
                            // latent: absorbed [latent | rope], aligned to 16
  int64_t q_stride = 0;     // numbers from a row to the next, even; latent: a multiple of 8
  void* out = nullptr;      // device [rows][q_heads][layer.value_dim], written
  int64_t out_stride = 0;   // numbers from a row to the next
  DType out_dtype = DType::kF32;  // kF32 or DecodeQueryType
  float* lse = nullptr;  // device [rows][q_heads], written; natural logarithm. Null: not wanted

  const SequenceChunk* chunks = nullptr;  // device; `blocks` device pointers
  DevicePlan plan;
  std::byte* workspace = nullptr;  // device, DecodeWorkspaceBytes or more, aligned to 16. Its first
                                   // DecodeCounterBytes must be zero and are zero again afterwards
};

size_t DecodeCounterBytes(const DecodeParams& params);
size_t DecodeWorkspaceBytes(const DecodeParams& params);

// DecodePlanOptions::blocks_at_once on the current device. Errors as Decode's, and CUDA's own.
cudaError_t DecodeBlocksAtOnce(const KvLayer& layer, int32_t q_heads, int32_t* blocks);

// cudaErrorInvalidValue for shapes other than those named above; cudaErrorLaunchOutOfResources
// where a block of the device has less than 99 KiB of shared memory and the shape needs more.
cudaError_t Decode(const DecodeParams& params, cudaStream_t stream);

}  // namespace larder::kernels::cuda
