// Four numbers at a time between memory and float32 registers, whatever they are stored as; codes
// to f16.
//
// Thread safety: device functions.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/numbers.h"
#include "kernels/quantise.h"

namespace larder::kernels::cuda {

// Codes, see quantise.h.
struct E4m3 {
  static constexpr DType kType = DType::kF8E4M3;
  uint8_t bits;
};
struct Int8 {
  static constexpr DType kType = DType::kI8;
  int8_t number;
};

template <typename S>
inline constexpr bool kIsQuantised = false;
template <>
inline constexpr bool kIsQuantised<E4m3> = true;
template <>
inline constexpr bool kIsQuantised<Int8> = true;

// Four numbers as they are stored. Apart from what they mean, so that a load need not be waited for
// where it is asked for.
template <typename T>
using FourBits = std::conditional_t<sizeof(T) == 4, float4, uint2>;

template <typename T>
__device__ inline FourBits<T> LoadFourBits(const T* from) {
  return *reinterpret_cast<const FourBits<T>*>(from);
}
template <typename T>
__device__ inline float4 FourOf(FourBits<T> bits) {
  if constexpr (sizeof(T) == 4) {
    return bits;
  } else {
    const float2 a = Unpack<T>(bits.x);
    const float2 b = Unpack<T>(bits.y);
    return make_float4(a.x, a.y, b.x, b.y);
  }
}
template <typename T>
__device__ inline float4 LoadFour(const T* from) {
  return FourOf<T>(LoadFourBits(from));
}

// To nearest, ties to even.
template <typename T>
__device__ inline void StoreFour(T* to, float4 x) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(to) = x;
  } else {
    *reinterpret_cast<uint2*>(to) = make_uint2(Pack<T>(x.x, x.y), Pack<T>(x.z, x.w));
  }
}

__device__ inline uint32_t PackFourCodes(E4m3, float4 x) {
#if defined(LARDER_EMULATED_GPU) || __CUDA_ARCH__ >= 890
  return PackE4m3(x.x, x.y) | uint32_t{PackE4m3(x.z, x.w)} << 16;
#else
  return ToE4m3(x.x) | uint32_t{ToE4m3(x.y)} << 8 | uint32_t{ToE4m3(x.z)} << 16 |
         uint32_t{ToE4m3(x.w)} << 24;
#endif
}
__device__ inline uint32_t PackFourCodes(Int8, float4 x) {
  const auto byte = [](float code) { return uint32_t{static_cast<uint8_t>(ToInt8(code))}; };
  return byte(x.x) | byte(x.y) << 8 | byte(x.z) << 16 | byte(x.w) << 24;
}

// Two codes, the first in the low byte, as f16; exact.
__device__ inline uint32_t F16x2Of(E4m3, uint32_t codes) {
#if defined(LARDER_EMULATED_GPU) || __CUDA_ARCH__ >= 890
  return F16x2FromE4m3x2(static_cast<uint16_t>(codes));
#else
  return PackF16(FromE4m3(static_cast<uint8_t>(codes)), FromE4m3(static_cast<uint8_t>(codes >> 8)));
#endif
}
__device__ inline uint32_t F16x2Of(Int8, uint32_t codes) {
  return PackF16(static_cast<float>(static_cast<int8_t>(codes)),
                 static_cast<float>(static_cast<int8_t>(codes >> 8)));
}

__device__ inline float LargestOf(float4 x) {
  return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
}

// 0 for finite numbers, else NaN. A maximum would not carry a NaN along.
__device__ inline float NanUnlessFinite(float4 x) { return x.x * 0 + x.y * 0 + x.z * 0 + x.w * 0; }

}  // namespace larder::kernels::cuda
