// What is durable, what comes back, and what is doubtful: rules 5 and 6 of the tree.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "tests/cache/cache_fixture.h"

namespace larder::testing {
namespace {

TEST(Nvme, DurableBlocksSurviveARestartAndComeBackBitForBit) {
  Fixture f({.gpu = 4, .host = 4, .nvme = 16});
  const Tokens prompt = Prompt("p", 3);
  f.Store(prompt, Tier::kHost);
  ASSERT_TRUE(f.world.Settle());
  f.world.Restart();
  f.Open();
  EXPECT_EQ(f.cache().Stats().tiers[2].blocks, 3u);
  const LookupResult found = f.Look(prompt + Prompt("q", 1));
  EXPECT_EQ(found.matched_blocks, 3u);
  ASSERT_EQ(found.runs.size(), 1u);
  EXPECT_EQ(found.runs[0].tier, Tier::kNvme);
  EXPECT_EQ(found.runs[0].slots.size(), 3u);
  EXPECT_EQ(found.restore.bytes, 3 * World::kPartBytes);
  f.cache().CheckInvariants();
  const auto update = f.world.PrefetchAll(f.session, found.lease, Tier::kGpu);
  ASSERT_TRUE(update.has_value());
  EXPECT_EQ(update->ready_blocks, 3u);
  EXPECT_EQ(f.world.WrongBytes(f.model, update->runs, prompt), "");
  EXPECT_EQ(f.Where(prompt)[0], 3u);
}

TEST(Nvme, WhatWasNotYetWrittenIsAMissAfterARestart) {
  Fixture f({.host = 8, .nvme = 16});
  f.Store(Prompt("p", 3));
  ASSERT_TRUE(f.world.mover.Step());
  f.world.Restart();
  f.Open();
  EXPECT_EQ(f.Matched(Prompt("p", 3)), 1u);
}

TEST(Nvme, AModelIsReadByItsOwnGeometryOnly) {
  Fixture f({.host = 8, .nvme = 16});
  f.Store(Prompt("p", 2));
  ASSERT_TRUE(f.world.Settle());
  f.world.Restart();
  const ModelId other = f.cache().OpenModel(World::Spec("other"))->id;
  f.Open();
  LookupOptions peek;
  peek.peek = true;
  EXPECT_EQ(f.cache().Lookup(0, other, Prompt("p", 2), peek)->matched_blocks, 0u);
  EXPECT_EQ(f.Matched(Prompt("p", 2)), 2u);
}

// Rule 6: an ancestor is written before its descendants.
TEST(Nvme, NoBlockIsDurableBeforeItsAncestors) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    Fixture f({.gpu = 8, .host = 8, .nvme = 16});
    f.world.mover.faults.reorder = true;
    const LeaseId lease = f.Hold(Prompt("p", 2) + Prompt(std::to_string(seed), 4));
    ASSERT_TRUE(f.cache().Flush(f.session, lease, [](absl::Status) {}).ok());
    uint32_t before = 0;
    while (f.world.mover.Step()) {
      f.cache().CheckInvariants();
      const uint32_t durable = f.cache().GetLease(f.session, lease)->durable_blocks;
      // What a crash now would find is a prefix.
      std::set<uint32_t> depths;
      for (const auto& [slot, stored] : f.world.mover.nvme) depths.insert(stored.record.depth);
      for (uint32_t i = 0; i < durable; ++i) EXPECT_TRUE(depths.contains(i));
      EXPECT_GE(durable, before);
      before = durable;
    }
    EXPECT_EQ(before, 6u);
  }
}

