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
// What every GPU since sm_80 allows a block: sm_86, sm_89 and sm_120. Others allow 163 KiB or more.
inline constexpr size_t kSharedBytesEverywhere = 99 * 1024;
// What StaticShared takes of it, at most.
inline constexpr size_t kStaticSharedBytesMax = 6 * 1024;

constexpr __host__ __device__ int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// Rows of kChunks chunks each, copied by kThreads threads together: what thread `mine` of them does
// in turn `i`. Where a turn is of whole rows the chunk and the row's part that differs by thread
// are the same in all turns, which the compiler does not find out from one division a turn.
struct RowChunk {
  unsigned row;
  unsigned chunk;
};
template <unsigned kThreads, unsigned kChunks>
__device__ RowChunk RowChunkOf(unsigned i, unsigned mine) {
  if constexpr (kThreads % kChunks == 0) {
    return {i * (kThreads / kChunks) + mine / kChunks, mine % kChunks};
  } else {
    return {(i * kThreads + mine) / kChunks, (i * kThreads + mine) % kChunks};
  }
}

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
  static_assert(sizeof(T) < kStaticSharedBytesMax);
  __shared__ T storage;
  return storage;
#endif
}

struct LaunchShape {
  dim3 blocks = 1;
  dim3 threads = 1;
  size_t shared_bytes = 0;
};

// Errors are results here; left in the thread's last error, this one would be taken for a later
// call's.
inline cudaError_t Handled(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

// Shared memory that a block may ask for on the current device, what StaticShared takes included;
// 0 where the device does not say.
inline size_t SharedBytesMax() {
  int device = 0;
  int bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  return Handled(error) == cudaSuccess ? bytes : 0;
}

// More shared memory than kSharedBytesFree has to be asked for, once a kernel and device; asking is
// cheap. Such kernels want all of an SM's as shared memory: as many blocks as fit, and they read
// past level 1. cudaErrorLaunchOutOfResources: the device does not have as much.
template <typename... Params>
cudaError_t AllowShared([[maybe_unused]] void (*kernel)(Params...), size_t shared_bytes) {
  if (shared_bytes <= kSharedBytesFree) return cudaSuccess;
  if (shared_bytes > SharedBytesMax()) return cudaErrorLaunchOutOfResources;
#if !defined(LARDER_EMULATED_GPU)
  const auto* const function = reinterpret_cast<const void*>(kernel);
  const cudaError_t error = cudaFuncSetAttribute(
      function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  // The kernel and the attribute are right, so it is the number, with what is static.
  if (error == cudaErrorInvalidValue) return cudaErrorLaunchOutOfResources;
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
#else
  return cudaSuccess;
#endif
}

// f(Shape()), or of the first of Shape::Smaller and its own that fits into the current device.
template <typename Shape, typename F>
auto WithFittingShape(F f) {
  if constexpr (Shape::kSharedBytes + kStaticSharedBytesMax > kSharedBytesEverywhere) {
    if (Shape::kSharedBytes + kStaticSharedBytesMax > SharedBytesMax()) {
      return WithFittingShape<typename Shape::Smaller>(f);
    }
  }
  return f(Shape());
}

// Blocks of this shape that the current device holds at a time.
template <typename... Params>
cudaError_t BlocksAtOnce([[maybe_unused]] void (*kernel)(Params...),
                         [[maybe_unused]] const LaunchShape& shape, int* blocks) {
  cudaError_t error = AllowShared(kernel, shape.shared_bytes);
#if defined(LARDER_EMULATED_GPU)
  *blocks = 8;
#else
  int device = 0;
  int sms = 0;
  int blocks_per_sm = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &blocks_per_sm, kernel, static_cast<int>(shape.threads.x), shape.shared_bytes);
  }
  *blocks = sms * blocks_per_sm;
#endif
  return Handled(error);
}

// kernel<<<shape>>>(args...); the result says whether it was launched, not whether it will succeed,
// and nothing of what went wrong before. An empty grid launches nothing. Only in .cu files.
template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), const LaunchShape& shape,
                   [[maybe_unused]] cudaStream_t stream, Args&&... args) {
  if (shape.blocks.x == 0 || shape.blocks.y == 0 || shape.blocks.z == 0) return cudaSuccess;
  const cudaError_t error = AllowShared(kernel, shape.shared_bytes);
  if (error != cudaSuccess) return Handled(error);
#if defined(LARDER_EMULATED_GPU)
  emulation::Enqueue([=] {
    emulation::RunGrid(shape.blocks, shape.threads, shape.shared_bytes, [&] { kernel(args...); });
  });
  return cudaSuccess;
#elif defined(__CUDACC__)
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  return Handled(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
#else
  static_assert(sizeof...(Params) < 0, "Launch is for sources that nvcc compiles");
#endif
}

}  // namespace larder::kernels::cuda
