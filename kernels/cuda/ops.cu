#include "kernels/cuda/device.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/vectors.h"

namespace larder::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpLanes;
constexpr int kUnit = 4;  // numbers that a thread has at a time

struct WarpSums {
  float of[kWarps];
};

__device__ inline float SumOfWarp(float x) {
#pragma unroll
  for (int bit = 1; bit < kWarpLanes; bit *= 2) x += __shfl_xor_sync(kAllLanes, x, bit);
  return x;
}

// The block's sum, the same bits in every thread: warps are added in their order.
__device__ inline float SumOfBlock(float x) {
  WarpSums& sums = StaticShared<WarpSums>();
  x = SumOfWarp(x);
  if (threadIdx.x % kWarpLanes == 0) sums.of[threadIdx.x / kWarpLanes] = x;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += sums.of[warp];
  return total;
}

template <typename T>
struct RmsNormArgs {
  const T* x;
  T* out;
  const T* weight;
  int64_t x_stride;
  int64_t out_stride;
  int32_t dim;
  float epsilon;
};

// A block a row. It is read twice, the second time from level 1 or 2.
template <typename T>
__global__ void __launch_bounds__(kThreads) RmsNormKernel(RmsNormArgs<T> args) {
  const T* const x = args.x + blockIdx.x * args.x_stride;
  T* const out = args.out + blockIdx.x * args.out_stride;
  const int first = kUnit * static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int i = first; i < args.dim; i += kUnit * kThreads) {
    const float4 part = LoadFour(x + i);
    sum =
        fmaf(part.x, part.x, fmaf(part.y, part.y, fmaf(part.z, part.z, fmaf(part.w, part.w, sum))));
  }
  const float mean = SumOfBlock(sum) / static_cast<float>(args.dim);
  const float factor = 1.0f / sqrtf(mean + args.epsilon);
  for (int i = first; i < args.dim; i += kUnit * kThreads) {
    const float4 part = LoadFour(x + i);
    const float4 weight = LoadFour(args.weight + i);
    StoreFour(out + i, make_float4(part.x * factor * weight.x, part.y * factor * weight.y,
                                   part.z * factor * weight.z, part.w * factor * weight.w));
  }
}

template <typename T>
struct SiluMulArgs {
  const T* gate;
  const T* up;
  T* out;
  int64_t in_stride;
  int64_t out_stride;
  int32_t dim;
};

// Large -x make exp infinite and the quotient -0, which is right to float32.
__device__ inline float Silu(float x) { return x / (1.0f + expf(-x)); }

// Blocks of a row are neighbours.
template <typename T>
__global__ void __launch_bounds__(kThreads) SiluMulKernel(SiluMulArgs<T> args, int blocks_of_row) {
  const int64_t row = blockIdx.x / blocks_of_row;
  const int i = kUnit * static_cast<int>(blockIdx.x % blocks_of_row * kThreads + threadIdx.x);
  if (i >= args.dim) return;
  const float4 gate = LoadFour(args.gate + row * args.in_stride + i);
  const float4 up = LoadFour(args.up + row * args.in_stride + i);
  StoreFour(args.out + row * args.out_stride + i,
            make_float4(Silu(gate.x) * up.x, Silu(gate.y) * up.y, Silu(gate.z) * up.z,
                        Silu(gate.w) * up.w));
}

template <typename T>
cudaError_t RmsNormAs(const RmsNormParams& params, cudaStream_t stream) {
  const RmsNormArgs<T> args{.x = static_cast<const T*>(params.x),
                            .out = static_cast<T*>(params.out),
                            .weight = static_cast<const T*>(params.weight),
                            .x_stride = params.x_stride,
                            .out_stride = params.out_stride,
                            .dim = params.dim,
                            .epsilon = params.epsilon};
  const LaunchShape shape{.blocks = dim3(static_cast<unsigned>(params.rows)), .threads = kThreads};
  return Launch(RmsNormKernel<T>, shape, stream, args);
}

template <typename T>
cudaError_t SiluMulAs(const SiluMulParams& params, cudaStream_t stream) {
  const SiluMulArgs<T> args{.gate = static_cast<const T*>(params.gate),
                            .up = static_cast<const T*>(params.up),
                            .out = static_cast<T*>(params.out),
                            .in_stride = params.in_stride,
                            .out_stride = params.out_stride,
                            .dim = params.dim};
  const int blocks_of_row = CeilDiv(params.dim, kUnit * kThreads);
  const LaunchShape shape{.blocks = dim3(static_cast<unsigned>(params.rows) * blocks_of_row),
                          .threads = kThreads};
  return Launch(SiluMulKernel<T>, shape, stream, args, blocks_of_row);
}

}  // namespace

cudaError_t RmsNorm(const RmsNormParams& params, cudaStream_t stream) {
  if (params.dim % kUnit != 0 || params.x_stride % kUnit != 0 || params.out_stride % kUnit != 0) {
    return cudaErrorInvalidValue;
  }
  switch (params.type) {
    case DType::kF32:
      return RmsNormAs<float>(params, stream);
    case DType::kF16:
      return RmsNormAs<F16>(params, stream);
    case DType::kBf16:
      return RmsNormAs<Bf16>(params, stream);
    case DType::kF8E4M3:
    case DType::kI8:
      break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t SiluMul(const SiluMulParams& params, cudaStream_t stream) {
  if (params.dim % kUnit != 0 || params.in_stride % kUnit != 0 || params.out_stride % kUnit != 0) {
    return cudaErrorInvalidValue;
  }
  switch (params.type) {
    case DType::kF32:
      return SiluMulAs<float>(params, stream);
    case DType::kF16:
      return SiluMulAs<F16>(params, stream);
    case DType::kBf16:
      return SiluMulAs<Bf16>(params, stream);
    case DType::kF8E4M3:
    case DType::kI8:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace larder::kernels::cuda
