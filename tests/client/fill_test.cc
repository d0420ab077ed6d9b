#include "client/fill.h"

#include <gtest/gtest.h>

#include <numeric>

namespace larder {
namespace {

std::vector<uint32_t> Tokens(size_t count) {
  std::vector<uint32_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), 1);
  return tokens;
}

std::vector<std::byte> Filled(uint64_t seed, size_t bytes) {
  std::vector<std::byte> block(bytes);
  FillBlock(seed, block);
  return block;
}

TEST(BlockSeeds, OnlyWholeBlocks) {
  EXPECT_EQ(BlockSeeds(1, Tokens(15), 16).size(), 0u);
  EXPECT_EQ(BlockSeeds(1, Tokens(47), 16).size(), 2u);
}

// These are on disks and in other processes: they must be the same for ever.
TEST(BlockSeeds, AreDeterministic) {
  const std::vector<uint64_t> seeds = BlockSeeds(0x1234, Tokens(32), 16);
  EXPECT_EQ(seeds, BlockSeeds(0x1234, Tokens(32), 16));
  EXPECT_EQ(Filled(seeds[1], 100), Filled(seeds[1], 100));
}

TEST(BlockSeeds, DependOnModelTokensAndHistory) {
  const std::vector<uint32_t> tokens = Tokens(48);
  const std::vector<uint64_t> seeds = BlockSeeds(1, tokens, 16);
  EXPECT_NE(seeds[2], BlockSeeds(2, tokens, 16)[2]);
  std::vector<uint32_t> other_history = tokens;
  ++other_history[3];
  EXPECT_NE(seeds[2], BlockSeeds(1, other_history, 16)[2]);
  std::vector<uint32_t> other_tokens = tokens;
  ++other_tokens[40];
  const std::vector<uint64_t> other = BlockSeeds(1, other_tokens, 16);
  EXPECT_EQ(seeds[1], other[1]);
  EXPECT_NE(seeds[2], other[2]);
  // The same tokens at another position.
  std::vector<uint32_t> repeated = Tokens(16);
  repeated.insert(repeated.end(), tokens.begin(), tokens.begin() + 16);
  const std::vector<uint64_t> twice = BlockSeeds(1, repeated, 16);
  EXPECT_NE(twice[0], twice[1]);
}

class WrongBytesTest : public testing::TestWithParam<size_t> {};

TEST_P(WrongBytesTest, CountsEveryByte) {
  std::vector<std::byte> block = Filled(77, GetParam());
  EXPECT_EQ(WrongBytes(77, block), 0u);
  if (block.empty()) return;
  block.front() ^= std::byte{1};
  EXPECT_EQ(WrongBytes(77, block), 1u);
  if (block.size() == 1) return;
  block.back() ^= std::byte{0x80};
  EXPECT_EQ(WrongBytes(77, block), 2u);
}

INSTANTIATE_TEST_SUITE_P(Sizes, WrongBytesTest,
                         testing::Values(0, 1, 7, 8, 511, 512, 513, 4096, 65536, 100'003));

TEST(WrongBytes, AnotherBlockIsWrongNearlyEverywhere) {
  const std::vector<std::byte> block = Filled(1, 65536);
  EXPECT_GT(WrongBytes(2, block), 65536u * 98 / 100);
  EXPECT_GT(WrongBytes(1, std::vector<std::byte>(65536)), 65536u * 98 / 100);
}

}  // namespace
}  // namespace larder