// DESIGN.md section 10: checksum or key mismatch.
TEST(Nvme, AFlippedPayloadIsAMissAndCountedOnce) {
  Fixture f({.host = 8, .nvme = 16});
  const Tokens prompt = Prompt("p", 4);
  f.Store(prompt);
  ASSERT_TRUE(f.world.Settle());
  f.world.Restart();
  f.Open();
  const LookupResult found = f.Look(prompt);
  ASSERT_EQ(found.matched_blocks, 4u);
  // The third block's payload is another's.
  f.world.mover.nvme.at(found.runs[0].slots[2]).torn = true;
  const auto update = f.world.PrefetchAll(f.session, found.lease, Tier::kHost);
  ASSERT_TRUE(update.has_value());
  EXPECT_EQ(update->ready_blocks, 2u);
  EXPECT_EQ(update->unreadable_position, 2u);
  EXPECT_EQ(f.world.WrongBytes(f.model, update->runs, prompt), "");
  EXPECT_EQ(f.cache().GetLease(f.session, found.lease)->end, 4u);
  ASSERT_TRUE(f.world.Settle());
  f.cache().CheckInvariants();
  EXPECT_EQ(f.cache().Stats().corrupt_blocks, 1u);
  const LookupResult again = f.Look(prompt);
  EXPECT_EQ(again.matched_blocks, 2u) << "a miss from now on";
  f.Release(again.lease);
  ASSERT_TRUE(f.cache().Truncate(f.session, found.lease, 2).ok());
  ASSERT_TRUE(f.Extend(found.lease, prompt, 2).ok());
  ASSERT_TRUE(f.world.Settle());
  EXPECT_EQ(f.cache().GetLease(f.session, found.lease)->durable_blocks, 4u);
  EXPECT_EQ(f.cache().Stats().corrupt_blocks, 1u);
  f.Release(found.lease);
  EXPECT_EQ(f.Matched(prompt), 4u);
  f.world.Restart();
  f.Open();
  EXPECT_EQ(f.Matched(prompt), 4u);
  f.cache().CheckInvariants();
}

TEST(Nvme, OrphansAreCollectedAtStart) {
  Fixture f({.host = 8, .nvme = 16});
  f.Store(Prompt("p", 4));
  ASSERT_TRUE(f.world.Settle());
  auto& nvme = f.world.mover.nvme;
  const auto second = std::find_if(nvme.begin(), nvme.end(),
                                   [](const auto& s) { return s.second.record.depth == 1; });
  nvme.erase(second);
  f.world.Restart();
  f.Open();
  EXPECT_EQ(f.cache().Stats().orphans_collected, 2u);
  EXPECT_EQ(f.cache().Stats().tiers[2].blocks, 1u);
  EXPECT_EQ(nvme.size(), 1u) << "their records are erased";
  EXPECT_EQ(f.Matched(Prompt("p", 4)), 1u);
  f.cache().CheckInvariants();
}

TEST(Nvme, ARecordThatCannotBelongToTheTierIsRefused) {
  Fixture f({.host = 4, .nvme = 4});
  BlockRecord record;
  EXPECT_FALSE(f.cache().RecoverBlock(Slot(), World::kPartBytes, record));
  EXPECT_FALSE(f.cache().RecoverBlock(Slot(1), 0, record));
  EXPECT_FALSE(f.cache().RecoverBlock(Slot(5), World::kPartBytes, record));
  EXPECT_FALSE(f.cache().RecoverBlock(Slot(1), 5 * World::kPartBytes, record));
  EXPECT_TRUE(f.cache().RecoverBlock(Slot(4), World::kPartBytes, record));
}

TEST(Nvme, FlushCompletesOnlyWhenAllIsDurable) {
  Fixture f({.gpu = 4, .host = 4, .nvme = 8});
  const LeaseId lease = f.Hold(Prompt("p", 3), Tier::kGpu);
  int done = 0;
  ASSERT_TRUE(f.cache()
                  .Flush(f.session, lease,
                         [&](absl::Status status) {
                           EXPECT_TRUE(status.ok());
                           done += 1;
                         })
                  .ok());
  while (done == 0) {
    EXPECT_LT(f.cache().GetLease(f.session, lease)->durable_blocks, 3u);
    ASSERT_TRUE(f.world.mover.Step());
  }
  EXPECT_EQ(f.cache().GetLease(f.session, lease)->durable_blocks, 3u);
  EXPECT_EQ(f.world.mover.nvme.size(), 3u);
  EXPECT_TRUE(f.world.Settle());
  EXPECT_EQ(done, 1);
  // Of what is durable already, at once.
  ASSERT_TRUE(f.cache().Flush(f.session, lease, [&](absl::Status) { done += 1; }).ok());
  EXPECT_EQ(done, 2);
}

