// The part of CUDA that our kernels, their launches and their tests use, for a host compiler and a
// machine without CUDA. Builds that find this file instead of the toolkit's define
// LARDER_EMULATED_GPU. Device memory is host memory, a stream runs everything at once (stream.h).
//
// Thread safety: none; one thread launches.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "tests/gpu/emulation/grid.h"
#include "tests/gpu/emulation/stream.h"

#if !defined(LARDER_EMULATED_GPU)
#error "emulation/cuda_runtime.h is found, but LARDER_EMULATED_GPU is not defined"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// ---- Vector types, as large and as aligned as CUDA's.
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- What a thread may ask and do. threadIdx and its kin are in grid.h.
using std::max;
using std::min;
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
// Byte i of the result is byte (selector >> 4 i & 7) of the eight of b:a.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned got = 0;
  for (int i = 0; i < 4; ++i) got |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return got;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __syncthreads() { larder::emulation::BlockBarrier(0, 0); }

// A fiber is left only where it waits, so plain reads and writes are atomic.
template <typename T>
T atomicAdd(T* at, T x) {
  const T old = *at;
  *at = old + x;
  return old;
}
template <typename T>
T atomicMax(T* at, T x) {
  const T old = *at;
  *at = std::max(old, x);
  return old;
}
template <typename T>
T atomicExch(T* at, T x) {
  const T old = *at;
  *at = x;
  return old;
}
template <typename T>
T atomicCAS(T* at, T expected, T x) {
  const T old = *at;
  if (old == expected) *at = x;
  return old;
}
// Counts up to `last` and then starts at 0 again.
inline unsigned atomicInc(unsigned* at, unsigned last) {
  const unsigned old = *at;
  *at = old >= last ? 0 : old + 1;
  return old;
}

// ---- Warps. `mask` must be of all 32 lanes.
inline void __syncwarp(unsigned mask = 0xffffffffu) { larder::emulation::WarpBarrier(mask); }
template <typename T>
T __shfl_sync(unsigned mask, T x, int lane, int width = 32) {
  return larder::emulation::Shuffle(
      mask, x, width, [lane](int self, int w) { return (self & ~(w - 1)) | (lane & (w - 1)); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
  return larder::emulation::Shuffle(mask, x, width, [bits](int self, int w) {
    const int from = self ^ bits;
    return (from & ~(w - 1)) == (self & ~(w - 1)) ? from : self;
  });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T x, int by, int width = 32) {
  return larder::emulation::Shuffle(mask, x, width, [by](int self, int w) {
    return (self & (w - 1)) + by < w ? self + by : self;
  });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, int by, int width = 32) {
  return larder::emulation::Shuffle(mask, x, width, [by](int self, int w) {
    return (self & (w - 1)) - by >= 0 ? self - by : self;
  });
}
inline unsigned __ballot_sync(unsigned mask, bool x) { return larder::emulation::Ballot(mask, x); }
inline bool __any_sync(unsigned mask, bool x) { return larder::emulation::Ballot(mask, x) != 0; }
inline bool __all_sync(unsigned mask, bool x) { return larder::emulation::Ballot(mask, x) == mask; }

// ---- The runtime.
using cudaStream_t = struct LarderEmulatedStream*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                         ? "no error"
         : error == cudaErrorInvalidValue             ? "invalid argument"
         : error == cudaErrorLaunchOutOfResources     ? "too many resources requested for launch"
         : error == cudaErrorStreamCaptureUnsupported ? "not permitted when stream is capturing"
         : error == cudaErrorStreamCaptureInvalidated ? "failed due to an error during capture"
                                                      : "out of memory";
}
// Of calls that wait or allocate: CUDA refuses them while the thread captures.
inline cudaError_t OutsideOfCaptures() {
  return larder::emulation::MayInterrupt() ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}
namespace larder::emulation {
inline cudaError_t last_error = cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return std::exchange(larder::emulation::last_error, cudaSuccess);
}
inline cudaError_t cudaDeviceSynchronize() { return OutsideOfCaptures(); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return OutsideOfCaptures(); }
// Aligned like CUDA's, and rounded up no further, so that sanitizers see an overrun.
template <typename T>
cudaError_t cudaMalloc(T** to, size_t bytes) {
  if (OutsideOfCaptures() != cudaSuccess) return cudaErrorStreamCaptureUnsupported;
  void* got = nullptr;
  if (posix_memalign(&got, 256, bytes) != 0) return cudaErrorMemoryAllocation;
  std::memset(got, 0xff, bytes);
  *to = static_cast<T*>(got);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  std::free(p);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  if (bytes != 0) larder::emulation::Enqueue([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t error = OutsideOfCaptures();
  return error == cudaSuccess ? cudaMemcpyAsync(to, from, bytes, kind) : error;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes != 0) larder::emulation::Enqueue([=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  const cudaError_t error = OutsideOfCaptures();
  return error == cudaSuccess ? cudaMemsetAsync(to, value, bytes) : error;
}

#include "tests/gpu/emulation/host_calls.h"
