// Results over disjoint sets of keys, merged: kernels/attention.h's MergeAttention on the GPU, for
// parts that were computed apart (a shared prefix, a chunk, another device's keys).
//
// Thread safety: a host function that launches on `stream`.
//
// 1. Merged from part 0 on in float32; where all lse are -infinity, out is 0 and lse -infinity. A
// part
//    whose lse is -infinity has no say, whatever lies in its out.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace larder::kernels::cuda {

inline constexpr int32_t kMergePartsMax = 16;

struct MergeParams {
  int32_t parts = 0;                       // 1 to kMergePartsMax
  int64_t rows = 0;                        // tokens times q heads
  int32_t dim = 0;                         // numbers in a value
  const float* outs[kMergePartsMax] = {};  // each device [rows][dim]
  const float* lses[kMergePartsMax] = {};  // each device [rows], natural logarithms
  float* out = nullptr;                    // device [rows][dim], written; may be outs[0]
  float* lse = nullptr;  // device [rows], written; may be lses[0]; null: not wanted
};

// cudaErrorInvalidValue for a number of parts outside of its bounds.
cudaError_t MergeAttention(const MergeParams& params, cudaStream_t stream);

}  // namespace larder::kernels::cuda
