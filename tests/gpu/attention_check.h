// What tests of Decode and of Prefill have in common: queries in, results out, and the formula.
//
// Thread safety: none.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "tests/gpu/device_kv.h"

namespace larder::gpu_tests {

struct AttentionResult {
  std::vector<double> out;  // [rows][q_heads][value_dim]
  std::vector<float> lse;   // [rows][q_heads]
};

// As a kernel reads them.
inline std::vector<std::byte> Encoded(DType dtype, const std::vector<double>& numbers) {
  const size_t bytes = kernels::BytesOf(dtype);
  std::vector<std::byte> encoded(numbers.size() * bytes);
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (std::isnan(numbers[i])) {
      std::memset(&encoded[i * bytes], 0xff, bytes);
    } else {
      kernels::testing::Encode(dtype, numbers[i], &encoded[i * bytes]);
    }
  }
  return encoded;
}

// The first `width` of each `stride` numbers; the others must be as they were.
inline std::vector<double> ReadRows(const DeviceArray<std::byte>& array, DType dtype,
                                    int64_t stride, int64_t width, const std::string& literal) {
  const std::vector<std::byte> bits = array.Host();
  const int64_t bytes = kernels::BytesOf(dtype);
  std::vector<double> rows;
  for (int64_t i = 0; i < static_cast<int64_t>(bits.size()) / bytes; ++i) {
    const double x = kernels::testing::Decoded(dtype, &bits[i * bytes]);
    if (i % stride < width) {
      rows.push_back(x);
    } else {
      Expect(std::isnan(x), "nothing is written between rows: " + literal);
    }
  }
  return rows;
}

inline HeadRows Magnitudes(HeadRows values) {
  for (auto& token : values) {
    for (auto& head : token) {
      for (double& x : head) x = std::abs(x);
    }
  }
  return values;
}

// Each weight is rounded to a type, so an out may be off by that part of the sum of weight *
// |value|; sums in float32 add little to it.
struct Rounding {
  double weights = 0;      // 2^-8 in bf16, 2^-11 in f16
  double out = 0;          // of the type that results are written in; 0: float32
  double absolute = 2e-6;  // allowed besides
};
inline double RoundingOf(DType dtype) { return dtype == DType::kBf16 ? 0x1p-8 : 0x1p-11; }

// One row and head: result `at` against the formula. `magnitudes`: of the sequence's values.
inline void ExpectRow(const kernels::testing::ReferenceQuery& query, const TestSequence& sequence,
                      const HeadRows& magnitudes, const AttentionResult& result, int64_t at,
                      const Rounding& rounding, const std::string& literal) {
  const auto expected = kernels::testing::Attention(query, sequence.keys, sequence.values);
  const auto size = kernels::testing::Attention(query, sequence.keys, magnitudes);
  ExpectWithin(Distance(expected.lse, result.lse[at]), 2e-5 + 2e-6 * std::abs(expected.lse),
               "lse " + literal);
  double worst = 0;
  const auto dim = static_cast<int64_t>(expected.out.size());
  for (int64_t i = 0; i < dim; ++i) {
    const double allowed = (rounding.weights + 2e-6) * size.out[i] + rounding.absolute +
                           rounding.out * std::abs(expected.out[i]);
    worst = std::max(worst, Distance(expected.out[i], result.out[at * dim + i]) / allowed);
  }
  ExpectWithin(worst, 1, "out " + literal);
}

inline void ExpectNothingSeen(const AttentionResult& result) {
  for (const double x : result.out) Expect(x == 0, "out of a row that sees nothing is 0");
  for (const float x : result.lse) Expect(x == -HUGE_VALF, "its lse is -infinity");
}

// A NaN in the first head's query is seen there and nowhere else; heads of 64.
inline void ExpectNanOfFirstHead(const AttentionResult& result) {
  Expect(std::isnan(result.out[0]) && std::isnan(result.lse[0]), "a NaN in q is seen");
  Expect(!std::isnan(result.out[64]) && !std::isnan(result.lse[1]), "the other head has none");
}

}  // namespace larder::gpu_tests