TEST(Nvme, AFlushSurvivesAFailedWriteAndEndsWithItsLease) {
  Fixture f({.host = 4, .nvme = 8});
  const LeaseId lease = f.Hold(Prompt("p", 2));
  std::vector<absl::Status> done;
  ASSERT_TRUE(f.cache().Flush(f.session, lease, [&](absl::Status s) { done.push_back(s); }).ok());
  f.world.mover.Complete(f.world.mover.jobs().front().id, absl::InternalError("EIO"));
  f.cache().CheckInvariants();
  ASSERT_TRUE(f.world.Settle());
  ASSERT_EQ(done.size(), 1u) << "written again";
  EXPECT_TRUE(done[0].ok());

  const LeaseId other = f.Hold(Prompt("q", 1));
  ASSERT_TRUE(f.cache().Flush(f.session, other, [&](absl::Status s) { done.push_back(s); }).ok());
  f.Release(other);
  ASSERT_EQ(done.size(), 2u);
  EXPECT_TRUE(absl::IsCancelled(done[1]));
  const LeaseId third = f.Hold(Prompt("r", 1));
  const auto id = f.cache().Flush(f.session, third, [&](absl::Status s) { done.push_back(s); });
  EXPECT_TRUE(f.cache().CancelFlush(*id));
  EXPECT_FALSE(f.cache().CancelFlush(*id));
  ASSERT_TRUE(f.world.Settle());
  EXPECT_EQ(done.size(), 2u);
}

TEST(Nvme, WhenNotWritableFlushIsUnavailableAndReserveStillWorks) {
  Fixture f({.host = 4, .nvme = 8});
  f.Store(Prompt("kept", 1));
  ASSERT_TRUE(f.world.Settle());
  f.cache().SetNvmeWritable(false);
  const LeaseId lease = f.Hold(Prompt("p", 1));
  EXPECT_TRUE(absl::IsUnavailable(f.cache().Flush(f.session, lease, [](absl::Status) {}).status()));
  f.Release(lease);
  f.Store(Prompt("a", 2));
  f.Store(Prompt("b", 3));
  EXPECT_EQ(f.world.mover.nvme.size(), 1u);
  EXPECT_EQ(f.Matched(Prompt("b", 3)), 3u) << "the coldest dirty leaves went";
  EXPECT_EQ(f.Where(Prompt("kept", 1)), (Tiers{0, 0, 1})) << "reads of healthy slots go on";
  const LeaseId kept = f.Look(Prompt("kept", 1)).lease;
  EXPECT_EQ(f.world.PrefetchAll(f.session, kept, Tier::kHost)->ready_blocks, 1u);
  f.cache().SetNvmeWritable(true);
  ASSERT_TRUE(f.world.Settle());
  EXPECT_GT(f.world.mover.nvme.size(), 2u) << "what is left is written now";
  f.cache().CheckInvariants();
}

TEST(Nvme, BlocksSinkThroughTheTiersUnderPressure) {
  Fixture f({.gpu = 4, .host = 4, .nvme = 32, .low_water = 2});
  for (int i = 0; i < 8; ++i) {
    f.Store(Prompt(std::to_string(i), 2), Tier::kGpu);
    ASSERT_TRUE(f.world.Settle());
    f.cache().CheckInvariants();
  }
  for (int i = 0; i < 8; ++i) EXPECT_EQ(f.Matched(Prompt(std::to_string(i), 2)), 2u) << i;
  EXPECT_EQ(f.Where(Prompt("7", 2))[0], 2u);
  EXPECT_EQ(f.Where(Prompt("0", 2)), (Tiers{0, 0, 2}));
  const LookupResult coldest = f.Look(Prompt("0", 2));
  const auto update = f.world.PrefetchAll(f.session, coldest.lease, Tier::kGpu);
  EXPECT_EQ(update->ready_blocks, 2u);
  EXPECT_EQ(f.world.WrongBytes(f.model, update->runs, Prompt("0", 2)), "");
}

TEST(Nvme, TheCleanerKeepsHostSlotsFreeOnceTheirBlocksAreDurable) {
  Fixture f({.host = 8, .nvme = 32, .low_water = 3});
  for (const char* name : {"a", "b"}) f.Store(Prompt(name, 4));
  EXPECT_EQ(f.cache().Stats().tiers[1].bytes_used, 8 * kSlotGranule) << "not durable yet";
  ASSERT_TRUE(f.world.Settle());
  EXPECT_EQ(f.cache().Stats().tiers[1].bytes_used, 5 * kSlotGranule);
  EXPECT_EQ(f.Where(Prompt("a", 4)), (Tiers{0, 1, 3}));
  f.cache().CheckInvariants();
}

