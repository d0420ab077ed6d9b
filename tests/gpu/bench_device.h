// What bench.cu measures with and on: times, a kernel that only reads, normal numbers. For nvcc.
//
// Thread safety: none.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels/cuda/device.h"
#include "kernels/cuda/vectors.h"
#include "tests/gpu/check.h"

namespace larder::gpu_tests {

using kernels::DType;

inline constexpr int64_t kFlushBytes = int64_t{256} << 20;
inline constexpr int kRuns = 21;

// ---- What is read.

// Four loads of 16 bytes or more are under way a thread (sm_90a), 128 KiB an SM: by far enough.
static __global__ void __launch_bounds__(256)
    ReadKernel(const uint4* from, int64_t count, uint4* sink) {
  constexpr int kLoads = 8;
  uint4 sum = make_uint4(0, 0, 0, 0);
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const auto add = [&](const uint4& x) {
    sum = make_uint4(sum.x ^ x.x, sum.y ^ x.y, sum.z ^ x.z, sum.w ^ x.w);
  };
  for (; i + (kLoads - 1) * stride < count; i += kLoads * stride) {
    uint4 x[kLoads];
#pragma unroll
    for (int n = 0; n < kLoads; ++n) x[n] = from[i + n * stride];
#pragma unroll
    for (int n = 0; n < kLoads; ++n) add(x[n]);
  }
  for (; i < count; i += stride) add(from[i]);
  // So that reading is not left out.
  if ((sum.x & sum.y & sum.z & sum.w) == 0x9e3779b9) *sink = sum;
}

inline cudaError_t Read(const std::byte* from, int64_t bytes, uint4* sink, cudaStream_t stream) {
  int sms = 0;
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0);
  return kernels::cuda::Launch(ReadKernel, {dim3(sms * 8), dim3(256)}, stream,
                               reinterpret_cast<const uint4*>(from), bytes / 16, sink);
}

// ---- Time.

class Clock {
 public:
  Clock() : flush_(kFlushBytes), sink_(1) {
    Require(cudaStreamCreate(&stream_), "cudaStreamCreate");
    Require(cudaEventCreate(&begin_), "cudaEventCreate");
    Require(cudaEventCreate(&end_), "cudaEventCreate");
  }

  // Median microseconds of launch(stream), which returns a cudaError_t.
  template <typename Launch>
  double Microseconds(Launch&& launch) {
    std::vector<float> runs;
    for (int i = -3; i < kRuns; ++i) {
      Require(Read(flush_.data(), kFlushBytes, sink_.data(), stream_), "a flush");
      Require(cudaEventRecord(begin_, stream_), "cudaEventRecord");
      Require(launch(stream_), "a launch");
      Require(cudaEventRecord(end_, stream_), "cudaEventRecord");
      Require(cudaEventSynchronize(end_), "a kernel");
      float milliseconds = 0;
      Require(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
      if (i >= 0) runs.push_back(milliseconds * 1000);
    }
    std::sort(runs.begin(), runs.end());
    return runs[kRuns / 2];
  }

 private:
  DeviceArray<std::byte> flush_;
  DeviceArray<uint4> sink_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

// ---- What kernels work on.

// A number of a hash, so that a device fills gigabytes with normal numbers by itself and each run
// with the same. Box and Muller.
__device__ inline float NormalOf(uint64_t i) {
  uint64_t x = (i + 1) * 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  x ^= x >> 31;
  const float u = (static_cast<float>(x >> 40) + 1) * 0x1p-24f;
  const float angle = static_cast<float>(x & 0xffffff) * (6.2831853f * 0x1p-24f);
  return sqrtf(-2 * logf(u)) * cosf(angle);
}

// Every 4 bytes two numbers of 16 bits, or four codes.
static __global__ void FillKernel(DType type, uint64_t seed, uint32_t* to, int64_t words) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < words; i += stride) {
    float x[4];
    for (int n = 0; n < 4; ++n) x[n] = NormalOf((seed << 40) + 4 * i + n);
    const float4 codes = make_float4(20 * x[0], 20 * x[1], 20 * x[2], 20 * x[3]);
    to[i] = type == DType::kBf16  ? kernels::cuda::PackBf16(x[0], x[1])
            : type == DType::kF16 ? kernels::cuda::PackF16(x[0], x[1])
            : type == DType::kI8  ? kernels::cuda::PackFourCodes(kernels::cuda::Int8(), codes)
                                  : kernels::cuda::PackFourCodes(kernels::cuda::E4m3(), codes);
  }
}

// Each call with other numbers.
inline void Fill(DType type, void* to, int64_t bytes) {
  static uint64_t seed = 0;
  Require(kernels::cuda::Launch(FillKernel, {dim3(1024), dim3(256)}, nullptr, type, ++seed,
                                static_cast<uint32_t*>(to), bytes / 4),
          "filling");
  Require(cudaDeviceSynchronize(), "filling");
}

// `count` normal numbers of 16 bits.
inline std::unique_ptr<DeviceArray<uint16_t>> Normal(DType type, int64_t count) {
  auto numbers = std::make_unique<DeviceArray<uint16_t>>(count);
  Fill(type, numbers->data(), count * 2);
  return numbers;
}

}  // namespace larder::gpu_tests
