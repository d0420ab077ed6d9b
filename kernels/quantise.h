// One-byte numbers: e4m3 and int8, each row with a scale of its own.
//
//   number = scale * code         scale = largest magnitude of the row / largest code
//
// e4m3 is the 8-bit format without infinities of the OCP specification (OFP8 1.0, section 5.2):
// 448 is the largest number, 0x7f and 0xff are NaN, the smallest step 2^-9. int8 uses -127 to 127.
//
// Thread safety: pure functions.
//
// 1. A row is its codes and its scale and nothing else: the same numbers give the same bytes on
//    every machine. Both divisions are IEEE's, so a GPU that divides so agrees bit by bit.
// 2. A row with a NaN or an infinity comes back as NaN, all of it: its scale is NaN.
// 3. A row of zeros has scale 0, and so has one whose scale would be below 2^-126, the least
//    number that every machine divides by.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "kernels/kv_layout.h"

namespace larder::kernels {

inline constexpr float kE4m3Max = 448;
inline constexpr float kInt8Max = 127;
inline constexpr float kScaleMin = 0x1p-126f;

constexpr float LargestCode(DType dtype) { return dtype == DType::kI8 ? kInt8Max : kE4m3Max; }

// Exact.
constexpr float FromE4m3(uint8_t code) {
  const uint32_t sign = uint32_t{code} >> 7 << 31;
  const uint32_t exponent = code >> 3 & 0xf;
  const uint32_t fraction = code & 7;
  uint32_t bits = (exponent + 120) << 23 | fraction << 20;
  if (exponent == 0) bits = std::bit_cast<uint32_t>(static_cast<float>(fraction) * 0x1p-9f);
  if ((code & 0x7f) == 0x7f) bits = 0x7fc00000;
  return std::bit_cast<float>(sign | bits);
}

// To nearest, ties to even; 448 for what is larger, infinity included; a NaN stays one.
constexpr uint8_t ToE4m3(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 31 << 7;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint8_t>(sign | 0x7f);
  if (bits >= 0x43e00000) return static_cast<uint8_t>(sign | 0x7e);
  if (bits < 0x3c800000) {
    // Below 2^-6 the step is 2^-9, which is the last place of 2^14: the adder rounds.
    const float stepped = std::bit_cast<float>(bits) + 0x1p14f;
    return static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(stepped) - 0x46800000));
  }
  bits += 0x7ffff + (bits >> 20 & 1);
  return static_cast<uint8_t>(sign | ((bits >> 20) - (120 << 3)));
}

// To nearest, ties to even; -127 to 127. A NaN becomes 0: its row's scale says NaN.
constexpr int8_t ToInt8(float x) {
  if (!(x > -kInt8Max)) return x != x ? 0 : -127;
  if (x > kInt8Max) return 127;
  return static_cast<int8_t>((x + 0x1.8p23f) - 0x1.8p23f);  // at 2^23 the last place is 1
}

constexpr float CodeToFloat(DType dtype, uint8_t code) {
  return dtype == DType::kI8 ? static_cast<float>(static_cast<int8_t>(code)) : FromE4m3(code);
}
constexpr uint8_t FloatToCode(DType dtype, float x) {
  return dtype == DType::kI8 ? static_cast<uint8_t>(ToInt8(x)) : ToE4m3(x);
}

// A row's scale from its largest magnitude; NaN from a NaN or an infinity.
constexpr float ScaleFrom(DType dtype, float largest) {
  if (!(largest <= 0x1.fffffep127f)) return std::bit_cast<float>(uint32_t{0x7fc00000});
  const float scale = largest / LargestCode(dtype);
  return scale < kScaleMin ? 0 : scale;
}

// The code of x in a row of this scale.
constexpr uint8_t Quantised(DType dtype, float x, float scale) {
  return scale > 0 ? FloatToCode(dtype, x / scale) : 0;
}

// `count` numbers to codes; returns their scale. `dtype` is quantised.
float QuantiseRow(DType dtype, const float* from, std::byte* codes, int32_t count);

}  // namespace larder::kernels