// HOST is full of blocks that wait for an ancestor in GPU to be written before them: the
// coldest is given up for it, although it is on the very path that is being written.
TEST(Nvme, AHostTierFullOfBlocksThatWaitForAnAncestorGivesOneUp) {
  Fixture f({.gpu = 2, .host = 2, .nvme = 8});
  f.Store(Prompt("p", 1) + Prompt("x", 1), Tier::kGpu);
  f.Store(Prompt("p", 1) + Prompt("y", 2), Tier::kHost);
  f.cache().CheckInvariants();
  ASSERT_TRUE(f.world.Settle());
  f.cache().CheckInvariants();
  EXPECT_EQ(f.Matched(Prompt("p", 1) + Prompt("y", 2)), 2u);
  f.world.Restart();
  f.Open();
  EXPECT_EQ(f.Matched(Prompt("p", 1) + Prompt("y", 2)), 2u) << "both are durable";
}

TEST(Nvme, TheLeastRecentLeavesGoFirst) {
  Fixture f({.host = 2, .nvme = 4});
  for (const char* name : {"a", "b"}) {
    f.Store(Prompt(name, 2));
    ASSERT_TRUE(f.world.Settle());
  }
  const LeaseId lease = f.Look(Prompt("a", 2)).lease;  // recent again
  ASSERT_EQ(f.world.PrefetchAll(f.session, lease, Tier::kHost)->ready_blocks, 2u);
  f.Release(lease);
  f.Store(Prompt("c", 1));
  ASSERT_TRUE(f.world.Settle());
  f.Store(Prompt("d", 1));
  ASSERT_TRUE(f.world.Settle());
  f.cache().CheckInvariants();
  EXPECT_EQ(f.Matched(Prompt("a", 2)), 2u);
  EXPECT_EQ(f.Matched(Prompt("b", 2)), 0u);
}

TEST(Nvme, ALeaseOnAColdPathKeepsItFromBeingEvicted) {
  Fixture f({.host = 2, .nvme = 2});
  f.Store(Prompt("p", 2));
  ASSERT_TRUE(f.world.Settle());
  f.world.Restart();
  f.Open();
  const LookupResult found = f.Look(Prompt("p", 2));
  f.Store(Prompt("q", 2));
  ASSERT_TRUE(f.world.Settle());
  EXPECT_EQ(f.cache().Evict(Tier::kNvme, 0, 10).first, 0u);
  EXPECT_EQ(f.world.PrefetchAll(f.session, found.lease, Tier::kHost).has_value(), true);
  f.Release(found.lease);
  EXPECT_EQ(f.cache().GetLease(f.session, found.lease).ok(), false);
  f.cache().CheckInvariants();
}

TEST(Nvme, APutOfWhatOnlyNvmeHoldsIsNotWrittenAgain) {
  Fixture f({.host = 4, .nvme = 8});
  f.Store(Prompt("p", 2));
  ASSERT_TRUE(f.world.Settle());
  f.world.Restart();
  f.Open();
  const LeaseId lease = f.EmptyLease();
  const auto state = f.Extend(lease, Prompt("p", 2), 2);
  ASSERT_TRUE(state.ok());
  EXPECT_EQ(f.world.mover.queued(), 0u);
  EXPECT_EQ(f.cache().GetLease(f.session, lease)->durable_blocks, 2u);
  f.cache().CheckInvariants();
}

TEST(Nvme, WhatWasEvictedStaysAwayAfterARestart) {
  Fixture f({.host = 8, .nvme = 16});
  f.Store(Prompt("gone", 3));
  ASSERT_TRUE(f.world.Settle());
  f.cache().Evict(Tier::kHost, 0, 8);
  f.Store(Prompt("kept", 2));
  ASSERT_TRUE(f.world.Settle());
  EXPECT_EQ(f.cache().Evict(Tier::kNvme, f.model, 16).first, 3u) << "memory has the others too";
  EXPECT_EQ(f.world.mover.nvme.size(), 2u);
  f.world.Restart();
  f.Open();
  EXPECT_EQ(f.Matched(Prompt("gone", 3)), 0u);
  EXPECT_EQ(f.Matched(Prompt("kept", 2)), 2u);
}

