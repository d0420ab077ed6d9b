#include "client/worker/kv_blocks.h"

#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "gtest/gtest.h"
#include "tests/worker/test_daemon.h"

namespace larder::worker {
namespace {

class KvBlocksTest : public testing::Test {
 protected:
  static std::vector<uint32_t> Tokens(size_t count) { return std::vector<uint32_t>(count, 1); }

  bool InArena(const std::byte* block) {
    const std::span<std::byte> arena = *arena_;
    return block >= arena.data() && block < arena.data() + arena.size();
  }

  // The arena as this process's client maps it, which is not where the fake daemon has it.
  void NoteArena(const KvBlocks& blocks) { arena_ = {blocks.table()[0], FakeDaemon::kArenaBytes}; }

  TestDaemon daemon_;
  const std::unique_ptr<BlockPool> pool_ =
      *BlockPool::Create(HostBlockMemory(), 64 * kBlockBytes, kBlockBytes);
  std::optional<std::span<std::byte>> arena_;
};

TEST_F(KvBlocksTest, WithoutALeaseBlocksAreThePools) {
  KvBlocks blocks(*pool_, kBlockTokens);
  blocks.Grow(9, 100);
  EXPECT_EQ(blocks.size(), 3u);  // what is needed, not what is expected
  blocks.Grow(9, 100);
  EXPECT_EQ(blocks.size(), 3u);
  blocks.Publish(Tokens(9));
  EXPECT_EQ(blocks.counts().local, 3u);
  EXPECT_EQ(blocks.counts().published, 0u);
  EXPECT_EQ(pool_->used(), 3u);
}

TEST_F(KvBlocksTest, ReadsReservesAndPublishesInTheArena) {
  daemon_.HostBlock(1)[7] = std::byte{9};
  KvBlocks blocks(*pool_, daemon_.LookUp(2), /*publish=*/true);
  NoteArena(blocks);
  ASSERT_EQ(blocks.size(), 2u);
  EXPECT_EQ(blocks.table()[1][7], std::byte{9});

  // A prompt of 18 tokens, computed 6 at a time: one reservation.
  daemon_.AnswerReserve(2, 3);
  blocks.Grow(14, 18);
  EXPECT_EQ(blocks.size(), 5u);
  for (std::byte* block : blocks.table()) EXPECT_TRUE(InArena(block));
  blocks.Grow(18, 18);
  EXPECT_EQ(daemon_.fake().Calls("Reserve"), 1);

  // 14 tokens are 3 whole blocks, of which 2 were there.
  daemon_.AnswerState(3, 2);
  blocks.Publish(Tokens(14));
  EXPECT_EQ(daemon_.fake().LastPosition(), 2u);
  blocks.Publish(Tokens(15));
  EXPECT_EQ(daemon_.fake().Calls("Put"), 1);
  daemon_.AnswerState(4, 1);
  blocks.Publish(Tokens(18));
  EXPECT_EQ(daemon_.fake().LastPosition(), 3u);
  EXPECT_EQ(blocks.counts().published, 2u);
  EXPECT_EQ(pool_->used(), 0u);
}

TEST_F(KvBlocksTest, WhatTheCacheHasNoRoomForIsLocal) {
  KvBlocks blocks(*pool_, daemon_.LookUp(1), /*publish=*/true);
  NoteArena(blocks);
  daemon_.AnswerReserve(1, 1);
  blocks.Grow(12, 12);
  ASSERT_EQ(blocks.size(), 3u);
  EXPECT_TRUE(InArena(blocks.table()[1]));
  EXPECT_FALSE(InArena(blocks.table()[2]));
  // The reserved one is still published, the local one is not, and nothing is asked for again.
  daemon_.AnswerState(2, 0);
  blocks.Publish(Tokens(12));
  const int reserves = daemon_.fake().Calls("Reserve");
  daemon_.AnswerReserve(2, 8);
  blocks.Grow(20, 20);
  blocks.Publish(Tokens(20));
  EXPECT_EQ(daemon_.fake().Calls("Reserve"), reserves);
  EXPECT_EQ(daemon_.fake().Calls("Put"), 1);
  EXPECT_EQ(blocks.counts().published, 1u);
  EXPECT_EQ(blocks.counts().local, 3u);
}

TEST_F(KvBlocksTest, TruncatedBlocksGoBackToThePool) {
  KvBlocks blocks(*pool_, kBlockTokens);
  blocks.Grow(18, 18);
  EXPECT_EQ(pool_->used(), 5u);
  blocks.Truncate(9);
  EXPECT_EQ(blocks.size(), 3u);
  EXPECT_EQ(pool_->used(), 3u);
  blocks.Truncate(12);  // less than a block would be dropped
  EXPECT_EQ(blocks.size(), 3u);
}

TEST_F(KvBlocksTest, WhatWasTruncatedIsReservedStillAndNotPublished) {
  KvBlocks blocks(*pool_, daemon_.LookUp(1), /*publish=*/true);
  daemon_.AnswerReserve(1, 3);
  blocks.Grow(16, 16);
  const std::vector<std::byte*> table(blocks.table().begin(), blocks.table().end());
  blocks.Truncate(6);
  EXPECT_EQ(blocks.size(), 2u);
  blocks.Grow(16, 16);
  EXPECT_EQ(std::vector<std::byte*>(blocks.table().begin(), blocks.table().end()), table);
  EXPECT_EQ(pool_->used(), 0u);
  blocks.Truncate(7);
  daemon_.AnswerState(1, 3);
  blocks.Publish(Tokens(7));
  EXPECT_EQ(blocks.counts().published, 0u);
}

// As a CUDA arena's, which this process does not map: reserved, but never written.
TEST_F(KvBlocksTest, WhatIsNotMappedIsNotPublished) {
  KvBlocks blocks(*pool_, daemon_.LookUp(1), /*publish=*/true);
  v1::ReserveResponse answer;
  for (uint32_t position : {1, 2}) {
    *answer.add_runs() = FakeDaemon::HostRun(position, {0});
    answer.mutable_runs()->rbegin()->set_arena(9);
  }
  daemon_.fake().AnswerReserve(answer);
  blocks.Grow(12, 12);
  EXPECT_EQ(blocks.counts().local, 2u);
  blocks.Publish(Tokens(12));
  EXPECT_EQ(daemon_.fake().Calls("Put"), 0);
}

TEST_F(KvBlocksTest, AFailedPutIsTheLast) {
  KvBlocks blocks(*pool_, daemon_.LookUp(1), /*publish=*/true);
  daemon_.AnswerReserve(1, 2);
  blocks.Grow(12, 12);
  daemon_.fake().AnswerError("Put", grpc::Status(grpc::ABORTED, "elsewhere"));
  blocks.Publish(Tokens(8));
  daemon_.fake().AnswerError("Put", grpc::Status::OK);
  blocks.Publish(Tokens(12));
  EXPECT_EQ(daemon_.fake().Calls("Put"), 1);
  EXPECT_EQ(blocks.counts().published, 0u);
}

TEST_F(KvBlocksTest, OutlivesItsDaemon) {
  daemon_.HostBlock(0)[3] = std::byte{5};
  KvBlocks blocks(*pool_, daemon_.LookUp(2), /*publish=*/true);
  daemon_.AnswerReserve(2, 1);
  blocks.Grow(12, 12);
  daemon_.Kill();
  std::memset(blocks.table()[2], 1, kBlockBytes);
  blocks.Publish(Tokens(12));
  blocks.Grow(20, 20);
  std::memset(blocks.table()[4], 1, kBlockBytes);
  EXPECT_EQ(blocks.table()[0][3], std::byte{5});
  EXPECT_EQ(blocks.counts().published, 0u);
  EXPECT_EQ(blocks.counts().local, 2u);
}

TEST_F(KvBlocksTest, OnlyReadsWithoutPublishing) {
  KvBlocks blocks(*pool_, daemon_.LookUp(1), /*publish=*/false);
  daemon_.AnswerReserve(1, 8);
  blocks.Grow(8, 8);
  blocks.Publish(Tokens(8));
  EXPECT_EQ(daemon_.fake().Calls("Reserve"), 0);
  EXPECT_EQ(daemon_.fake().Calls("Put"), 0);
}

TEST_F(KvBlocksTest, AForkSharesWholeBlocksAndCopiesTheTail) {
  KvBlocks blocks(*pool_, kBlockTokens);
  blocks.Grow(10, 10);
  std::memset(blocks.table()[2], 3, kBlockBytes);
  KvBlocks fork = blocks.Fork(10);
  ASSERT_EQ(fork.size(), 3u);
  EXPECT_EQ(fork.table()[0], blocks.table()[0]);
  EXPECT_EQ(fork.table()[1], blocks.table()[1]);
  ASSERT_NE(fork.table()[2], blocks.table()[2]);
  EXPECT_EQ(std::memcmp(fork.table()[2], blocks.table()[2], kBlockBytes), 0);
  EXPECT_EQ(pool_->used(), 4u);
  // At the end of a block there is nothing to copy.
  KvBlocks even = blocks.Fork(8);
  EXPECT_EQ(even.size(), 2u);
  EXPECT_EQ(pool_->used(), 4u);
  // Shared blocks stay as long as anybody reads them.
  blocks = KvBlocks(*pool_, kBlockTokens);
  EXPECT_EQ(pool_->used(), 3u);
}

TEST_F(KvBlocksTest, AForkHasALeaseAndATailOfItsOwn) {
  KvBlocks blocks(*pool_, daemon_.LookUp(2), /*publish=*/true);
  NoteArena(blocks);
  daemon_.AnswerReserve(2, 1);
  blocks.Grow(10, 10);
  std::memset(blocks.table()[2], 3, kBlockBytes);
  daemon_.AnswerState(2, 0);
  daemon_.AnswerReserve(2, 1);
  KvBlocks fork = blocks.Fork(10);
  EXPECT_EQ(daemon_.fake().Calls("Fork"), 1);
  EXPECT_TRUE(InArena(fork.table()[2]));
  EXPECT_EQ(pool_->used(), 0u);
  daemon_.AnswerState(3, 0);
  fork.Publish(Tokens(12));
  EXPECT_EQ(fork.counts().published, 1u);
}

TEST_F(KvBlocksTest, AForkWithoutALeaseKeepsItsParents) {
  daemon_.HostBlock(1)[3] = std::byte{5};
  std::optional<KvBlocks> blocks(std::in_place, *pool_, daemon_.LookUp(2), /*publish=*/true);
  daemon_.fake().AnswerError("Fork", grpc::Status(grpc::RESOURCE_EXHAUSTED, "leases"));
  KvBlocks fork = blocks->Fork(8);
  blocks.reset();
  // The parent's lease pins what the fork reads. A lookup waits for releases that were sent.
  const Lease before = daemon_.LookUp(0);
  EXPECT_EQ(daemon_.fake().Calls("Release"), 0);
  EXPECT_EQ(fork.table()[1][3], std::byte{5});
  fork.Grow(12, 12);
  EXPECT_EQ(fork.counts().local, 1u);
  fork = KvBlocks(*pool_, kBlockTokens);
  const Lease after = daemon_.LookUp(0);
  EXPECT_EQ(daemon_.fake().Calls("Release"), 1);
}

TEST_F(KvBlocksTest, APrivateBlockIsACopy) {
  daemon_.HostBlock(1)[3] = std::byte{5};
  KvBlocks blocks(*pool_, daemon_.LookUp(2), /*publish=*/true);
  NoteArena(blocks);
  std::byte* const cached = blocks.table()[1];
  blocks.MakePrivate(1);
  EXPECT_FALSE(InArena(blocks.table()[1]));
  EXPECT_EQ(blocks.table()[1][3], std::byte{5});
  blocks.table()[1][3] = std::byte{6};
  EXPECT_EQ(cached[3], std::byte{5});
  // The lease still ends behind it: the next block is reserved at position 2.
  daemon_.AnswerReserve(2, 1);
  blocks.Grow(9, 9);
  EXPECT_EQ(daemon_.fake().LastPosition(), 2u);
  EXPECT_TRUE(InArena(blocks.table()[2]));
}

TEST_F(KvBlocksTest, ALeaseOfALostSessionHasNothing) {
  Lease lease = daemon_.LookUp(2);
  daemon_.Kill();
  while (lease.Block(0).ok()) {
  }
  KvBlocks blocks(*pool_, std::move(lease), /*publish=*/true);
  EXPECT_EQ(blocks.size(), 0u);
  blocks.Grow(5, 5);
  EXPECT_EQ(blocks.counts().local, 2u);
}

}  // namespace
}  // namespace larder::worker
