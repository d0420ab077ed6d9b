#include "client/worker/sampler.h"

#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace larder::worker {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(SamplerTest, GreedyPrefersTheLowestOfEqualTokens) {
  EXPECT_EQ(Greedy(std::vector<float>{1, 3, 2, 3}), 1u);
  EXPECT_EQ(Greedy(std::vector<float>{0, 0, 0}), 0u);
  EXPECT_EQ(Greedy(std::vector<float>{kNan, -5, kNan}), 1u);
  EXPECT_EQ(Greedy(std::vector<float>{kNan, kNan}), 0u);
  EXPECT_EQ(Sample(std::vector<float>{1, 3, 2, 3}, {}, 5, 9), 1u);
}

// Counts of 20,000 draws, one a position.
std::map<uint32_t, double> Frequencies(const std::vector<float>& logits,
                                       const SamplingOptions& options) {
  constexpr int kDraws = 20'000;
  std::map<uint32_t, double> frequencies;
  for (uint64_t position = 0; position < kDraws; ++position) {
    frequencies[Sample(logits, options, 0, position)] += 1.0 / kDraws;
  }
  return frequencies;
}

TEST(SamplerTest, DrawsFromTheSoftmax) {
  const std::vector<float> logits = {0, std::log(2.0f), std::log(5.0f)};
  auto plain = Frequencies(logits, {.temperature = 1, .seed = 3});
  EXPECT_NEAR(plain[0], 1 / 8.0, 0.01);
  EXPECT_NEAR(plain[1], 2 / 8.0, 0.01);
  EXPECT_NEAR(plain[2], 5 / 8.0, 0.01);
  // At temperature 1/2 every ratio is squared.
  auto cold = Frequencies(logits, {.temperature = 0.5, .seed = 3});
  EXPECT_NEAR(cold[0], 1 / 30.0, 0.01);
  EXPECT_NEAR(cold[1], 4 / 30.0, 0.01);
  EXPECT_NEAR(cold[2], 25 / 30.0, 0.01);
}

TEST(SamplerTest, TopKAndTopPKeepTheLikeliest) {
  const std::vector<float> logits = {0, std::log(2.0f), std::log(5.0f), std::log(2.0f)};
  auto top_2 = Frequencies(logits, {.temperature = 1, .top_k = 2});
  EXPECT_EQ(top_2.size(), 2u);  // of the two equal ones the lower
  EXPECT_NEAR(top_2[2], 5 / 7.0, 0.01);
  EXPECT_NEAR(top_2[1], 2 / 7.0, 0.01);
  auto half = Frequencies(logits, {.temperature = 1, .top_p = 0.5});
  EXPECT_EQ(half.size(), 1u);
  EXPECT_EQ(half.count(2), 1u);
  auto most = Frequencies(logits, {.temperature = 1, .top_p = 0.55});
  EXPECT_EQ(most.size(), 2u);
  EXPECT_EQ(Frequencies(logits, {.temperature = 1, .top_k = 1'000}).size(), 4u);
  EXPECT_EQ(
      Frequencies({kNan, 1, -std::numeric_limits<float>::infinity()}, {.temperature = 1}).size(),
      1u);
}

TEST(SamplerTest, AChoiceIsOfSeedSampleAndPositionAlone) {
  const std::vector<float> logits(1'000, 0);
  const auto draw = [&](uint64_t seed, uint64_t sample, uint64_t position) {
    return Sample(logits, {.temperature = 1, .seed = seed}, sample, position);
  };
  EXPECT_EQ(draw(1, 2, 3), draw(1, 2, 3));
  std::set<uint32_t> seen;
  for (uint64_t i = 0; i < 4; ++i) {
    for (uint64_t j = 0; j < 4; ++j) {
      for (uint64_t k = 0; k < 4; ++k) seen.insert(draw(i, j, k));
    }
  }
  EXPECT_GT(seen.size(), 50u);  // of 64 draws from 1,000; the expectation is 62
}

TEST(SamplerTest, OptionsHaveBounds) {
  EXPECT_TRUE(Validate(SamplingOptions{}).ok());
  for (const double temperature : {-0.1, 101.0, std::nan("")}) {
    EXPECT_THAT(std::string(Validate(SamplingOptions{.temperature = temperature}).message()),
                testing::HasSubstr("temperature: "));
  }
  for (const double top_p : {0.0, 1.1, std::nan("")}) {
    EXPECT_THAT(std::string(Validate(SamplingOptions{.top_p = top_p}).message()),
                testing::HasSubstr("top_p: "));
  }
}

}  // namespace
}  // namespace larder::worker
