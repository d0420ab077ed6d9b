#include "client/worker/block_pool.h"

#include <cstring>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace larder::worker {
namespace {

TEST(BlockPool, GivesEachBlockOnceUntilItComesBack) {
  const auto pool = *BlockPool::Create(HostBlockMemory(), 10 * 4096 + 100, 4096);
  ASSERT_EQ(pool->blocks(), 10u);
  std::vector<BlockRef> blocks;
  std::set<std::byte*> places;
  for (int i = 0; i < 10; ++i) {
    blocks.push_back(pool->Take());
    std::memset(blocks.back().get(), i, 4096);
    places.insert(blocks.back().get());
  }
  EXPECT_EQ(places.size(), 10u);
  EXPECT_EQ(pool->used(), 10u);
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(blocks[i].get()[0], std::byte(i));
    EXPECT_EQ(blocks[i].get()[4095], std::byte(i));
  }
  const BlockRef shared = blocks[3];
  std::byte* const free = blocks[4].get();
  blocks.clear();
  EXPECT_EQ(pool->used(), 1u);
  EXPECT_EQ(shared.get()[0], std::byte{3});
  // The nine others again, and not the shared one.
  for (int i = 0; i < 9; ++i) blocks.push_back(pool->Take());
  std::set<std::byte*> again;
  for (const BlockRef& block : blocks) again.insert(block.get());
  EXPECT_EQ(again.size(), 9u);
  EXPECT_TRUE(again.contains(free));
  EXPECT_FALSE(again.contains(shared.get()));
}

// Codes with their scales: a block of any size.
TEST(BlockPool, BlocksAreAlignedWhateverTheirSize) {
  const auto pool = *BlockPool::Create(HostBlockMemory(), 10 * 192, 160);
  ASSERT_EQ(pool->blocks(), 10u);
  EXPECT_EQ(pool->block_bytes(), 160u);
  const BlockRef first = pool->Take();
  const BlockRef second = pool->Take();
  EXPECT_EQ(reinterpret_cast<uintptr_t>(first.get()) % 64, 0u);
  EXPECT_EQ(second.get() - first.get(), 192);
}

TEST(BlockPool, RefusesLessThanABlock) {
  EXPECT_EQ(BlockPool::Create(HostBlockMemory(), 4095, 4096).status().message(),
            "pool_bytes: 4095 given, must be at least one block, 4096");
}

}  // namespace
}  // namespace larder::worker
