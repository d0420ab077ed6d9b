// The whole file also runs with the library held to AVX2 (CMakeLists.txt), where it has other
// kernels and keeps rows apart less often.

#include "client/worker/matmul.h"

#include <cmath>
#include <cstring>
#include <random>

#include "client/worker/bf16.h"
#include "client/worker/tile_check.h"
#include "gtest/gtest.h"

namespace larder::worker {
namespace {

std::vector<float> Noise(size_t count, uint32_t seed) {
  std::minstd_rand random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(count);
  for (float& value : values) value = uniform(random);
  return values;
}

Tensor AsMatrix(const std::vector<float>& values, uint64_t rows) {
  return {.dtype = Dtype::kF32,
          .rows = rows,
          .columns = values.size() / rows,
          .bytes = std::as_bytes(std::span(values))};
}

float Rounded(ProductType type, float value) {
  return type == ProductType::kBf16 ? FromBf16(ToBf16(value)) : value;
}

std::vector<ProductType> TypesOfThisProcessor() {
  if (HasBf16Products()) return {ProductType::kBf16, ProductType::kF32};
  return {ProductType::kF32};
}

struct Shape {
  uint32_t inputs, outputs;
};
// Narrower than a panel, one panel, one and a bit, many; the longest sums of models to come.
constexpr Shape kShapes[] = {{16, 32},     {80, 128},    {96, 160},
                             {896, 1'152}, {4'864, 300}, {14'336, 130}};

TEST(Bf16Test, RoundsToNearestEvenAndKeepsNan) {
  EXPECT_EQ(ToBf16(1.0f), 0x3f80);
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x3f80'8000u)), 0x3f80);  // a tie, down to even
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x3f81'8000u)), 0x3f82);  // a tie, up to even
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x3f80'8001u)), 0x3f81);
  EXPECT_EQ(ToBf16(-INFINITY), 0xff80);
  EXPECT_TRUE(std::isnan(FromBf16(ToBf16(std::bit_cast<float>(0x7f80'0001u)))));
  EXPECT_TRUE(std::isnan(FromBf16(ToBf16(std::bit_cast<float>(0xffff'ffffu)))));
}

// Against sums in f64, with bias, onto what is there, and through strides.
TEST(MatmulTest, IsTheProduct) {
  kernels::ThreadPool pool(2);
  for (const ProductType type : TypesOfThisProcessor()) {
    for (const auto& [inputs, outputs] : kShapes) {
      SCOPED_TRACE(testing::Message()
                   << ElementBytes(type) << " bytes, " << inputs << " by " << outputs);
      constexpr uint32_t kRows = 9;
      auto matmul = Matmul::Create(type, kRows, inputs, pool);
      ASSERT_TRUE(matmul.ok());
      const std::vector<float> upper = Noise(size_t{inputs} * 7, 1);
      const std::vector<float> lower = Noise(size_t{inputs} * (outputs - 7), 2);
      const std::vector<float> bias = Noise(outputs, 3);
      const Tensor stack[] = {AsMatrix(upper, 7), AsMatrix(lower, outputs - 7), AsMatrix(bias, 1)};
      const Tensor* const weights[] = {&stack[0], &stack[1]};
      const Tensor* const biases[] = {&stack[2]};
      const absl::StatusOr<PackedMatrix> matrix = (*matmul)->Pack(weights, biases);
      ASSERT_TRUE(matrix.ok()) << matrix.status();
      ASSERT_EQ(matrix->outputs(), outputs);

      const size_t x_stride = inputs + 3, out_stride = outputs + 5;
      const std::vector<float> x = Noise(kRows * x_stride, 4);
      std::vector<float> out = Noise(kRows * out_stride, 5);
      const std::vector<float> before = out;
      (*matmul)->Multiply(*matrix, x.data(), x_stride, kRows, out.data(), out_stride, Output::kAdd);
      for (size_t row = 0; row < kRows; ++row) {
        for (size_t column = 0; column < out_stride; ++column) {
          const size_t at = row * out_stride + column;
          if (column >= outputs) {
            ASSERT_EQ(out[at], before[at]) << "beyond row " << row;
            continue;
          }
          const float* const w =
              column < 7 ? &upper[column * inputs] : &lower[(column - 7) * inputs];
          double sum = double{before[at]} + bias[column];
          for (size_t i = 0; i < inputs; ++i) {
            sum += double{Rounded(type, x[row * x_stride + i])} * Rounded(type, w[i]);
          }
          ASSERT_NEAR(out[at], sum, 1e-5 * std::sqrt(inputs) + 1e-5) << row << ", " << column;
        }
      }
    }
  }
}

// Invariant 1 of matmul.h, also between pools.
TEST(MatmulTest, ARowIsARow) {
  kernels::ThreadPool one(1), three(3);
  for (const ProductType type : TypesOfThisProcessor()) {
    for (const auto& [inputs, outputs] : kShapes) {
      SCOPED_TRACE(testing::Message()
                   << ElementBytes(type) << " bytes, " << inputs << " by " << outputs);
      constexpr uint32_t kRows = 333;
      auto alone = Matmul::Create(type, kRows, inputs, one);
      auto shared = Matmul::Create(type, kRows, inputs, three);
      ASSERT_TRUE(alone.ok() && shared.ok());
      const std::vector<float> values = Noise(size_t{inputs} * outputs, 1);
      const Tensor tensor = AsMatrix(values, outputs);
      const Tensor* const weights[] = {&tensor};
      const auto for_alone = (*alone)->Pack(weights);
      const auto for_shared = (*shared)->Pack(weights);
      ASSERT_TRUE(for_alone.ok() && for_shared.ok()) << for_alone.status();

      const std::vector<float> x = Noise(size_t{kRows} * inputs, 2);
      std::vector<float> expected(size_t{kRows} * outputs);
      for (size_t row = 0; row < kRows; ++row) {
        (*alone)->Multiply(*for_alone, &x[row * inputs], inputs, 1, &expected[row * outputs],
                           outputs);
      }
      for (const uint32_t rows : {1u, 2u, 3u, 4u, 5u, 8u, 15u, 31u, 64u, 100u, 255u, 256u, 333u}) {
        for (const uint32_t first : {0u, (kRows - rows) / 2, kRows - rows}) {
          std::vector<float> out(size_t{rows} * outputs);
          (*shared)->Multiply(*for_shared, &x[size_t{first} * inputs], inputs, rows, out.data(),
                              outputs);
          ASSERT_EQ(std::memcmp(out.data(), &expected[size_t{first} * outputs],
                                out.size() * sizeof(float)),
                    0)
              << rows << " rows from " << first;
        }
      }
    }
  }
}

TEST(TileProductTest, LeavesOutTilesThatBreakTheRule) {
  for (const ProductType type : TypesOfThisProcessor()) {
    const auto product = TileProduct::Create(896, 128, type);
    ASSERT_TRUE(product.ok()) << product.status();
    ASSERT_FALSE(product->tile_rows().empty());
    EXPECT_TRUE(std::is_sorted(product->tile_rows().rbegin(), product->tile_rows().rend()));
    const auto equal = EqualTiles(*product);
    ASSERT_TRUE(equal.ok());
    EXPECT_EQ(equal->size(), product->tile_rows().size());
  }
}

}  // namespace
}  // namespace larder::worker
