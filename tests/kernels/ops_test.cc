// RmsNorm, SiluMul and RoPE against their formulas, and row by row against the batch.
#include "kernels/ops.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "kernels/rope.h"
#include "tests/kernels/paged_kv.h"
#include "tests/kernels/reference.h"

namespace larder::kernels::testing {
namespace {

class OpsTest : public IsaTest {
 protected:
  ThreadPool pool{3};
  Cpu cpu{pool, GetParam()};
  std::mt19937 random{1};
};
INSTANTIATE_TEST_SUITE_P(Isa, OpsTest, ::testing::ValuesIn(kIsas), NameOf);

TEST_P(OpsTest, RmsNorm) {
  for (const int32_t dim : {1, 3, 16, 37, 128, 4096}) {
    const int64_t rows = 5;
    const int64_t stride = dim + 3;
    const std::vector<float> x = RandomFloats(random, rows * stride);
    const std::vector<float> weight = RandomFloats(random, dim);
    std::vector<float> out(rows * stride, 7);
    RmsNormParams params{x.data(), stride, out.data(), stride, weight.data(), rows, dim, 1e-5f};
    RmsNorm(cpu, params);
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0;
      for (int32_t i = 0; i < dim; ++i) sum += double{x[row * stride + i]} * x[row * stride + i];
      for (int32_t i = 0; i < dim; ++i) {
        const double expected =
            x[row * stride + i] / std::sqrt(sum / dim + double{1e-5f}) * weight[i];
        ASSERT_NEAR(out[row * stride + i], expected, 1e-5) << "dim " << dim;
      }
      for (int32_t i = dim; i < stride; ++i) ASSERT_EQ(out[row * stride + i], 7);
      // One row alone, in place.
      std::vector<float> alone(x.begin() + row * stride, x.begin() + row * stride + dim);
      RmsNorm(cpu, {alone.data(), dim, alone.data(), dim, weight.data(), 1, dim, 1e-5f});
      ASSERT_EQ(std::memcmp(alone.data(), &out[row * stride], dim * sizeof(float)), 0);
    }
  }
}

TEST_P(OpsTest, SiluMul) {
  for (const int32_t dim : {1, 15, 64, 129}) {
    const int64_t rows = 4;
    // Gate and up beside each other, as one product leaves them.
    std::vector<float> in = RandomFloats(random, rows * 2 * dim, 5);
    in[0] = -200;
    if (dim > 3) in[1] = 200, in[2] = -88.5f, in[3] = 0;
    std::vector<float> out(rows * dim);
    SiluMul(cpu, {in.data(), in.data() + dim, 2 * dim, out.data(), dim, rows, dim});
    for (int64_t row = 0; row < rows; ++row) {
      const float* const gate = &in[row * 2 * dim];
      for (int32_t i = 0; i < dim; ++i) {
        const double expected = gate[i] / (1 + std::exp(-double{gate[i]})) * gate[dim + i];
        ASSERT_NEAR(out[row * dim + i], expected, 1e-6 * (1 + std::abs(expected)));
      }
      std::vector<float> alone(dim);
      SiluMul(cpu, {gate, gate + dim, 0, alone.data(), 0, 1, dim});
      ASSERT_EQ(std::memcmp(alone.data(), &out[row * dim], dim * sizeof(float)), 0);
    }
  }
}

TEST_P(OpsTest, Rope) {
  const int32_t heads = 3;
  const int32_t head_dim = 50;
  const RopeConfig config{.dim = 44, .theta = 10000, .llama3 = {}};
  const std::vector<int32_t> positions = {0, 1, 17, 4095, 2};
  const auto rows = static_cast<int64_t>(positions.size());
  const std::vector<float> before = RandomFloats(random, rows * heads * head_dim);
  std::vector<float> after = before;
  std::vector<float> cos_sin(rows * config.dim);
  RopeAngles(cpu, InverseFrequencies(config), positions, cos_sin.data());
  // The last 44 numbers of each head.
  ApplyRope(
      cpu, {after.data() + 6, rows, heads * head_dim, heads, head_dim, config.dim, cos_sin.data()});
  for (int64_t i = 0; i < rows * heads; ++i) {
    std::vector<double> x(&before[i * head_dim], &before[i * head_dim] + head_dim);
    Rotate(x, 6, config.dim, positions[i / heads], Frequencies(config));
    // float32 angles of some thousands are off by up to 2e-4.
    for (int32_t j = 0; j < head_dim; ++j) ASSERT_NEAR(after[i * head_dim + j], x[j], 2e-3);
    for (int32_t j = 0; j < 6; ++j) ASSERT_EQ(after[i * head_dim + j], before[i * head_dim + j]);
  }
  // Row 2 alone.
  std::vector<float> alone(&before[2 * heads * head_dim], &before[3 * heads * head_dim]);
  ApplyRope(cpu, {alone.data() + 6, 1, 0, heads, head_dim, config.dim, &cos_sin[2 * config.dim]});
  ASSERT_EQ(std::memcmp(alone.data(), &after[2 * heads * head_dim], alone.size() * sizeof(float)),
            0);
}

TEST(RopeTest, FrequenciesOfLlama2) {
  const RopeConfig config{.dim = 128, .theta = 10000, .llama3 = {}};
  const std::vector<float> got = InverseFrequencies(config);
  const std::vector<double> expected = Frequencies(config);
  ASSERT_EQ(got.size(), 64u);
  EXPECT_EQ(got[0], 1);
  EXPECT_NEAR(got[63] / 1.1547819846894582e-4, 1, 1e-6);  // 10000^(-126/128)
  for (size_t i = 0; i < 64; ++i) EXPECT_NEAR(got[i] / expected[i], 1, 1e-6) << i;
}

TEST(RopeTest, FrequenciesOfLlama31) {
  const RopeConfig config{.dim = 128, .theta = 500000, .llama3 = Llama3RopeScaling{}};
  const RopeConfig plain{.dim = 128, .theta = 500000, .llama3 = {}};
  const std::vector<float> got = InverseFrequencies(config);
  const std::vector<float> unscaled = InverseFrequencies(plain);
  const std::vector<double> expected = Frequencies(config);
  for (size_t i = 0; i < 64; ++i) EXPECT_NEAR(got[i] / expected[i], 1, 2e-6) << i;
  // 8192 positions are four turns at i = 28.2 and one at i = 35: kept before, an eighth after.
  EXPECT_EQ(got[28], unscaled[28]);
  EXPECT_LT(got[29], unscaled[29]);
  EXPECT_GT(got[34], unscaled[34] / 8);
  EXPECT_EQ(got[36], unscaled[36] / 8);
}

// As a model saw it in training: position times frequency rounded to float32.
TEST(RopeTest, AnglesAreRoundedProducts) {
  ThreadPool pool(1);
  const std::vector<float> frequencies = {0.7310585f};
  const std::vector<int32_t> positions = {100003};
  float cos_sin[2];
  RopeAngles({pool, Isa::kPortable}, frequencies, positions, cos_sin);
  const float angle = 100003.0f * 0.7310585f;
  EXPECT_FLOAT_EQ(cos_sin[0], static_cast<float>(std::cos(double{angle})));
  EXPECT_FLOAT_EQ(cos_sin[1], static_cast<float>(std::sin(double{angle})));
}

}  // namespace
}  // namespace larder::kernels::testing
