// RmsNorm and SiluMul on a GPU against their formulas in double precision.
#include "kernels/cuda/ops.h"
#include "tests/gpu/check.h"
#include "tests/kernels/reference.h"

namespace larder::gpu_tests {
namespace {

using kernels::BytesOf;
using kernels::DType;

constexpr DType kTypes[] = {DType::kF32, DType::kF16, DType::kBf16};

// Rows of a storage type.
struct Rows {
  Rows(std::mt19937& random, DType type, int64_t count, double spread)
      : type(type), bytes(count * BytesOf(type)) {
    std::normal_distribution<double> normal(0, spread);
    for (int64_t i = 0; i < count; ++i) Set(i, normal(random));
  }
  void Set(int64_t i, double x) { kernels::testing::Encode(type, x, &bytes[i * BytesOf(type)]); }
  double operator[](int64_t i) const {
    return kernels::testing::Decoded(type, &bytes[i * BytesOf(type)]);
  }

  DType type;
  std::vector<std::byte> bytes;
};

// Half a last place of the type, and float32's own errors.
double Allowed(DType type, double x) {
  const double half = type == DType::kBf16 ? 0x1p-8 : type == DType::kF16 ? 0x1p-11 : 0;
  const double step = type == DType::kF16 ? 0x1p-25 : 0;  // of numbers below 2^-14
  return std::abs(x) * (half * 1.01 + 2e-6) + step + 1e-7;
}

std::string Literal(DType type, int32_t rows, int32_t dim, int64_t i) {
  return "{DType{" + std::to_string(static_cast<int>(type)) + "}, " + std::to_string(rows) + ", " +
         std::to_string(dim) + "} at " + std::to_string(i);
}

void NormalisesRows(uint32_t seed) {
  std::mt19937 random(seed);
  constexpr float kEpsilon = 1e-5f;
  for (const DType type : kTypes) {
    for (const int32_t dim : {4, 128, 1020, 1024, 4096}) {
      const auto rows = static_cast<int32_t>(1 + random() % 3);
      const int64_t stride = dim + 8;
      const Rows x(random, type, rows * stride, 2);
      const Rows weight(random, type, dim, 1);
      Rows out = x;
      const DeviceArray<std::byte> device_x(x.bytes);
      const DeviceArray<std::byte> device_weight(weight.bytes);
      DeviceArray<std::byte> device_out(out.bytes.size());
      kernels::cuda::RmsNormParams params{type,    device_x.data(),      stride, device_out.data(),
                                          stride,  device_weight.data(), rows,   dim,
                                          kEpsilon};
      Require(kernels::cuda::RmsNorm(params, nullptr), "RmsNorm");
      out.bytes = device_out.Host();
      for (int64_t i = 0; i < rows * stride; ++i) {
        if (i % stride >= dim) {
          Expect(out.bytes[i * BytesOf(type)] == std::byte{0xff}, "written between rows");
          continue;
        }
        double sum = 0;
        for (int64_t j = i / stride * stride; j < i / stride * stride + dim; ++j)
          sum += x[j] * x[j];
        const double expected = x[i] / std::sqrt(sum / dim + double{kEpsilon}) * weight[i % stride];
        ExpectWithin(Distance(expected, out[i]), Allowed(type, expected),
                     Literal(type, rows, dim, i));
        // All of the small ones, some of the large.
        if (dim > 1024 && i % 97 != 0) i += random() % 50;
      }
      // In place, and the last row alone: the same bits.
      DeviceArray<std::byte> in_place(x.bytes);
      const int64_t last = (rows - 1) * stride * BytesOf(type);
      params.x = params.out = in_place.data() + last;
      params.rows = 1;
      Require(kernels::cuda::RmsNorm(params, nullptr), "RmsNorm");
      Expect(std::memcmp(in_place.Host().data() + last, out.bytes.data() + last,
                         dim * BytesOf(type)) == 0,
             "a row alone, in place: " + Literal(type, rows, dim, 0));
    }
  }
}

void MultipliesGates(uint32_t seed) {
  std::mt19937 random(seed);
  for (const DType type : kTypes) {
    for (const int32_t dim : {4, 64, 1028, 2052}) {
      const int32_t rows = 3;
      Rows in(random, type, int64_t{rows} * 2 * dim, 5);  // gate and up beside each other
      in.Set(0, -200), in.Set(1, 200), in.Set(2, -88.5), in.Set(3, 0);
      const DeviceArray<std::byte> device_in(in.bytes);
      Rows out(random, type, int64_t{rows} * (dim + 4), 1);
      DeviceArray<std::byte> device_out(out.bytes.size());
      Require(kernels::cuda::SiluMul(
                  {type, device_in.data(), device_in.data() + int64_t{dim} * BytesOf(type), 2 * dim,
                   device_out.data(), dim + 4, rows, dim},
                  nullptr),
              "SiluMul");
      out.bytes = device_out.Host();
      for (int64_t row = 0; row < rows; ++row) {
        for (int32_t i = 0; i < dim; ++i) {
          const double gate = in[row * 2 * dim + i];
          const double expected = gate / (1 + std::exp(-gate)) * in[row * 2 * dim + dim + i];
          ExpectWithin(Distance(expected, out[row * (dim + 4) + i]), Allowed(type, expected),
                       Literal(type, rows, dim, i));
        }
        for (int64_t i = dim; i < dim + 4; ++i) {
          Expect(out.bytes[(row * (dim + 4) + i) * BytesOf(type)] == std::byte{0xff},
                 "written between rows");
        }
      }
    }
  }
}

void RefusesWhatItCannotDo(uint32_t) {
  Expect(kernels::cuda::RmsNorm({.type = DType::kI8, .dim = 4}, nullptr) == cudaErrorInvalidValue,
         "codes");
  Expect(kernels::cuda::RmsNorm({.dim = 6}, nullptr) == cudaErrorInvalidValue, "6 numbers");
  Expect(kernels::cuda::RmsNorm({.dim = 8}, nullptr) == cudaSuccess, "no rows");
  Expect(kernels::cuda::SiluMul({.dim = 6}, nullptr) == cudaErrorInvalidValue, "6 numbers");
  Expect(kernels::cuda::SiluMul({.in_stride = 7, .dim = 8}, nullptr) == cudaErrorInvalidValue,
         "a stride of 7");
  Expect(kernels::cuda::SiluMul({.dim = 8}, nullptr) == cudaSuccess, "no rows");
}

}  // namespace
}  // namespace larder::gpu_tests

int main(int argc, char** argv) {
  using namespace larder::gpu_tests;  // NOLINT
  return RunCases(argc, argv,
                  std::vector<Case>{{"normalises_rows", 3, NormalisesRows},
                                    {"multiplies_gates", 3, MultipliesGates},
                                    {"refuses_what_it_cannot_do", 1, RefusesWhatItCannotDo}});
}
