#include "client/worker/perplexity.h"

#include <cmath>

#include "gtest/gtest.h"
#include "tests/worker/test_models.h"

namespace larder::worker {
namespace {

TEST(PerplexityTest, LogProbabilityIsOfTheSoftmax) {
  const std::vector<float> logits = {1'000, 1'000 + std::log(3.0f)};
  EXPECT_NEAR(LogProbability(logits, 0), std::log(0.25), 1e-4);
  EXPECT_NEAR(LogProbability(logits, 1), std::log(0.75), 1e-4);
  EXPECT_EQ(Likelihood{}.Perplexity(), 1);
  EXPECT_NEAR((Likelihood{.nats = 2 * std::log(10.0), .tokens = 2}.Perplexity()), 10, 1e-9);
}

TEST(PerplexityTest, IsTheSameInAnyChunksAndFromCachedTokensOn) {
  const auto transformer = SmallTransformer({});
  std::mt19937 random(1);
  const std::vector<uint32_t> tokens = RandomTokens(random, 100, transformer->config().vocab);
  TestBlocks blocks(transformer->geometry(), tokens.size(), random);
  const auto whole = Score(*transformer, tokens, 0, blocks.table(), 100);
  ASSERT_TRUE(whole.ok()) << whole.status();
  EXPECT_EQ(whole->tokens, 99u);
  // Noise foretells noise about as well as a guess does.
  EXPECT_NEAR(std::log(whole->Perplexity()), std::log(transformer->config().vocab), 1.5);
  const auto cut = Score(*transformer, tokens, 0, blocks.table(), 7);
  ASSERT_TRUE(cut.ok());
  EXPECT_EQ(cut->nats, whole->nats);
  const auto later = Score(*transformer, tokens, 60, blocks.table(), 16);
  ASSERT_TRUE(later.ok());
  EXPECT_EQ(later->tokens, 39u);
  EXPECT_LT(later->nats, whole->nats);
}

TEST(PerplexityTest, RefusesChunksOfNothing) {
  const auto transformer = SmallTransformer({});
  std::mt19937 random(1);
  const std::vector<uint32_t> tokens = {1, 2};
  TestBlocks blocks(transformer->geometry(), tokens.size(), random);
  EXPECT_EQ(Score(*transformer, tokens, 0, blocks.table(), 0).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace larder::worker
