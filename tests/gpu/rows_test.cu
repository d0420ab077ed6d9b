// CopyRows between all pairs of types: looked up, repeated, rounded, and nothing between rows.
#include <algorithm>

#include "kernels/cuda/rows.h"
#include "tests/gpu/check.h"
#include "tests/kernels/reference.h"

namespace larder::gpu_tests {
namespace {

using kernels::BytesOf;
using kernels::DType;
using kernels::cuda::CopyRows;

constexpr DType kTypes[] = {DType::kF32, DType::kF16, DType::kBf16};

struct Shape {
  int32_t source_rows;
  int64_t from_stride;  // 0: one row for all
  bool looked_up;
  int32_t rows;
  int32_t dim;
};

void Copies(std::mt19937& random, DType from_type, DType to_type, const Shape& s) {
  const std::string literal = "type " + std::to_string(static_cast<int>(from_type)) + " to " +
                              std::to_string(static_cast<int>(to_type)) + ", dim " +
                              std::to_string(s.dim) + ", stride " + std::to_string(s.from_stride);
  const int64_t numbers = std::max<int64_t>(s.source_rows * s.from_stride, s.dim);
  std::vector<std::byte> from(numbers * BytesOf(from_type));
  std::normal_distribution<double> normal(0, 3);
  for (int64_t i = 0; i < numbers; ++i) {
    kernels::testing::Encode(from_type, normal(random), &from[i * BytesOf(from_type)]);
  }
  std::vector<int32_t> indices(s.rows);
  for (int32_t i = 0; i < s.rows; ++i) {
    indices[i] = s.looked_up ? static_cast<int32_t>(random() % s.source_rows) : i;
  }
  const int64_t to_stride = s.dim + 4;
  const DeviceArray<std::byte> device_from(from);
  const DeviceArray<int32_t> device_indices(indices);
  const DeviceArray<std::byte> to(s.rows * to_stride * BytesOf(to_type));
  Require(CopyRows({.from_type = from_type,
                    .from = device_from.data(),
                    .from_stride = s.from_stride,
                    .indices = s.looked_up ? device_indices.data() : nullptr,
                    .to_type = to_type,
                    .to = to.data(),
                    .to_stride = to_stride,
                    .rows = s.rows,
                    .dim = s.dim},
                   nullptr),
          "CopyRows");
  std::vector<std::byte> expected(to.size(), std::byte{0xff});
  for (int32_t row = 0; row < s.rows; ++row) {
    for (int32_t i = 0; i < s.dim; ++i) {
      const int64_t at = indices[row] * s.from_stride + i;
      const double x = kernels::testing::Decoded(from_type, &from[at * BytesOf(from_type)]);
      kernels::testing::Encode(to_type, x, &expected[(row * to_stride + i) * BytesOf(to_type)]);
    }
  }
  Expect(to.Host() == expected, literal);
}

void CopiesBetweenTypes(uint32_t seed) {
  std::mt19937 random(seed);
  for (const DType from : kTypes) {
    for (const DType to : kTypes) {
      for (const int32_t dim : {4, 64, 1028, 2052}) {
        Copies(
            random, from, to,
            {.source_rows = 7, .from_stride = dim + 8, .looked_up = true, .rows = 9, .dim = dim});
        Copies(random, from, to,
               {.source_rows = 5, .from_stride = dim, .looked_up = false, .rows = 5, .dim = dim});
        Copies(random, from, to,
               {.source_rows = 1, .from_stride = 0, .looked_up = false, .rows = 6, .dim = dim});
      }
    }
  }
}

void RefusesWhatItCannotDo(uint32_t) {
  Expect(CopyRows({.from_type = DType::kI8, .dim = 4}, nullptr) == cudaErrorInvalidValue, "codes");
  Expect(CopyRows({.to_type = DType::kI8, .dim = 4}, nullptr) == cudaErrorInvalidValue, "to codes");
  Expect(CopyRows({.dim = 6}, nullptr) == cudaErrorInvalidValue, "6 numbers");
  Expect(CopyRows({.from_stride = 6, .dim = 4}, nullptr) == cudaErrorInvalidValue, "a stride of 6");
  Expect(CopyRows({.dim = 8}, nullptr) == cudaSuccess, "no rows");
}

}  // namespace
}  // namespace larder::gpu_tests

int main(int argc, char** argv) {
  using namespace larder::gpu_tests;  // NOLINT
  return RunCases(argc, argv,
                  std::vector<Case>{{"copies_between_types", 2, CopiesBetweenTypes},
                                    {"refuses_what_it_cannot_do", 1, RefusesWhatItCannotDo}});
}
