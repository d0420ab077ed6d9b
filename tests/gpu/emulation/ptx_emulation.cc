#include "tests/gpu/emulation/ptx_emulation.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace larder::kernels::cuda {
namespace {

using emulation::CheckShared;
using emulation::kWarpLanes;
using emulation::RunCollective;

// A binary format by its fields: `bias` and the number of stored fraction bits.
struct Format {
  int exponent_bits;
  int fraction_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
};
constexpr Format kF16{5, 10};
constexpr Format kBf16{8, 7};
constexpr Format kE4m3{4, 3};

// The magnitude of finite bits without their sign.
double Magnitude(Format f, uint32_t bits) {
  const int exponent = static_cast<int>(bits >> f.fraction_bits);
  const int fraction = static_cast<int>(bits & ((1u << f.fraction_bits) - 1));
  if (exponent == 0) return std::ldexp(fraction, 1 - f.bias() - f.fraction_bits);
  return std::ldexp(fraction + (1 << f.fraction_bits), exponent - f.bias() - f.fraction_bits);
}

// The bits of the nearest number, ties to even, as if exponents had no end.
uint32_t NearestBits(Format f, double magnitude) {
  if (magnitude == 0) return 0;
  const int exponent = std::max(std::ilogb(magnitude), 1 - f.bias());
  const double digits = std::nearbyint(std::ldexp(magnitude, f.fraction_bits - exponent));
  // A leading one carries into the exponent's field, so subnormal numbers need no case.
  return (static_cast<uint32_t>(exponent - 1 + f.bias()) << f.fraction_bits) +
         static_cast<uint32_t>(digits);
}

float ToFloat(Format f, uint32_t bits) {
  const uint32_t sign_bit = 1u << (f.exponent_bits + f.fraction_bits);
  const uint32_t magnitude = bits & (sign_bit - 1);
  const uint32_t infinity = ((1u << f.exponent_bits) - 1) << f.fraction_bits;
  const double sign = (bits & sign_bit) != 0 ? -1 : 1;
  if (magnitude > infinity) return std::numeric_limits<float>::quiet_NaN();
  if (magnitude == infinity) return static_cast<float>(sign * HUGE_VAL);
  return static_cast<float>(sign * Magnitude(f, magnitude));
}

uint32_t FromFloat(Format f, float x) {
  const uint32_t sign = std::signbit(x) ? 1u << (f.exponent_bits + f.fraction_bits) : 0;
  const uint32_t infinity = ((1u << f.exponent_bits) - 1) << f.fraction_bits;
  if (std::isnan(x)) return (1u << (f.exponent_bits + f.fraction_bits)) - 1;
  if (std::isinf(x)) return sign | infinity;
  return sign | std::min(NearestBits(f, std::abs(x)), infinity);
}

// All 65,536 numbers of a 16-bit format: a product of fragments looks up 768.
template <const Format& kFormat>
const float* Table() {
  static const std::vector<float> table = [] {
    std::vector<float> numbers(1 << 16);
    for (uint32_t bits = 0; bits < numbers.size(); ++bits) numbers[bits] = ToFloat(kFormat, bits);
    return numbers;
  }();
  return table.data();
}

// A lane's row is read when that lane comes, not when all have come: a warp's collectives do not
// order its memory, __syncwarp does.
struct Loading {
  uint32_t (*r)[4];
  uint16_t row[8];
  bool transposed;
};

void RunLoad(void* const* lanes) {
  uint16_t matrices[4][8][8];
  for (int i = 0; i < kWarpLanes; ++i) {
    std::memcpy(matrices[i / 8][i % 8], static_cast<const Loading*>(lanes[i])->row, 16);
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const auto& self = *static_cast<const Loading*>(lanes[lane]);
    const int g = lane / 4;
    const int t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const auto& m = matrices[i];
      const uint32_t low = self.transposed ? m[2 * t][g] : m[g][2 * t];
      const uint32_t high = self.transposed ? m[2 * t + 1][g] : m[g][2 * t + 1];
      (*self.r)[i] = low | high << 16;
    }
  }
}

