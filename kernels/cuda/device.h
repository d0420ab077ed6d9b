// What every kernel here is written in: CUDA C++, of which a host compiler reads the same text when
// LARDER_EMULATED_GPU is defined (tests/gpu/emulation). Kernels use no inline PTX but through
// ptx.h, no shared memory but through this header, and warp functions with all 32 lanes.
//
// Thread safety: Launch like a CUDA launch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace larder::kernels::cuda {

inline constexpr int kWarpLanes = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
// What a launch may ask for without an attribute of the kernel.
inline constexpr size_t kSharedBytesFree = 48 * 1024;

constexpr __host__ __device__ int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// The shared memory that the launch asked for, aligned to 128 bytes.
__device__ inline std::byte* DynamicShared() {
#if defined(LARDER_EMULATED_GPU)
  return emulation::DynamicShared();
#else
  extern __shared__ __align__(128) std::byte larder_dynamic_shared[];
  return larder_dynamic_shared;
#endif
}

// A T in shared memory, the same one for each use of the same T in a block; its contents are
// whatever lay there. T is a struct of numbers and arrays, one of its own for each purpose.
template <typename T>
__device__ T& StaticShared() {
#if defined(LARDER_EMULATED_GPU)
  static const char key = 0;
  return *reinterpret_cast<T*>(emulation::StaticShared(&key, sizeof(T)));
#else
  __shared__ T storage;
  return storage;
#endif
}

struct LaunchShape {
  dim3 blocks = 1;
  dim3 threads = 1;
  size_t shared_bytes = 0;
};

// More shared memory than kSharedBytesFree has to be asked for, once a kernel and device; asking is
// cheap.
template <typename... Params>
cudaError_t AllowShared([[maybe_unused]] void (*kernel)(Params...),
                        [[maybe_unused]] size_t shared_bytes) {
#if !defined(LARDER_EMULATED_GPU)
  if (shared_bytes > kSharedBytesFree) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(shared_bytes));
  }
#endif
  return cudaSuccess;
}

// Blocks of this shape that the current device holds at a time.
template <typename... Params>
cudaError_t BlocksAtOnce([[maybe_unused]] void (*kernel)(Params...),
                         [[maybe_unused]] const LaunchShape& shape, int* blocks) {
#if defined(LARDER_EMULATED_GPU)
  *blocks = 8;
  return cudaSuccess;
#else
  int device = 0;
  int sms = 0;
  int blocks_per_sm = 0;
  cudaError_t error = AllowShared(kernel, shape.shared_bytes);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &blocks_per_sm, kernel, static_cast<int>(shape.threads.x), shape.shared_bytes);
  }
  *blocks = sms * blocks_per_sm;
  return error;
#endif
}

// kernel<<<shape>>>(args...); the result says whether it was launched, not whether it will succeed.
// An empty grid launches nothing. Only in .cu files.
template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), const LaunchShape& shape,
                   [[maybe_unused]] cudaStream_t stream, Args&&... args) {
  if (shape.blocks.x == 0 || shape.blocks.y == 0 || shape.blocks.z == 0) return cudaSuccess;
#if defined(LARDER_EMULATED_GPU)
  emulation::Enqueue([=] {
    emulation::RunGrid(shape.blocks, shape.threads, shape.shared_bytes, [&] { kernel(args...); });
  });
  return cudaSuccess;
#elif defined(__CUDACC__)
  const cudaError_t error = AllowShared(kernel, shape.shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<shape.blocks, shape.threads, shape.shared_bytes, stream>>>(std::forward<Args>(args)...);
  return cudaGetLastError();
#else
  static_assert(sizeof...(Params) < 0, "Launch is for sources that nvcc compiles");
#endif
}

}  // namespace larder::kernels::cuda