TEST(Nvme, AfterARestartTheOldestRecordsGoFirst) {
  Fixture f({.host = 4, .nvme = 4});
  for (const char* name : {"c", "a", "d", "b"}) {
    f.Store(Prompt(name, 1));
    ASSERT_TRUE(f.world.Settle());
  }
  uint64_t now_s = 1000;
  for (const char* name : {"a", "b", "c", "d"}) {
    for (auto& [slot, stored] : f.world.mover.nvme) {
      if (stored.content == World::Content(f.model, Prompt(name, 1), 0)) {
        stored.record.written_at_s = now_s++;
      }
    }
  }
  f.world.Restart();
  f.Open();
  f.Store(Prompt("new", 2));
  ASSERT_TRUE(f.world.Settle());
  EXPECT_EQ(f.Matched(Prompt("a", 1)) + f.Matched(Prompt("b", 1)), 0u);
  EXPECT_EQ(f.Matched(Prompt("c", 1)) + f.Matched(Prompt("d", 1)), 2u);
}

TEST(Nvme, WritesStayWithinTheirLimitAndWhatMustLeaveIsForgottenAndCounted) {
  Fixture f({.host = 8,
             .nvme = 64,
             .low_water = 2,
             .nvme_writes = {.bytes_per_day = 5 * World::kPartBytes}});
  for (int i = 0; i < 6; ++i) {
    f.Store(Prompt("p" + std::to_string(i), 3));
    ASSERT_TRUE(f.world.Settle());
    f.cache().CheckInvariants();
  }
  EXPECT_EQ(f.world.mover.nvme.size(), 5u);
  EXPECT_EQ(f.cache().Stats().tiers[2].blocks, 5u);
  uint64_t found = 0;
  for (int i = 0; i < 6; ++i) found += f.Matched(Prompt("p" + std::to_string(i), 3));
  EXPECT_EQ(f.cache().Stats().limited_blocks, 18 - found);
  EXPECT_LT(found, 18u);
  f.world.clock.Advance(absl::Hours(25));
  f.Store(Prompt("another day", 3));
  ASSERT_TRUE(f.world.Settle());
  EXPECT_EQ(f.world.mover.nvme.size(), 10u);
}

TEST(Nvme, AFlushBeyondTheLimitWaitsForIt) {
  Fixture f({.host = 8, .nvme = 64, .nvme_writes = {.bytes_per_second = World::kPartBytes / 2}});
  const LeaseId lease = f.Hold(Prompt("p", 3));
  int done = 0;
  ASSERT_TRUE(f.cache().Flush(f.session, lease, [&](absl::Status) { ++done; }).ok());
  ASSERT_TRUE(f.world.Settle());
  EXPECT_EQ(f.world.mover.nvme.size(), 1u);
  EXPECT_EQ(done, 0);
  for (int i = 0; i < 2; ++i) {
    f.world.clock.Advance(absl::Milliseconds(1500));
    ASSERT_TRUE(f.world.Settle());
  }
  EXPECT_EQ(f.world.mover.nvme.size(), 3u);
  EXPECT_EQ(done, 1);
}

TEST(Nvme, AFinishedConversationIsNotWrittenUnlessFlushedOrTakenUpAgain) {
  Fixture f({.gpu = 8, .host = 8, .nvme = 64});
  const Tokens over = Prompt("over", 3);
  f.Release(f.Hold(over), /*session_over=*/true);
  // It comes down to HOST without being written.
  f.cache().Evict(Tier::kGpu, 0, 8);
  f.Store(Prompt("other", 8));
  ASSERT_TRUE(f.world.Settle());
  for (const auto& [slot, stored] : f.world.mover.nvme) {
    EXPECT_NE(stored.content, World::Content(f.model, over, 0));
  }

  f.Release(f.Hold(over, Tier::kHost), /*session_over=*/true);
  const LeaseId flushed = f.Look(over).lease;
  int done = 0;
  ASSERT_TRUE(f.cache().Flush(f.session, flushed, [&](absl::Status) { ++done; }).ok());
  ASSERT_TRUE(f.world.Settle());
  EXPECT_EQ(done, 1);
  f.Release(flushed);
}

TEST(Nvme, AFinishedConversationThatGoesOnIsWritten) {
  Fixture f({.gpu = 8, .host = 8, .nvme = 64, .low_water = 6});
  const Tokens prompt = Prompt("p", 4);
  f.Release(f.Hold(prompt), /*session_over=*/true);
  ASSERT_TRUE(f.world.Settle());
  EXPECT_GT(f.Where(prompt)[1] + f.Where(prompt)[0], 0u);
  EXPECT_EQ(f.world.mover.nvme.size(), 0u);
  f.Store(prompt);
  ASSERT_TRUE(f.world.Settle());
  EXPECT_GT(f.world.mover.nvme.size(), 0u);
  f.cache().CheckInvariants();
}

}  // namespace
}  // namespace larder::testing