void Load(uint32_t (&r)[4], const void* row, bool transposed) {
  CheckShared(row, 16, 16);
  Loading mine{&r, {}, transposed};
  std::memcpy(mine.row, row, sizeof(mine.row));
  RunCollective(&mine, &RunLoad);
}

struct Transposing {
  uint32_t given;
  uint32_t got;
};

void RunTranspose(void* const* lanes) {
  const auto number = [lanes](int row, int column) {
    const auto& lane = *static_cast<const Transposing*>(lanes[4 * row + column / 2]);
    return lane.given >> 16 * (column % 2) & 0xffff;
  };
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const int g = lane / 4;
    const int t = lane % 4;
    static_cast<Transposing*>(lanes[lane])->got = number(2 * t, g) | number(2 * t + 1, g) << 16;
  }
}

struct Product {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

template <const Format& kFormat>
void RunProduct(void* const* lanes) {
  const float* const numbers = Table<kFormat>();
  float a[16][16];
  float b[16][8];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const auto& self = *static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4;
    const int t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const int shift = 16 * half;
      for (int i = 0; i < 4; ++i) {
        a[g + 8 * (i % 2)][2 * t + half + 8 * (i / 2)] = numbers[self.a[i] >> shift & 0xffff];
      }
      for (int i = 0; i < 2; ++i) {
        b[2 * t + half + 8 * i][g] = numbers[self.b[i] >> shift & 0xffff];
      }
    }
  }
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    const auto& self = *static_cast<const Product*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2);
      const int column = 2 * (lane % 4) + i % 2;
      double sum = self.d[i];
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      self.d[i] = static_cast<float>(sum);
    }
  }
}

template <const Format& kFormat>
void Multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product mine{d, a, b};
  RunCollective(&mine, &RunProduct<kFormat>);
}

}  // namespace

void LoadMatrix4(uint32_t (&r)[4], const void* row) { Load(r, row, false); }
void LoadMatrix4Transposed(uint32_t (&r)[4], const void* row) { Load(r, row, true); }
uint32_t TransposeMatrix(uint32_t r) {
  Transposing mine{r, 0};
  RunCollective(&mine, &RunTranspose);
  return mine.got;
}
void MmaBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Multiply<kBf16>(d, a, b);
}
void MmaF16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Multiply<kF16>(d, a, b);
}

uint32_t PackBf16(float low, float high) {
  return FromFloat(kBf16, low) | FromFloat(kBf16, high) << 16;
}
uint32_t PackF16(float low, float high) {
  return FromFloat(kF16, low) | FromFloat(kF16, high) << 16;
}
float F16ToFloat(uint32_t bits) { return Table<kF16>()[bits & 0xffff]; }

// e4m3 has no infinities: what would be one is the number 256 to 448 or, of all ones, NaN.
uint32_t F16x2FromE4m3x2(uint16_t bits) {
  const auto one = [](uint32_t b) {
    const double sign = (b & 0x80) != 0 ? -1 : 1;
    if ((b & 0x7f) == 0x7f) return 0x7fffu;
    return FromFloat(kF16, static_cast<float>(sign * Magnitude(kE4m3, b & 0x7f)));
  };
  return one(bits & 0xff) | one(bits >> 8) << 16;
}
uint16_t PackE4m3(float low, float high) {
  const auto one = [](float x) -> uint32_t {
    const uint32_t sign = std::signbit(x) ? 0x80 : 0;
    if (std::isnan(x)) return 0x7f;
    if (std::abs(x) >= 448) return sign | 0x7e;
    return sign | NearestBits(kE4m3, std::abs(x));
  };
  return static_cast<uint16_t>(one(low) | one(high) << 8);
}

}  // namespace larder::kernels::cuda
