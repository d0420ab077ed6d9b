// kernels/cuda/ptx.h for a host compiler: the same functions, their contracts and layouts taken
// from the PTX ISA, not from that file's users. Products are summed in double and rounded once,
// where hardware truncates partial sums; Exp2 and Log2 are the library's.
//
// Thread safety: as grid.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "tests/gpu/emulation/grid.h"

namespace larder::kernels::cuda {

inline void CopyAsync16(void* to_shared, const void* from, bool read = true) {
  emulation::CopyAsync(to_shared, from, 16, read ? 0 : 16);
}
inline void CopyAsync4(void* to_shared, const void* from, bool read = true) {
  emulation::CopyAsync(to_shared, from, 4, read ? 0 : 4);
}
inline void CopyAsyncCommit() { emulation::CopyAsyncCommit(); }
template <int kPending>
inline void CopyAsyncWait() {
  emulation::CopyAsyncWait(kPending);
}
inline void BarrierSync(int id, int threads) {
  if (threads % emulation::kWarpLanes != 0) emulation::Fail("bar.sync of a part of a warp");
  emulation::BlockBarrier(id, threads);
}

void LoadMatrix4(uint32_t (&r)[4], const void* row);
void LoadMatrix4Transposed(uint32_t (&r)[4], const void* row);
uint32_t TransposeMatrix(uint32_t r);
void MmaBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void MmaF16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

uint32_t PackBf16(float low, float high);
uint32_t PackF16(float low, float high);
float F16ToFloat(uint32_t bits);
uint32_t F16x2FromE4m3x2(uint16_t bits);
uint16_t PackE4m3(float low, float high);

inline float Exp2(float x) { return std::exp2(x); }
inline float Log2(float x) { return std::log2(x); }

}  // namespace larder::kernels::cuda
