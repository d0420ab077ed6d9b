// Numbers of storage on the device: bf16 and f16 by their bits, and what kernels do with them.
//
// Thread safety: device functions.
#pragma once

#include <cstdint>

#include "kernels/cuda/ptx.h"

namespace larder::kernels::cuda {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

__device__ inline float ToFloat(float x) { return x; }
__device__ inline float ToFloat(Bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ inline float ToFloat(F16 x) { return F16ToFloat(x.bits); }

// To nearest, ties to even.
template <typename T>
__device__ T FromFloat(float x);
template <>
__device__ inline float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ inline Bf16 FromFloat<Bf16>(float x) {
  return {static_cast<uint16_t>(PackBf16(x, 0))};
}
template <>
__device__ inline F16 FromFloat<F16>(float x) {
  return {static_cast<uint16_t>(PackF16(x, 0))};
}

// Two in a register, the first in the low half.
template <typename T>
__device__ uint32_t Pack(float low, float high);
template <>
__device__ inline uint32_t Pack<Bf16>(float low, float high) {
  return PackBf16(low, high);
}
template <>
__device__ inline uint32_t Pack<F16>(float low, float high) {
  return PackF16(low, high);
}
template <typename T>
__device__ float2 Unpack(uint32_t packed);
template <>
__device__ inline float2 Unpack<Bf16>(uint32_t packed) {
  return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
}
template <>
__device__ inline float2 Unpack<F16>(uint32_t packed) {
  return make_float2(F16ToFloat(packed), F16ToFloat(packed >> 16));
}

// d += a * b, see ptx.h.
template <typename T>
__device__ void Mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void Mma<Bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaBf16(d, a, b);
}
template <>
__device__ inline void Mma<F16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaF16(d, a, b);
}

__device__ inline float NegativeInfinity() { return __uint_as_float(0xff800000u); }

}  // namespace larder::kernels::cuda
