// What a transformer layer does to rows besides products and attention.
//
// Thread safety: calls share nothing but what they are given. A row's result is bitwise the same
// whatever other rows come with it.
#pragma once

#include <cstdint>

#include "kernels/cpu.h"

namespace larder::kernels {

// out = x / sqrt(mean of x^2 + epsilon) * weight  (Zhang and Sennrich 2019), float32 throughout.
struct RmsNormParams {
  const float* x = nullptr;       // [rows][dim]
  int64_t x_stride = 0;           // floats from a row to the next
  float* out = nullptr;           // [rows][dim], written; may be x
  int64_t out_stride = 0;         // floats from a row to the next
  const float* weight = nullptr;  // [dim]
  int64_t rows = 0;
  int32_t dim = 0;
  float epsilon = 0;
};
void RmsNorm(const Cpu& cpu, const RmsNormParams& params);

// out = silu(gate) * up, silu(x) = x / (1 + exp(-x)): the middle of a SwiGLU MLP.
struct SiluMulParams {
  const float* gate = nullptr;  // [rows][dim]
  const float* up = nullptr;    // [rows][dim]
  int64_t in_stride = 0;        // floats from a row of gate, and of up, to the next
  float* out = nullptr;         // [rows][dim], written; may be gate or up
  int64_t out_stride = 0;       // floats from a row to the next
  int64_t rows = 0;
  int32_t dim = 0;
};
void SiluMul(const Cpu& cpu, const SiluMulParams& params);

}  // namespace larder::kernels
