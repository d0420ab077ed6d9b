#include "tests/kernels/reference.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <utility>

namespace larder::kernels::testing {
namespace {

// Bits of a binary format's stored fraction, and its exponent's range.
struct Format {
  int fraction_bits;
  int exponent_min;  // of normal numbers
  int exponent_max;
};

constexpr double kE4m3Largest = 448;

Format FormatOf(DType dtype) {
  if (dtype == DType::kF8E4M3) return {3, -6, 8};
  if (dtype == DType::kF16) return {10, -14, 15};
  if (dtype == DType::kBf16) return {7, -126, 127};
  return {23, -126, 127};
}

// By the table of the OCP specification: S.1111.111 is NaN, there is no infinity.
double DecodedE4m3(uint8_t code) {
  const int exponent = code >> 3 & 15;
  const int fraction = code & 7;
  if (exponent == 15 && fraction == 7) return std::nan("");
  const double magnitude = exponent == 0 ? fraction / 8.0 * std::ldexp(1, -6)
                                         : (1 + fraction / 8.0) * std::ldexp(1, exponent - 7);
  return code >> 7 ? -magnitude : magnitude;
}

// The number of every code.
const std::array<double, 256>& E4m3Numbers() {
  static const std::array<double, 256> numbers = [] {
    std::array<double, 256> all;
    for (int code = 0; code < 256; ++code) all[code] = DecodedE4m3(static_cast<uint8_t>(code));
    return all;
  }();
  return numbers;
}

// The largest code where a format saturates, else infinity.
double Largest(DType dtype) {
  if (dtype == DType::kF8E4M3) return kE4m3Largest;
  return dtype == DType::kI8 ? 127 : std::numeric_limits<double>::infinity();
}

}  // namespace

double Decoded(DType dtype, const std::byte* from) {
  if (dtype == DType::kF32) {
    float x;
    std::memcpy(&x, from, sizeof(x));
    return x;
  }
  if (dtype == DType::kI8) return static_cast<int8_t>(*from);
  if (dtype == DType::kF8E4M3) return E4m3Numbers()[static_cast<uint8_t>(*from)];
  uint16_t bits;
  std::memcpy(&bits, from, sizeof(bits));
  const Format format = FormatOf(dtype);
  const int exponent_bits = 15 - format.fraction_bits;
  const int fraction = bits & ((1 << format.fraction_bits) - 1);
  const int exponent = bits >> format.fraction_bits & ((1 << exponent_bits) - 1);
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  }
  const int leading = exponent == 0 ? 0 : 1 << format.fraction_bits;
  const int power = exponent == 0 ? format.exponent_min : exponent - format.exponent_max;
  return sign * std::ldexp(leading + fraction, power - format.fraction_bits);
}

double Rounded(DType dtype, double x) {
  if (IsQuantised(dtype) && std::abs(x) > Largest(dtype)) {
    return std::copysign(Largest(dtype), x);
  }
  if (dtype == DType::kI8) return std::isnan(x) ? 0 : std::nearbyint(x);
  if (!std::isfinite(x) || x == 0) return x;
  const Format format = FormatOf(dtype);
  int exponent;
  std::frexp(x, &exponent);  // x = [0.5, 1) * 2^exponent
  const int power = std::max(exponent - 1, format.exponent_min) - format.fraction_bits;
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, -power)), power);
  const double past = std::ldexp(1, format.exponent_max + 1);
  return std::abs(rounded) >= past ? std::copysign(std::numeric_limits<double>::infinity(), x)
                                   : rounded;
}

