#include "client/worker/streaming_blocks.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "tests/worker/test_models.h"

namespace larder::worker {
namespace {

constexpr uint32_t kBlockTokens = 4;

std::unique_ptr<BlockPool> Pool(uint64_t blocks, uint64_t block_bytes) {
  auto pool = BlockPool::Create(HostBlockMemory(), blocks * block_bytes, block_bytes);
  EXPECT_TRUE(pool.ok()) << pool.status();
  return *std::move(pool);
}

TEST(StreamingBlocks, KeepsSinksAndWindow) {
  const auto pool = Pool(6, 64);  // as many as there ever are, and none more
  StreamingBlocks blocks(*pool, kBlockTokens, /*sink_blocks=*/1, /*window_blocks=*/3);
  std::byte* first = nullptr;
  for (uint32_t step = 0; step < 20; ++step) {
    const std::vector<std::byte*> before(blocks.table().begin(), blocks.table().end());
    blocks.Grow(2 * kBlockTokens);
    const std::vector<std::byte*> after(blocks.table().begin(), blocks.table().end());
    EXPECT_EQ(pool->used(), after.size());
    EXPECT_EQ(blocks.given_back() + after.size(), 2 * (step + 1));
    EXPECT_EQ(blocks.position(), (after.size() - 2) * kBlockTokens);
    if (step == 0) first = after[0];
    EXPECT_EQ(after[0], first);
    if (step < 2) continue;
    ASSERT_EQ(after.size(), 6u);
    // The window: the last blocks of before.
    EXPECT_TRUE(std::equal(after.begin() + 1, after.begin() + 4, before.end() - 3));
  }
}

TEST(StreamingBlocks, WithoutAWindowNothingIsGivenBack) {
  const auto pool = Pool(40, 64);
  StreamingBlocks blocks(*pool, kBlockTokens, 0, 0);
  for (int step = 0; step < 10; ++step) blocks.Grow(4 * kBlockTokens);
  EXPECT_EQ(pool->used(), 40u);
  EXPECT_EQ(blocks.given_back(), 0u);
  EXPECT_EQ(blocks.position(), 36 * kBlockTokens);
}

// A model reads a text ten times as long as table and pool could hold. As long as nothing was
// given back, its logits are those of a table that keeps everything.
TEST(StreamingBlocks, AModelReadsATextWithoutAnEnd) {
  constexpr uint32_t kSinks = 1, kWindow = 6, kStep = 2 * kBlockTokens;
  TransformerOptions options;
  options.block_tokens = kBlockTokens;
  options.keys_before_rope = true;
  options.window = AttentionWindow{.sink_tokens = kSinks * kBlockTokens,
                                   .window_tokens = kWindow * kBlockTokens};
  const auto transformer = SmallTransformer(options);
  ASSERT_NE(transformer, nullptr);
  const uint64_t block_bytes = transformer->geometry().BlockBytes();
  const auto pool = Pool(kSinks + kWindow + 2, block_bytes);
  const auto large_pool = Pool(200, block_bytes);
  StreamingBlocks streaming(*pool, kBlockTokens, kSinks, kWindow);
  StreamingBlocks keeping(*large_pool, kBlockTokens, 0, 0);
  std::mt19937 random(5);
  const uint32_t vocab = transformer->config().vocab;
  const std::vector<uint32_t> tokens = RandomTokens(random, 400, vocab);
  for (uint32_t begin = 0; begin < tokens.size(); begin += kStep) {
    std::vector<float> logits[2];
    for (StreamingBlocks* blocks : {&streaming, &keeping}) {
      blocks->Grow(kStep);
      const Chunk chunk{.tokens = std::span(tokens).subspan(begin, kStep),
                        .position = blocks->position(),
                        .blocks = blocks->table()};
      std::vector<float>& row = logits[blocks == &keeping];
      row.resize(vocab);
      ASSERT_TRUE(transformer->Forward({&chunk, 1}, row).ok());
    }
    if (streaming.given_back() == 0) {
      EXPECT_EQ(logits[0], logits[1]) << begin;
    }
    for (const float logit : logits[0]) ASSERT_TRUE(std::isfinite(logit));
  }
  EXPECT_EQ(streaming.given_back(), tokens.size() / kBlockTokens - (kSinks + kWindow + 2));
}

}  // namespace
}  // namespace larder::worker
