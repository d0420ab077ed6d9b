// What a transformer layer does to rows besides products and attention: kernels/ops.h with a stream
// in the place of a Cpu. Rows are float32, float16 or bfloat16; sums and products are float32 and
// rounded once, to nearest even, when they are stored.
//
// Thread safety: calls share nothing but what they are given; like a kernel launch they return
// before the work is done. A row's result is bitwise the same whatever other rows come with it.
// cudaErrorInvalidValue: a shape that is not supported, nothing launched.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/kv_layout.h"

namespace larder::kernels::cuda {

// out = x / sqrt(mean of x^2 + epsilon) * weight.
struct RmsNormParams {
  DType type = DType::kBf16;     // of x, out and weight: not quantised
  const void* x = nullptr;       // device [rows][dim]
  int64_t x_stride = 0;          // numbers from a row to the next, a multiple of 4
  void* out = nullptr;           // device [rows][dim], written; may be x
  int64_t out_stride = 0;        // likewise
  const void* weight = nullptr;  // device [dim]
  int32_t rows = 0;
  int32_t dim = 0;  // a multiple of 4
  float epsilon = 0;
};
cudaError_t RmsNorm(const RmsNormParams& params, cudaStream_t stream);

// out = silu(gate) * up, silu(x) = x / (1 + exp(-x)).
struct SiluMulParams {
  DType type = DType::kBf16;   // of all three: not quantised
  const void* gate = nullptr;  // device [rows][dim]
  const void* up = nullptr;    // device [rows][dim]
  int64_t in_stride = 0;       // numbers from a row of gate, and of up, to the next; of 4
  void* out = nullptr;         // device [rows][dim], written; may be gate or up
  int64_t out_stride = 0;      // likewise
  int32_t rows = 0;
  int32_t dim = 0;  // a multiple of 4
};
cudaError_t SiluMul(const SiluMulParams& params, cudaStream_t stream);

}  // namespace larder::kernels::cuda