void Encode(DType dtype, double x, std::byte* to) {
  const double rounded = Rounded(dtype, x);
  if (dtype == DType::kF32) {
    const auto value = static_cast<float>(rounded);
    std::memcpy(to, &value, sizeof(value));
    return;
  }
  if (dtype == DType::kI8) {
    *to = static_cast<std::byte>(static_cast<int8_t>(rounded));
    return;
  }
  if (dtype == DType::kF8E4M3) {
    // The code whose number is the rounded one, found by looking among those of its sign.
    const int first = std::signbit(x) ? 128 : 0;
    for (int code = first; code < first + 128; ++code) {
      const double number = E4m3Numbers()[code];
      const bool same = std::isnan(rounded) ? std::isnan(number) : number == rounded;
      if (same) *to = static_cast<std::byte>(code);
    }
    return;
  }
  const Format format = FormatOf(dtype);
  uint16_t bits = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::abs(rounded);
  if (std::isinf(magnitude)) {
    bits |= (1 << 15) - (1 << format.fraction_bits);
  } else if (magnitude != 0) {
    int exponent;
    std::frexp(magnitude, &exponent);
    const int power = std::max(exponent - 1, format.exponent_min);
    // A leading one carries into the exponent field, so subnormal numbers need no case.
    const auto digits = static_cast<int>(std::ldexp(magnitude, format.fraction_bits - power));
    bits |= static_cast<uint16_t>(((power - format.exponent_min) << format.fraction_bits) + digits);
  }
  std::memcpy(to, &bits, sizeof(bits));
}

double RowScale(DType dtype, const std::vector<float>& row) {
  if (!IsQuantised(dtype)) return 1;
  double largest = 0;
  for (const float x : row) {
    if (!std::isfinite(x)) return std::nan("");
    largest = std::max(largest, std::abs(double{x}));
  }
  // A double's quotient rounded to float32 is the float32 quotient: 53 >= 2 * 24 + 2 bits.
  const double scale = static_cast<float>(largest / Largest(dtype));
  return scale < std::numeric_limits<float>::min() ? 0 : scale;
}

double RowCode(DType dtype, double x, double scale) {
  if (!IsQuantised(dtype)) return Rounded(dtype, x);
  return scale > 0 ? Rounded(dtype, static_cast<float>(x / scale)) : 0;
}

ReferenceRow Attention(const ReferenceQuery& query, const HeadRows& keys, const HeadRows& values) {
  ReferenceRow row;
  std::vector<std::pair<int32_t, double>> scores;
  double most = -std::numeric_limits<double>::infinity();
  for (int32_t t = query.key_begin; t <= query.position && t < query.key_end; ++t) {
    const bool in_window = query.window == 0 || t > query.position - query.window;
    if (!in_window && t >= query.sinks) continue;
    double score = 0;
    for (size_t i = 0; i < query.q.size(); ++i) score += query.q[i] * keys[t][query.kv_head][i];
    scores.emplace_back(t, score * query.scale);
    most = std::max(most, scores.back().second);
  }
  row.out.assign(values.empty() ? 0 : values[0][query.kv_head].size(), 0.0);
  double sum = 0;
  for (const auto& [t, score] : scores) sum += std::exp(score - most);
  row.lse = scores.empty() ? most : most + std::log(sum);
  for (const auto& [t, score] : scores) {
    const double weight = std::exp(score - row.lse);
    for (size_t i = 0; i < row.out.size(); ++i) row.out[i] += weight * values[t][query.kv_head][i];
  }
  return row;
}

void Rotate(std::vector<double>& x, int32_t begin, int32_t dim, int32_t position,
            const std::vector<double>& frequencies) {
  const int32_t half = dim / 2;
  for (int32_t i = 0; i < half; ++i) {
    const double angle = position * frequencies[i];
    const double a = x[begin + i];
    const double b = x[begin + half + i];
    x[begin + i] = a * std::cos(angle) - b * std::sin(angle);
    x[begin + half + i] = b * std::cos(angle) + a * std::sin(angle);
  }
}

std::vector<double> Frequencies(const RopeConfig& config) {
  std::vector<double> frequencies;
  for (int32_t i = 0; i < config.dim / 2; ++i) {
    double f = std::pow(config.theta, -2.0 * i / config.dim);
    if (config.llama3) {
      const Llama3RopeScaling& s = *config.llama3;
      const double turns = s.original_max_position_embeddings * f / (2 * std::numbers::pi);
      const double kept = std::clamp(
          (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0., 1.);
      f = f * kept + f / s.factor * (1 - kept);
    }
    frequencies.push_back(f);
  }
  return frequencies;
}

}  // namespace larder::kernels::testing
