// Four lanes of whatever the compiler may assume: SSE2, NEON, or scalar code.
#include "kernels/variant_table.h"

namespace larder::kernels {
namespace {

// IEEE binary16 to binary32, exact.
float FromHalf(uint16_t half) {
  const uint32_t sign = uint32_t{half} >> 15 << 31;
  const uint32_t exponent = half >> 10 & 0x1f;
  const uint32_t mantissa = half & 0x3ff;
  uint32_t bits = 0;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
  } else if (exponent == 0x1f) {
    bits = 0x7f800000 | mantissa << 13;
  } else {
    bits = (exponent + 112) << 23 | mantissa << 13;
  }
  bits |= sign;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Nearest, ties to even: adding a power of two whose last place is that of the result lets the
// adder round.
uint16_t ToHalf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t sign = bits >> 31 << 15;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (bits >> 13 & 0x3ff));
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // from 65520 on
  if (bits < 0x38800000) {  // below 2^-14: subnormal, last place 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13));
}

// e4m3 to binary32, in units of kE4m3Unit: as binary16, whose fields are wider. 0x7f is NaN.
// quantise.h's own may not be called here (variant.h, rule 1).
float FromE4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7f;
  const uint32_t half = magnitude == 0x7f ? 0x7e00 : magnitude << 7;
  return FromHalf(static_cast<uint16_t>((code & 0x80) << 8 | half));
}

uint16_t ToBfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Vec {
  using F = float __attribute__((vector_size(16)));
  using I = int32_t __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kValueVecs = 2;
  // Codes are widened one by one.
  static constexpr int DirectRows(DType dtype) {
    return dtype == DType::kI8 || dtype == DType::kF8E4M3 ? 0 : 4;
  }

  static F Zero() { return F{}; }
  static F Set(float x) { return F{x, x, x, x}; }
  static F Load(const float* from) {
    F x;
    std::memcpy(&x, from, sizeof(x));
    return x;
  }
  static void Store(float* to, F x) { std::memcpy(to, &x, sizeof(x)); }
  static float First(F x) { return x[0]; }

  static F Add(F a, F b) { return a + b; }
  static F Sub(F a, F b) { return a - b; }
  static F Mul(F a, F b) { return a * b; }
  static F Div(F a, F b) { return a / b; }
  static F Max(F a, F b) { return Choose(a > b, a, b); }
  static F Min(F a, F b) { return Choose(a < b, a, b); }
  // Two roundings: a fused operation would be a call on machines without one.
  static F Fma(F a, F b, F c) { return a * b + c; }
  static F Fnma(F a, F b, F c) { return c - a * b; }
  // For |x| < 2^22: at this size the last place is 1.
  static F Round(F x) { return (x + Set(0x1.8p23f)) - Set(0x1.8p23f); }
  static F Scale(F x, F n) {
    const I exponent = __builtin_convertvector(n, I) + 127;
    return x * reinterpret_cast<F>(exponent << 23);
  }
  static F ZeroBelow(F y, F x, F bound) { return Choose(x < bound, Zero(), y); }
  static float SumOf(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  static float MaxOf(F x) {
    float most = x[0];
    for (int i = 1; i < kLanes; ++i) most = most > x[i] ? most : x[i];
    return most;
  }

  template <DType D>
  static F LoadAs(const std::byte* from) {
    F x;
    if constexpr (D == DType::kF32) {
      std::memcpy(&x, from, sizeof(x));
    } else if constexpr (D == DType::kI8 || D == DType::kF8E4M3) {
      uint8_t codes[kLanes];
      std::memcpy(codes, from, sizeof(codes));
      for (int i = 0; i < kLanes; ++i) {
        x[i] = D == DType::kI8 ? static_cast<int8_t>(codes[i]) : FromE4m3(codes[i]);
      }
    } else {
      uint16_t halves[kLanes];
      std::memcpy(halves, from, sizeof(halves));
      if constexpr (D == DType::kF16) {
        for (int i = 0; i < kLanes; ++i) x[i] = FromHalf(halves[i]);
      } else {
        const I words = {halves[0], halves[1], halves[2], halves[3]};
        x = reinterpret_cast<F>(words << 16);
      }
    }
    return x;
  }

  template <DType D>
  static void StoreAs(std::byte* to, F x) {
    if constexpr (D == DType::kF32) {
      std::memcpy(to, &x, sizeof(x));
    } else {
      uint16_t halves[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        halves[i] = D == DType::kF16 ? ToHalf(x[i]) : ToBfloat(x[i]);
      }
      std::memcpy(to, halves, sizeof(halves));
    }
  }

  static void LoadE4m3(const std::byte* from, F (&to)[2]) {
    for (int half = 0; half < 2; ++half) {
      F x = Zero();
      for (int i = 0; i < kLanes; ++i) x[i] = FromE4m3(static_cast<uint8_t>(from[2 * i + half]));
      to[half] = x;
    }
  }

  static F FirstBf16(const std::byte* from) { return LoadAs<DType::kBf16>(from); }
  static F LastBf16(const std::byte* from) { return LoadAs<DType::kBf16>(from + 8); }

  [[gnu::always_inline]] static F SumsOf(F (&x)[4]) {
    const F a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5) +
                __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
    const F b = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5) +
                __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
    return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  }

 private:
  static F Choose(I which, F yes, F no) {
    return reinterpret_cast<F>((which & reinterpret_cast<I>(yes)) |
                               (~which & reinterpret_cast<I>(no)));
  }
};

}  // namespace

constinit const Variant kPortableVariant = TableOf<Vec>();

}  // namespace larder::kernels
