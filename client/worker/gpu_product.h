// GpuProduct: the matrix products of a forward pass on a GPU. cuBLAS in gpu_product_cublas.cc; a
// loop in the tests, where no GPU is.
//
// Thread safety: one call at a time; a call returns before the work is done.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/worker/gpu.h"
#include "kernels/kv_layout.h"

namespace larder::worker {

// out = x W^T, or out += x W^T. Sums are float32.
struct GpuProductParams {
  kernels::DType type = kernels::DType::kBf16;     // of x and weight: bf16 or f16
  const void* x = nullptr;                         // device [rows][inputs]
  int64_t x_stride = 0;                            // numbers from a row to the next
  const void* weight = nullptr;                    // device [outputs][inputs], contiguous
  kernels::DType out_type = kernels::DType::kF32;  // kF32 or `type`
  void* out = nullptr;                             // device [rows][outputs]
  int64_t out_stride = 0;
  int32_t rows = 0;
  int32_t inputs = 0;
  int32_t outputs = 0;
  bool add = false;
};

class GpuProduct {
 public:
  // On the stream of `gpu`, which outlives it.
  static absl::StatusOr<std::unique_ptr<GpuProduct>> Create(Gpu& gpu);
  virtual ~GpuProduct() = default;

  // May be captured (Gpu::Capture). Errors go to the Gpu.
  virtual void Multiply(const GpuProductParams& params) = 0;
  virtual std::string library() const = 0;  // with its version, for ForwardPass::arithmetic
};

}  // namespace larder::worker
