// The instructions that CUDA C++ has no name for: asynchronous copies, matrix loads and products,
// conversions. Each is one PTX instruction (or two), documented in NVIDIA's "PTX ISA" under the
// name given here; tests/gpu/emulation/ptx_emulation.h is its twin for a host compiler.
//
// Thread safety: device functions; those marked "warp" are called by all 32 lanes together.
//
// Fragments of a 16x8x16 product, lane = 4 g + t (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//
//   a[0] A[g][2t, 2t+1]      a[1] A[g+8][2t, 2t+1]
//   a[2] A[g][2t+8, 2t+9]    a[3] A[g+8][2t+8, 2t+9]
//   b[0] B[2t, 2t+1][g]      b[1] B[2t+8, 2t+9][g]
//   d[0] D[g][2t]            d[1] D[g][2t+1]
//   d[2] D[g+8][2t]          d[3] D[g+8][2t+1]
//
// A matrix of LoadMatrix is 8 rows of 8 16-bit numbers; lane 8 i + r gives the address of row r of
// matrix i. Lane 4 g + t then holds [g][2t, 2t+1] in r[i]; transposed [2t, 2t+1][g].
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"

#if defined(LARDER_EMULATED_GPU)
#include "tests/gpu/emulation/ptx_emulation.h"
#else

namespace larder::kernels::cuda {

__device__ inline uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// cp.async.cg: 16 bytes past level 1 to shared memory, or zeros without reading `from`.
__device__ inline void CopyAsync16(void* to_shared, const void* from, bool read = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(to_shared)),
               "l"(from), "r"(read ? 16 : 0)
               : "memory");
}
// cp.async.ca: 4 bytes, likewise.
__device__ inline void CopyAsync4(void* to_shared, const void* from, bool read = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(SharedAddress(to_shared)),
               "l"(from), "r"(read ? 4 : 0)
               : "memory");
}
__device__ inline void CopyAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Returns when all but the last kPending groups that this thread committed have arrived.
template <int kPending>
__device__ inline void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// bar.sync: `threads` of the block, a multiple of 32, wait for each other at barrier `id` in
// [1, 16); __syncthreads has 0.
__device__ inline void BarrierSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ldmatrix .x4 and .x2 (warp). Rows are aligned to 16 bytes.
__device__ inline void LoadMatrix4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}
__device__ inline void LoadMatrix4Transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// movmatrix (warp): a matrix of which lane 4 g + t holds [g][2t, 2t+1], transposed.
__device__ inline uint32_t TransposeMatrix(uint32_t r) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(r));
  return transposed;
}

// mma.m16n8k16 (warp): d += a * b, float32 sums.
__device__ inline void MmaBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void MmaF16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// cvt.rn: two float32 to 16 bits each, to nearest, ties to even; `low` in the low half.
__device__ inline uint32_t PackBf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ inline uint32_t PackF16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
// cvt.f32.f16, of the low half.
__device__ inline float F16ToFloat(uint32_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
}

// ex2.approx and lg2.approx: relative error 2^-22; of -infinity 0, of 0 -infinity.
__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float Log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#if __CUDA_ARCH__ >= 890
// cvt.rn.f16x2.e4m3x2, exact, and cvt.rn.satfinite.e4m3x2.f32 (past 448: 448).
__device__ inline uint32_t F16x2FromE4m3x2(uint16_t bits) {
  uint32_t packed;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(packed) : "h"(bits));
  return packed;
}
__device__ inline uint16_t PackE4m3(float low, float high) {
  uint16_t packed;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
  return packed;
}
#endif

}  // namespace larder::kernels::cuda

#endif
