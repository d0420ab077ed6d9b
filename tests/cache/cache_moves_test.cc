// Prefetch, moves, tiers under pressure: rules 3 and 4 of the tree.
#include <gtest/gtest.h>

#include "tests/cache/cache_fixture.h"

namespace larder::testing {
namespace {

MoveId OldestMove(Fixture& f) { return f.world.mover.jobs().front().id; }

TEST(Moves, PrefetchReportsRunsInPrefixOrderAsTheyArrive) {
  Fixture f({.gpu = 4, .host = 4});
  const Tokens prompt = Prompt("p", 3);
  f.Store(prompt, Tier::kHost);
  const LookupResult found = f.Look(prompt);
  int calls = 0;
  const PrefetchId id = *f.cache().Prefetch(f.session, found.lease, Tier::kGpu, [&] { ++calls; });
  auto update = f.cache().PollPrefetch(id);
  EXPECT_EQ(update->promised_blocks, 3u);
  EXPECT_EQ(update->ready_blocks, 0u);
  EXPECT_FALSE(update->done);
  EXPECT_EQ(calls, 0);
  ASSERT_EQ(f.world.mover.queued(), 3u);
  // The last arrives first: nothing is readable before the first one is.
  std::vector<MoveId> ids;
  for (const MoveJob& job : f.world.mover.jobs()) ids.push_back(job.id);
  f.world.mover.Complete(ids[2], absl::OkStatus());
  update = f.cache().PollPrefetch(id);
  EXPECT_TRUE(update->runs.empty());
  EXPECT_EQ(calls, 0);
  f.cache().CheckInvariants();
  f.world.mover.Complete(ids[0], absl::OkStatus());
  update = f.cache().PollPrefetch(id);
  EXPECT_EQ(update->ready_blocks, 1u);
  EXPECT_EQ(calls, 1);
  ASSERT_EQ(update->runs.size(), 1u);
  EXPECT_EQ(update->runs[0].position, 0u);
  EXPECT_EQ(f.world.WrongBytes(f.model, update->runs, prompt), "");
  f.world.mover.Complete(ids[1], absl::OkStatus());
  update = f.cache().PollPrefetch(id);
  EXPECT_TRUE(update->done);
  EXPECT_EQ(update->ready_blocks, 3u);
  EXPECT_EQ(SlotsOf(update->runs).size(), 2u);
  EXPECT_EQ(update->runs[0].position, 1u);
  EXPECT_EQ(f.world.WrongBytes(f.model, update->runs, prompt), "");
  EXPECT_TRUE(absl::IsNotFound(f.cache().PollPrefetch(id).status()));
  EXPECT_EQ(f.Where(prompt), (Tiers{3, 0, 0}));
}

TEST(Moves, PrefetchOfWhatIsThereIsDoneAtOnce) {
  Fixture f({.gpu = 4});
  const LeaseId lease = f.Hold(Prompt("p", 3));
  const auto update = f.world.PrefetchAll(f.session, lease, Tier::kGpu);
  EXPECT_TRUE(update->done);
  EXPECT_EQ(update->ready_blocks, 3u);
  EXPECT_EQ(SlotsOf(update->runs).size(), 3u);
}

TEST(Moves, PrefetchPromisesAShorterPrefixWhenThereIsNoRoomForAll) {
  Fixture f({.gpu = 4, .host = 4});
  const LeaseId busy = f.Hold(Prompt("busy", 2), Tier::kGpu);
  f.Store(Prompt("p", 4), Tier::kHost);
  const LookupResult found = f.Look(Prompt("p", 4));
  const auto update = f.world.PrefetchAll(f.session, found.lease, Tier::kGpu);
  ASSERT_TRUE(update.has_value());
  EXPECT_EQ(update->promised_blocks, 2u);
  EXPECT_EQ(update->ready_blocks, 2u);
  EXPECT_FALSE(update->unreadable_position.has_value());
  EXPECT_EQ(f.cache().GetLease(f.session, found.lease)->end, 4u);
  f.Release(busy);
}

TEST(Moves, ASecondAskerJoinsAndACancelledAskerLeaves) {
  Fixture f({.gpu = 4, .host = 4});
  const Tokens prompt = Prompt("p", 2);
  f.Store(prompt, Tier::kHost);
  const LeaseId first = f.Look(prompt).lease;
  const LeaseId second = f.Look(prompt).lease;
  const PrefetchId a = *f.cache().Prefetch(f.session, first, Tier::kGpu, [] {});
  const PrefetchId b = *f.cache().Prefetch(f.session, second, Tier::kGpu, [] {});
  EXPECT_EQ(f.world.mover.queued(), 2u) << "one move a block";
  f.cache().CancelPrefetch(a);
  f.Release(first);
  while (f.world.mover.Step()) f.cache().CheckInvariants();
  const auto update = f.cache().PollPrefetch(b);
  EXPECT_TRUE(update->done);
  EXPECT_EQ(update->ready_blocks, 2u);
  EXPECT_TRUE(absl::IsNotFound(f.cache().PollPrefetch(a).status()));
}

TEST(Moves, TheCleanersMovesAreInTheBackgroundClass) {
  Fixture f({.gpu = 4, .host = 4, .low_water = 4});
  f.Store(Prompt("p", 2), Tier::kGpu);  // below the mark at once: going down
  ASSERT_GT(f.world.mover.queued(), 0u);
  EXPECT_EQ(f.world.mover.jobs().front().move_class, MoveClass::kBackground);
  Fixture g({.gpu = 4, .host = 4});
  g.Store(Prompt("p", 2), Tier::kHost);
  ASSERT_TRUE(g.cache().Prefetch(g.session, g.Look(Prompt("p", 2)).lease, Tier::kGpu, [] {}).ok());
  EXPECT_EQ(g.world.mover.jobs().front().move_class, MoveClass::kWaiting);
}

// Rule 4: a second asker joins, and raises the class.
TEST(Moves, AFlushRaisesTheClassOfAWriteUnderWay) {
  Fixture f({.host = 4, .nvme = 4});
  const LeaseId lease = f.Hold(Prompt("p", 1));
  ASSERT_EQ(f.world.mover.queued(), 1u) << "writing behind";
  ASSERT_TRUE(f.cache().Flush(f.session, lease, [](absl::Status) {}).ok());
  EXPECT_EQ(f.world.mover.queued(), 1u) << "joined";
  EXPECT_EQ(f.world.mover.raises, 1u);
}

TEST(Moves, APrefetchToGpuJoinsTheFirstHopOfABlockOnItsWayFromNvme) {
  Fixture f({.gpu = 4, .host = 4, .nvme = 4});
  f.Store(Prompt("p", 1), Tier::kHost);
  ASSERT_TRUE(f.world.Settle());
  f.world.Restart();
  f.Open();
  const LeaseId first = f.Look(Prompt("p", 1)).lease;
  const LeaseId second = f.Look(Prompt("p", 1)).lease;
  ASSERT_TRUE(f.cache().Prefetch(f.session, first, Tier::kHost, [] {}).ok());
  ASSERT_TRUE(f.cache().Prefetch(f.session, second, Tier::kGpu, [] {}).ok());
  EXPECT_EQ(f.world.mover.queued(), 1u) << "the second hop waits for the first";
  f.cache().CheckInvariants();
  ASSERT_TRUE(f.world.Settle());
  EXPECT_EQ(f.Where(Prompt("p", 1))[0], 1u);
}

// DESIGN.md section 10: a move of a leased block fails.
TEST(Moves, AFailedMoveIsReportedUnreadableAndTheLeaseDoesNotMove) {
  Fixture f({.gpu = 4, .host = 4});
  const Tokens prompt = Prompt("p", 3);
  f.Store(prompt, Tier::kHost);
  const LeaseId lease = f.Look(prompt).lease;
  const PrefetchId id = *f.cache().Prefetch(f.session, lease, Tier::kGpu, [] {});
  std::vector<MoveId> ids;
  for (const MoveJob& job : f.world.mover.jobs()) ids.push_back(job.id);
  f.world.mover.Complete(ids[1], absl::InternalError("EIO"));
  EXPECT_FALSE(f.cache().PollPrefetch(id)->done) << "what is before it may still come";
  f.world.mover.Complete(ids[0], absl::OkStatus());
  f.cache().CheckInvariants();
  const auto update = f.cache().PollPrefetch(id);
  ASSERT_TRUE(update.ok());
  EXPECT_TRUE(update->done);
  EXPECT_EQ(update->ready_blocks, 1u);
  EXPECT_EQ(update->unreadable_position, 1u);
  f.world.mover.Complete(ids[2], absl::OkStatus());
  f.cache().CheckInvariants();
  EXPECT_EQ(f.cache().GetLease(f.session, lease)->end, 3u);
  ASSERT_TRUE(f.cache().Truncate(f.session, lease, 1).ok());
  ASSERT_TRUE(f.Extend(lease, prompt, 2, Tier::kGpu).ok());
  EXPECT_EQ(f.world.WrongBytes(f.model, f.Look(prompt).runs, prompt), "");
}

TEST(Moves, AFullQueueIsAFailedMoveAndNothingLeaks) {
  Fixture f({.gpu = 4, .host = 4});
  f.Store(Prompt("p", 2), Tier::kHost);
  const LeaseId lease = f.Look(Prompt("p", 2)).lease;
  f.world.mover.faults.refuse = 100;
  const auto update = f.world.PrefetchAll(f.session, lease, Tier::kGpu);
  ASSERT_TRUE(update.has_value());
  EXPECT_EQ(update->unreadable_position, 0u);
  f.cache().CheckInvariants();
  EXPECT_EQ(f.cache().Stats().tiers[0].bytes_used, 0u);
  f.world.mover.faults.refuse = 0;
  EXPECT_EQ(f.world.PrefetchAll(f.session, lease, Tier::kGpu)->ready_blocks, 2u);
}

// Rule 4: a move owns its slots, whoever asked for it and whether they still live.
TEST(Moves, AMoveKeepsItsSlotsWhenItsAskerDies) {
  Fixture f({.gpu = 2, .host = 2});
  f.Store(Prompt("p", 2), Tier::kHost);
  const LeaseId lease = f.Look(Prompt("p", 2)).lease;
  ASSERT_TRUE(f.cache().Prefetch(f.session, lease, Tier::kGpu, [] {}).ok());
  f.cache().EndSession(f.session);
  f.cache().CheckInvariants();
  EXPECT_EQ(f.cache().Stats().moves_in_flight, 2u);
  f.session = *f.cache().OpenSession("next");
  for (Tier tier : {Tier::kGpu, Tier::kHost}) {
    EXPECT_TRUE(absl::IsResourceExhausted(
        f.cache().Reserve(f.session, f.EmptyLease(), 0, 1, tier).status()));
  }
  ASSERT_TRUE(f.world.Settle());
  EXPECT_EQ(f.Where(Prompt("p", 2))[0], 2u);
  EXPECT_EQ(f.Pinned(), 0u);
}

TEST(Moves, APutWhileItsBlockIsOnItsWayWins) {
  Fixture f({.gpu = 4, .host = 4});
  const Tokens prompt = Prompt("p", 1);
  const LeaseId writer = f.EmptyLease();
  const auto runs = f.cache().Reserve(f.session, writer, 0, 1, Tier::kGpu);
  f.world.Fill(f.model, *runs, prompt);
  f.Store(prompt, Tier::kHost);
  const LeaseId reader = f.Look(prompt).lease;
  ASSERT_TRUE(f.cache().Prefetch(f.session, reader, Tier::kGpu, [] {}).ok());
  ASSERT_TRUE(f.cache().Put(f.session, writer, 0, prompt).ok());
  f.cache().CheckInvariants();
  f.world.mover.Complete(OldestMove(f), absl::OkStatus());
  f.cache().CheckInvariants();
  EXPECT_EQ(SlotsOf(f.Look(prompt).runs), SlotsOf(*runs));
  EXPECT_EQ(f.cache().Stats().tiers[0].bytes_used, kSlotGranule);
}

TEST(Moves, TruncateShortensAPrefetchUnderWay) {
  Fixture f({.gpu = 4, .host = 4});
  f.Store(Prompt("p", 3), Tier::kHost);
  const LeaseId lease = f.Look(Prompt("p", 3)).lease;
  const PrefetchId id = *f.cache().Prefetch(f.session, lease, Tier::kGpu, [] {});
  ASSERT_TRUE(f.cache().Truncate(f.session, lease, 1).ok());
  ASSERT_TRUE(f.world.Settle());
  const auto update = f.cache().PollPrefetch(id);
  EXPECT_TRUE(update->done);
  EXPECT_EQ(update->ready_blocks, 1u);
  EXPECT_EQ(update->promised_blocks, 1u);
  f.cache().CheckInvariants();
}

TEST(Moves, ReleaseEndsAPrefetchAndSaysSo) {
  Fixture f({.gpu = 4, .host = 4});
  f.Store(Prompt("p", 2), Tier::kHost);
  const LeaseId lease = f.Look(Prompt("p", 2)).lease;
  int calls = 0;
  const PrefetchId id = *f.cache().Prefetch(f.session, lease, Tier::kGpu, [&] { ++calls; });
  f.Release(lease);
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(absl::IsNotFound(f.cache().PollPrefetch(id).status()));
  EXPECT_TRUE(f.world.Settle());
  f.cache().CheckInvariants();
}

// --- Tiers under pressure ----------------------------------------------------------------

TEST(Moves, TheCleanerKeepsSlotsFreeAheadOfNeed) {
  Fixture f({.gpu = 8, .host = 8, .low_water = 3});
  f.Store(Prompt("a", 4), Tier::kGpu);
  f.Store(Prompt("b", 4), Tier::kGpu);
  ASSERT_TRUE(f.world.Settle());
  f.cache().CheckInvariants();
  EXPECT_LE(f.cache().Stats().tiers[0].bytes_used, 5 * kSlotGranule);
  EXPECT_EQ(f.Where(Prompt("b", 4)), (Tiers{4, 0, 0})) << "the most recent stay";
  EXPECT_EQ(f.Where(Prompt("a", 4)), (Tiers{1, 3, 0})) << "leaves of the coldest go";
  const LookupResult found = f.Look(Prompt("a", 4));
  EXPECT_EQ(f.world.WrongBytes(f.model, found.runs, Prompt("a", 4)), "");
}

TEST(Moves, WithoutAHostTierGpuBlocksAreDroppedColdestLeafFirst) {
  Fixture f({.gpu = 4});
  f.Store(Prompt("a", 2));
  f.Store(Prompt("b", 2));
  f.Store(Prompt("c", 1));
  EXPECT_EQ(f.Matched(Prompt("a", 2)), 1u);
  EXPECT_EQ(f.Matched(Prompt("b", 2)), 2u);
  f.Store(Prompt("d", 2));
  EXPECT_EQ(f.Matched(Prompt("a", 2)), 0u);
  EXPECT_EQ(f.Matched(Prompt("b", 2)), 1u);
  f.cache().CheckInvariants();
}

TEST(Moves, WithoutNvmeTheColdestDirtyLeafIsDropped) {
  Fixture f({.host = 4});
  f.Store(Prompt("a", 2));
  f.Store(Prompt("b", 2));
  f.Store(Prompt("c", 3));
  EXPECT_EQ(f.Matched(Prompt("c", 3)), 3u);
  EXPECT_EQ(f.Matched(Prompt("b", 2)), 1u);
  EXPECT_EQ(f.Matched(Prompt("a", 2)), 0u);
}

// --- What a restore costs ----------------------------------------------------------------

TEST(Moves, AMatchIsCutWhereLoadingStopsPaying) {
  Fixture f({.gpu = 8, .host = 8});
  const Tokens prompt = Prompt("p", 2) + Prompt("q", 3);
  f.Store(Prompt("p", 2), Tier::kGpu);
  f.Store(prompt, Tier::kHost);
  ASSERT_EQ(f.Where(prompt), (Tiers{2, 3, 0}));
  LookupOptions options;
  options.prefill_tokens_per_second = 1e12;  // computing is quicker than any copy
  const auto cut = f.cache().Lookup(f.session, f.model, prompt, options);
  EXPECT_EQ(cut->matched_blocks, 2u);
  EXPECT_EQ(cut->restore.cut_blocks, 3u);
  EXPECT_EQ(cut->restore.time, absl::ZeroDuration());
  options.prefill_tokens_per_second = 1000;
  const auto whole = f.cache().Lookup(f.session, f.model, prompt, options);
  EXPECT_EQ(whole->matched_blocks, 5u);
  EXPECT_EQ(whole->restore.cut_blocks, 0u);
  EXPECT_GT(whole->restore.time, absl::ZeroDuration());
  EXPECT_LT(whole->restore.time, absl::Milliseconds(1));
}

TEST(Moves, TheEstimateFollowsTheMeasuredRateAndTheQueue) {
  Fixture f({.gpu = 512, .host = 512});
  LookupOptions peek;
  peek.peek = true;
  peek.prefill_tokens_per_second = 1;
  const auto estimate = [&] {
    return f.cache().Lookup(0, f.model, Prompt("p", 4), peek)->restore.time;
  };
  f.Store(Prompt("p", 4), Tier::kHost);
  f.Store(Prompt("other", 400), Tier::kHost);
  const absl::Duration idle = estimate();
  const LeaseId lease = f.Look(Prompt("other", 400)).lease;
  ASSERT_TRUE(f.cache().Prefetch(f.session, lease, Tier::kGpu, [] {}).ok());
  EXPECT_GT(estimate(), 50 * idle) << "400 blocks queued before ours";
  while (!f.world.mover.idle()) {
    f.world.clock.Advance(absl::Milliseconds(100));  // a slow device
    f.world.mover.Step();
  }
  EXPECT_GT(estimate(), 10 * idle) << "measured slower than assumed";
}

}  // namespace
}  // namespace larder::testing
