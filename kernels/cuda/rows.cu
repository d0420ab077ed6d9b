#include "kernels/cuda/device.h"
#include "kernels/cuda/rows.h"
#include "kernels/cuda/vectors.h"

namespace larder::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnit = 4;  // numbers that a thread has

// Blocks of a row are neighbours.
template <typename From, typename To>
__global__ void __launch_bounds__(kThreads) CopyRowsKernel(CopyRowsParams p, int blocks_of_row) {
  const int row = blockIdx.x / blocks_of_row;
  const int i = kUnit * static_cast<int>(blockIdx.x % blocks_of_row * kThreads + threadIdx.x);
  if (i >= p.dim) return;
  const int64_t from_row = p.indices != nullptr ? p.indices[row] : row;
  const From* const from = static_cast<const From*>(p.from) + from_row * p.from_stride + i;
  StoreFour(static_cast<To*>(p.to) + row * p.to_stride + i, LoadFour(from));
}

template <typename From, typename To>
cudaError_t Run(const CopyRowsParams& p, cudaStream_t stream) {
  const int blocks_of_row = CeilDiv(p.dim, kUnit * kThreads);
  const LaunchShape shape{.blocks = dim3(static_cast<unsigned>(p.rows) * blocks_of_row),
                          .threads = kThreads};
  return Launch(CopyRowsKernel<From, To>, shape, stream, p, blocks_of_row);
}

template <typename From>
cudaError_t RunFrom(const CopyRowsParams& p, cudaStream_t stream) {
  switch (p.to_type) {
    case DType::kF32:
      return Run<From, float>(p, stream);
    case DType::kF16:
      return Run<From, F16>(p, stream);
    case DType::kBf16:
      return Run<From, Bf16>(p, stream);
    case DType::kF8E4M3:
    case DType::kI8:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t CopyRows(const CopyRowsParams& p, cudaStream_t stream) {
  if (p.dim % kUnit != 0 || p.from_stride % kUnit != 0 || p.to_stride % kUnit != 0) {
    return cudaErrorInvalidValue;
  }
  switch (p.from_type) {
    case DType::kF32:
      return RunFrom<float>(p, stream);
    case DType::kF16:
      return RunFrom<F16>(p, stream);
    case DType::kBf16:
      return RunFrom<Bf16>(p, stream);
    case DType::kF8E4M3:
    case DType::kI8:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace larder::kernels::cuda
