#include "client/worker/speculator.h"

#include <memory>
#include <random>
#include <vector>

#include "client/worker/block_pool.h"
#include "client/worker/sampler.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/worker/test_models.h"

namespace larder::worker {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

std::vector<std::vector<uint32_t>> Drafts(const std::vector<uint32_t>& tokens,
                                          const SpeculationOptions& options) {
  std::vector<std::vector<uint32_t>> drafts;
  for (const std::span<const uint32_t> draft : ProposeDrafts(tokens, options)) {
    drafts.emplace_back(draft.begin(), draft.end());
  }
  return drafts;
}

TEST(ProposeDrafts, WhatFollowedLastTime) {
  const SpeculationOptions options{
      .draft_tokens = 2, .branches = 1, .match_max = 3, .match_min = 2};
  EXPECT_THAT(Drafts({1, 2, 3, 9, 8, 7, 1, 2, 3}, options), ElementsAre(ElementsAre(9, 8)));
  // The latest place, not the first.
  EXPECT_THAT(Drafts({1, 2, 5, 1, 2, 6, 1, 2}, options), ElementsAre(ElementsAre(6, 1)));
  // The longest match, not the latest.
  EXPECT_THAT(Drafts({1, 2, 3, 5, 4, 2, 3, 6, 1, 2, 3}, options), ElementsAre(ElementsAre(5, 4)));
  // A place so late that less than a draft follows.
  EXPECT_THAT(Drafts({4, 4, 4}, options), ElementsAre(ElementsAre(4)));
}

TEST(ProposeDrafts, NothingToGoBy) {
  const SpeculationOptions options{
      .draft_tokens = 2, .branches = 1, .match_max = 3, .match_min = 2};
  EXPECT_THAT(Drafts({}, options), IsEmpty());
  EXPECT_THAT(Drafts({1}, options), IsEmpty());
  EXPECT_THAT(Drafts({1, 2, 3, 1}, options), IsEmpty());  // one token is not enough
  SpeculationOptions none = options;
  none.draft_tokens = 0;
  EXPECT_THAT(Drafts({1, 2, 3, 1, 2}, none), IsEmpty());
}

TEST(ProposeDrafts, BranchesDifferInTheirFirstToken) {
  const SpeculationOptions options{
      .draft_tokens = 1, .branches = 2, .match_max = 2, .match_min = 2};
  EXPECT_THAT(Drafts({1, 2, 7, 1, 2, 6, 1, 2, 6, 1, 2, 5, 1, 2}, options),
              ElementsAre(ElementsAre(5), ElementsAre(6)));
}

class SpeculatorTest : public ::testing::Test {
 protected:
  static constexpr uint32_t kBlockTokens = 4;
  static constexpr uint32_t kNewTokens = 120;

  void SetUp() override {
    TransformerOptions options;
    options.block_tokens = kBlockTokens;
    options.rows_max = 64;
    transformer_ = SmallTransformer(options);
    ASSERT_NE(transformer_, nullptr);
    auto pool = BlockPool::Create(transformer_->block_memory(), 64 << 20,
                                  transformer_->geometry().BlockBytes());
    ASSERT_TRUE(pool.ok()) << pool.status();
    pool_ = *std::move(pool);
    // A prompt that repeats itself, so that there is something to propose from the start.
    std::mt19937 random(3);
    const std::vector<uint32_t> phrase = RandomTokens(random, 9, transformer_->config().vocab);
    for (int i = 0; i < 3; ++i) prompt_.insert(prompt_.end(), phrase.begin(), phrase.end());
  }

  std::vector<uint32_t> Greedily() {
    KvBlocks blocks(*pool_, kBlockTokens);
    std::vector<uint32_t> tokens = prompt_;
    std::vector<float> logits(transformer_->config().vocab);
    for (uint32_t computed = 0; tokens.size() < prompt_.size() + kNewTokens;) {
      blocks.Grow(tokens.size(), tokens.size());
      const Chunk chunk{.tokens = std::span(tokens).subspan(computed),
                        .position = computed,
                        .blocks = blocks.table()};
      EXPECT_TRUE(transformer_->Forward({&chunk, 1}, logits).ok());
      computed = static_cast<uint32_t>(tokens.size());
      tokens.push_back(Greedy(logits));
    }
    return tokens;
  }

  std::unique_ptr<Transformer> transformer_;
  std::unique_ptr<BlockPool> pool_;
  std::vector<uint32_t> prompt_;
};

TEST_F(SpeculatorTest, SameTokensInFewerPasses) {
  const std::vector<uint32_t> greedy = Greedily();
  for (const uint32_t branches : {1u, 3u}) {
    for (const uint32_t draft : {0u, 1u, 5u, 15u}) {
      SCOPED_TRACE(testing::Message() << draft << " draft tokens, " << branches << " branches");
      Speculator speculator(*transformer_, KvBlocks(*pool_, kBlockTokens), prompt_, 0,
                            {.draft_tokens = draft, .branches = branches, .match_min = 1});
      while (speculator.tokens().size() < greedy.size()) {
        const auto left = static_cast<uint32_t>(greedy.size() - speculator.tokens().size());
        ASSERT_TRUE(speculator.Step(left).ok());
        // What was rolled back holds no block, and neither does a fork.
        const uint64_t kept = speculator.tokens().size() - 1;
        ASSERT_EQ(pool_->used(), (kept + kBlockTokens - 1) / kBlockTokens);
      }
      EXPECT_THAT(speculator.tokens(), ::testing::ElementsAreArray(greedy));
      const SpeculationStats& stats = speculator.stats();
      EXPECT_EQ(stats.passes + stats.accepted_tokens, kNewTokens);
      if (draft > 0) {
        EXPECT_GT(stats.accepted_tokens, 0u);
        EXPECT_GT(stats.truncated_tokens, 0u);
      } else {
        EXPECT_EQ(stats.proposed_tokens, 0u);
      }
      EXPECT_EQ(stats.forks > 0, branches > 1 && draft > 0);
    }
  }
  EXPECT_EQ(pool_->used(), 0u);
}

TEST_F(SpeculatorTest, GoesOnFromComputedBlocks) {
  const std::vector<uint32_t> greedy = Greedily();
  const auto computed = static_cast<uint32_t>(prompt_.size() - 2);
  KvBlocks blocks(*pool_, kBlockTokens);
  blocks.Grow(computed, computed);
  const Chunk chunk{.tokens = std::span(prompt_).first(computed),
                    .position = 0,
                    .blocks = blocks.table(),
                    .logits = Logits::kNone};
  ASSERT_TRUE(transformer_->Forward({&chunk, 1}, {}).ok());
  Speculator speculator(*transformer_, std::move(blocks), prompt_, computed, {});
  ASSERT_TRUE(speculator.Step(kNewTokens).ok());
  EXPECT_THAT(speculator.tokens(),
              ::testing::ElementsAreArray(std::span(greedy).first(speculator.tokens().size())));
}

}  // namespace
}  // namespace larder::worker
