// Bf16: the upper half of a float32.
//
// Thread safety: free functions.
#pragma once

#include <bit>
#include <cstdint>

namespace larder::worker {

// Rounded to nearest, ties to even. A NaN stays one.
inline uint16_t ToBf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7fff'ffff) > 0x7f80'0000 ? quiet : rounded);
}

inline float FromBf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

}  // namespace larder::worker
