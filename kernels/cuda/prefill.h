// Prefill attention on the GPU: chunks of queries over K/V in blocks, a cached prefix and the
// chunk's own keys alike (Append comes first). MHA to MQA. The formula, windows, sinks and what a
// row sees are those of kernels/attention.h.
//
//   block    tile_rows pairs (token, q head of the group) of one chunk, one kv head
//   warp     16 or 32 of the pairs, against all keys of the tile, 64 at a time (32 for large heads)
//   S = Q K^T and O += P V on tensor cores, S and P in registers; keys and values of the next
//   tile are on their way while this one is worked on
//
// Thread safety: host functions that launch on `stream`; calls share nothing but what they are
// given.
//
// 1. Nothing is read but keys and values that some row of the tile sees. A masked token has weight
//    zero; as zero times infinity is NaN, a value that is not finite reaches all rows of a tile
//    that has one which sees it.
// 2. Scores and sums are float32; weights are rounded to the storage type before they meet the
//    values, to f16 where these are codes.
// 3. A row's keys are taken in tiles that are counted from position 0, each by the same operations,
//    and a tile in which a row sees nothing changes no bit of it: its result does not depend on the
//    chunk, the batch or the tile it is in.
// 4. Nothing is allocated, nothing is waited for. Partial results over ranges of keys merge by lse.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "kernels/cuda/prefill_plan.h"
#include "kernels/kv_layout.h"

namespace larder::kernels::cuda {

// A PrefillPlan whose tiles were copied to the device.
struct DevicePrefillPlan {
  const PrefillTile* tiles = nullptr;  // device [tile_count]
  int32_t tile_count = 0;
  int32_t tile_rows = 0;
  friend bool operator==(const DevicePrefillPlan&, const DevicePrefillPlan&) = default;
};

// Of queries: the storage type; f16 for codes, which become f16 on their way to tensor cores.
constexpr DType PrefillQueryType(const KvLayer& layer) {
  return IsQuantised(layer.dtype) ? DType::kF16 : layer.dtype;
}

struct PrefillParams {
  KvLayer layer;        // key_dim = value_dim: of bf16 or f16 one of 16, 32, 64, 80, 96, 128, 256,
                        // of e4m3 or int8 one of 64, 96, 128, 256. Offsets and strides multiples
                        // of 16 bytes, like block addresses; scales' of 4
  int32_t q_heads = 0;  // a multiple of layer.kv_heads
  float scale = 0;
  int32_t window = 0;
  int32_t sinks = 0;
  int32_t key_begin = 0;
  int32_t key_end = std::numeric_limits<int32_t>::max();

  const void* q = nullptr;  // device [rows][q_heads][key_dim], PrefillQueryType, aligned to 16
  int64_t q_stride = 0;     // numbers from a row to the next, a multiple of 8
  void* out = nullptr;      // device [rows][q_heads][value_dim], written, aligned to 8
  int64_t out_stride = 0;   // numbers from a row to the next, even
  DType out_dtype = DType::kF32;  // kF32 or PrefillQueryType
  float* lse = nullptr;  // device [rows][q_heads], written; natural logarithm. Null: not wanted

  const SequenceChunk* chunks = nullptr;  // device; `blocks` device pointers
  DevicePrefillPlan plan;                 // made for these chunks and this shape
};

// cudaErrorInvalidValue for shapes other than those named above; cudaErrorLaunchOutOfResources
// where the device has too little shared memory: heads of 256 where a block has 99 KiB (sm_86,
// sm_89, sm_120), nothing where it has 163 KiB or more.
cudaError_t Prefill(const PrefillParams& params, cudaStream_t stream);

}  // namespace larder::kernels::cuda
