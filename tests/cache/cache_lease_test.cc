// Reserve, Put, Truncate, Fork, Release: rules 2, 4, 8 and 9 of the tree.
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "tests/cache/cache_fixture.h"

namespace larder::testing {
namespace {

const SlotRun& Only(const std::vector<SlotRun>& runs) { return runs.at(0); }

TEST(Lease, ReserveAgainGivesTheSameBlocks) {
  Fixture f({.gpu = 8});
  const LeaseId lease = f.EmptyLease();
  const auto first = f.cache().Reserve(f.session, lease, 0, 3, std::nullopt);
  const auto again = f.cache().Reserve(f.session, lease, 0, 3, std::nullopt);
  const auto fewer = f.cache().Reserve(f.session, lease, 0, 2, std::nullopt);
  const auto more = f.cache().Reserve(f.session, lease, 0, 5, std::nullopt);
  ASSERT_TRUE(first.ok() && again.ok() && fewer.ok() && more.ok());
  EXPECT_EQ(Only(*first).slots, Only(*again).slots);
  EXPECT_EQ(Only(*fewer).slots.size(), 2u);
  EXPECT_EQ(Only(*more).slots[2], Only(*first).slots[2]);
  EXPECT_EQ(f.cache().GetLease(f.session, lease)->reserved_blocks, 5u);
  EXPECT_EQ(f.cache().Stats().tiers[0].bytes_used, 5 * kSlotGranule);
}

TEST(Lease, AWrongPositionIsAbortedAndChangesNothing) {
  Fixture f({.gpu = 8});
  const Tokens prompt = Prompt("p", 4);
  const LeaseId lease = f.Hold(Tokens(prompt.begin(), prompt.begin() + 8));
  EXPECT_TRUE(absl::IsAborted(f.cache().Reserve(f.session, lease, 1, 1, std::nullopt).status()));
  EXPECT_TRUE(absl::IsAborted(f.cache().Reserve(f.session, lease, 3, 1, std::nullopt).status()));
  ASSERT_TRUE(f.cache().Reserve(f.session, lease, 2, 2, std::nullopt).ok());
  for (uint32_t position : {0u, 1u, 3u}) {
    const auto put = f.cache().Put(f.session, lease, position, Fixture::Part(prompt, 2, 1));
    EXPECT_TRUE(absl::IsAborted(put.status()));
    EXPECT_EQ(put.status().message(),
              absl::StrCat("position: ", position, " given, the lease's end is at block 2"));
  }
  EXPECT_EQ(f.cache().GetLease(f.session, lease)->end, 2u);
  EXPECT_EQ(f.cache().GetLease(f.session, lease)->reserved_blocks, 2u);
  ASSERT_TRUE(f.cache().Put(f.session, lease, 2, Fixture::Part(prompt, 2, 1)).ok());
  EXPECT_TRUE(
      absl::IsAborted(f.cache().Put(f.session, lease, 2, Fixture::Part(prompt, 2, 1)).status()))
      << "a retry never publishes twice";
  EXPECT_EQ(f.cache().GetLease(f.session, lease)->end, 3u);
  f.cache().CheckInvariants();
}

// DESIGN.md section 10: Put of tokens never reserved, wrong counts.
TEST(Lease, PutOfPartialUnreservedOrNoBlocksIsRefused) {
  Fixture f({.gpu = 8});
  const Tokens prompt = Prompt("p", 4);
  const LeaseId lease = f.EmptyLease();
  ASSERT_TRUE(f.cache().Reserve(f.session, lease, 0, 2, std::nullopt).ok());
  const auto put = [&](size_t tokens) {
    return f.cache().Put(f.session, lease, 0, std::span(prompt).first(tokens)).status();
  };
  EXPECT_TRUE(absl::IsInvalidArgument(put(0)));
  EXPECT_TRUE(absl::IsInvalidArgument(put(7)));
  EXPECT_EQ(put(7).message(), "tokens: 7 given, must be a multiple of 4 and at least that many");
  EXPECT_TRUE(absl::IsFailedPrecondition(put(12)));
  EXPECT_EQ(put(12).message(), "tokens: 3 blocks given, but only 2 are reserved");
  EXPECT_EQ(f.Matched(prompt), 0u);
  EXPECT_EQ(f.cache().GetLease(f.session, lease)->reserved_blocks, 2u);
}

TEST(Lease, PutInPlaceKeepsItsSlots) {
  Fixture f({.gpu = 8});
  const Tokens prompt = Prompt("p", 3);
  const LeaseId lease = f.EmptyLease();
  const auto runs = f.cache().Reserve(f.session, lease, 0, 3, std::nullopt);
  f.world.Fill(f.model, *runs, prompt);
  const auto state = f.cache().Put(f.session, lease, 0, prompt);
  ASSERT_TRUE(state.ok());
  EXPECT_EQ(state->end, 3u);
  EXPECT_EQ(state->reserved_blocks, 0u);
  const LookupResult found = f.Look(prompt);
  EXPECT_EQ(SlotsOf(found.runs), SlotsOf(*runs));
  EXPECT_EQ(f.world.WrongBytes(f.model, found.runs, prompt), "");
  EXPECT_EQ(f.cache().Stats().moves_in_flight, 0u) << "no copy";
}

TEST(Lease, PuttingFewerThanReservedKeepsTheRest) {
  Fixture f({.gpu = 8});
  const Tokens prompt = Prompt("p", 4);
  const LeaseId lease = f.EmptyLease();
  const auto runs = f.cache().Reserve(f.session, lease, 0, 4, std::nullopt);
  ASSERT_TRUE(f.cache().Put(f.session, lease, 0, Fixture::Part(prompt, 0, 1)).ok());
  const auto rest = f.cache().Reserve(f.session, lease, 1, 3, std::nullopt);
  ASSERT_TRUE(rest.ok());
  EXPECT_TRUE(std::equal(Only(*rest).slots.begin(), Only(*rest).slots.end(),
                         Only(*runs).slots.begin() + 1));
}

TEST(Lease, ReservedBlocksOfOneTierAtATime) {
  Fixture f({.gpu = 4, .host = 4});
  const LeaseId lease = f.EmptyLease();
  ASSERT_TRUE(f.cache().Reserve(f.session, lease, 0, 1, Tier::kHost).ok());
  EXPECT_TRUE(
      absl::IsFailedPrecondition(f.cache().Reserve(f.session, lease, 0, 2, Tier::kGpu).status()));
  EXPECT_EQ(f.cache().GetLease(f.session, lease)->reserved_blocks, 1u);
}

// Rule 3: GPU is prefix-closed, so a GPU block cannot follow one that is only in HOST.
TEST(Lease, AGpuBlockIsNotPutBehindAHostBlock) {
  Fixture f({.gpu = 4, .host = 4});
  const Tokens prompt = Prompt("p", 3);
  const LeaseId lease = f.Hold(Tokens(prompt.begin(), prompt.begin() + 8), Tier::kHost);
  ASSERT_TRUE(f.cache().Reserve(f.session, lease, 2, 1, Tier::kGpu).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(
      f.cache().Put(f.session, lease, 2, Fixture::Part(prompt, 2, 1)).status()));
  EXPECT_EQ(f.cache().GetLease(f.session, lease)->end, 2u);
  ASSERT_TRUE(f.world.PrefetchAll(f.session, lease, Tier::kGpu)->done);
  EXPECT_TRUE(f.cache().Put(f.session, lease, 2, Fixture::Part(prompt, 2, 1)).ok());
  f.cache().CheckInvariants();
}

// DESIGN.md section 10: all slots pinned.
TEST(Lease, WhenAllIsPinnedReserveNamesTierAndBytesAndEvictsNothing) {
  Fixture f({.gpu = 6});
  const LeaseId lease = f.Hold(Prompt("pinned", 4));
  f.Store(Prompt("free", 2));
  const LeaseId other = f.EmptyLease();
  const auto refused = f.cache().Reserve(f.session, other, 0, 3, std::nullopt);
  EXPECT_TRUE(absl::IsResourceExhausted(refused.status()));
  EXPECT_EQ(refused.status().message(),
            "tier GPU: 3 blocks (12288 bytes) asked for, 0 bytes free, and too much of the "
            "model's 24576 bytes is pinned, reserved or moving");
  EXPECT_EQ(f.Matched(Prompt("free", 2)), 2u) << "nothing was evicted in vain";
  EXPECT_EQ(f.cache().Stats().tiers[0].evictions, 0u);
  EXPECT_EQ(f.cache().Stats().exhausted, 1u);
  EXPECT_TRUE(f.cache().Reserve(f.session, other, 0, 2, std::nullopt).ok());
  EXPECT_EQ(f.Matched(Prompt("pinned", 4)), 4u);
  f.Release(lease);
  f.cache().CheckInvariants();
}

TEST(Lease, WhenAllIsPinnedNothingIsEvictedWithSeveralModelsEither) {
  Fixture f({.gpu = 6});
  ASSERT_TRUE(f.cache().OpenModel(World::Spec("idle")).ok());
  const LeaseId lease = f.Hold(Prompt("pinned", 4));
  f.Store(Prompt("free", 2));
  EXPECT_TRUE(absl::IsResourceExhausted(
      f.cache().Reserve(f.session, f.EmptyLease(), 0, 3, std::nullopt).status()));
  EXPECT_EQ(f.Matched(Prompt("free", 2)), 2u) << "nothing was evicted in vain";
  f.Release(lease);
}

TEST(Lease, WhenAllIsPinnedNothingIsEvictedFromATierWithAShortLastSlabEither) {
  Fixture f({.gpu = 6, .slab = 4});
  const LeaseId lease = f.Hold(Prompt("pinned", 3));
  f.Store(Prompt("free", 1));
  EXPECT_TRUE(absl::IsResourceExhausted(
      f.cache().Reserve(f.session, f.EmptyLease(), 0, 4, std::nullopt).status()));
  EXPECT_EQ(f.Matched(Prompt("free", 1)), 1u) << "nothing was evicted in vain";
  f.Release(lease);
}

// Rule 9: the first is canonical.
TEST(Lease, OfTwoThatPutTheSamePrefixTheSecondKeepsItsDuplicateUntilRelease) {
  Fixture f({.gpu = 8});
  const Tokens prompt = Prompt("p", 2);
  const SessionId second_session = *f.cache().OpenSession("second");
  const LeaseId first = f.EmptyLease();
  const LeaseId second = f.cache().Lookup(second_session, f.model, {}, {})->lease;
  const auto first_runs = f.cache().Reserve(f.session, first, 0, 2, std::nullopt);
  const auto second_runs = f.cache().Reserve(second_session, second, 0, 2, std::nullopt);
  f.world.Fill(f.model, *first_runs, prompt);
  f.world.Fill(f.model, *second_runs, prompt);
  ASSERT_TRUE(f.cache().Put(f.session, first, 0, prompt).ok());
  ASSERT_TRUE(f.cache().Put(second_session, second, 0, prompt).ok());
  f.cache().CheckInvariants();
  EXPECT_EQ(f.cache().Stats().duplicate_blocks, 2u);
  EXPECT_EQ(f.cache().Stats().tiers[0].bytes_used, 4 * kSlotGranule);
  EXPECT_EQ(f.cache().Sessions(true)[1].leases[0].duplicate_blocks, 2u);
  const LookupResult third = f.Look(prompt);
  EXPECT_EQ(SlotsOf(third.runs), SlotsOf(*first_runs));
  f.Release(third.lease);
  f.Release(first);
  EXPECT_EQ(f.cache().Evict(Tier::kGpu, 0, 10).first, 0u) << "the second pins the canonical path";
  ASSERT_TRUE(f.cache().Release(second_session, second, false).ok());
  EXPECT_EQ(f.cache().Stats().tiers[0].bytes_used, 2 * kSlotGranule);
  f.cache().CheckInvariants();
}

TEST(Lease, ASlotIsAdoptedWhereItsTierHadNoCopy) {
  Fixture f({.gpu = 4, .host = 4});
  const Tokens prompt = Prompt("p", 2);
  const LeaseId late = f.EmptyLease();
  const auto runs = f.cache().Reserve(f.session, late, 0, 2, Tier::kGpu);
  f.world.Fill(f.model, *runs, prompt);
  f.Store(prompt, Tier::kHost);
  ASSERT_TRUE(f.cache().Put(f.session, late, 0, prompt).ok());
  EXPECT_EQ(f.cache().Stats().duplicate_blocks, 0u);
  const LookupResult found = f.Look(prompt);
  EXPECT_EQ(Only(found.runs).tier, Tier::kGpu);
  EXPECT_EQ(SlotsOf(found.runs), SlotsOf(*runs));
  f.cache().CheckInvariants();
}

TEST(Lease, ADuplicateIsSharedByForksAndFreedWithTheLast) {
  Fixture f({.gpu = 8});
  const Tokens prompt = Prompt("p", 2);
  const LeaseId lease = f.EmptyLease();
  ASSERT_TRUE(f.cache().Reserve(f.session, lease, 0, 2, std::nullopt).ok());
  f.Store(prompt);
  ASSERT_TRUE(f.cache().Put(f.session, lease, 0, prompt).ok());
  const LeaseId fork = f.cache().Fork(f.session, lease)->lease;
  f.Release(lease);
  f.cache().CheckInvariants();
  EXPECT_EQ(f.cache().Stats().tiers[0].bytes_used, 4 * kSlotGranule);
  ASSERT_TRUE(f.cache().Truncate(f.session, fork, 1).ok());
  EXPECT_EQ(f.cache().Stats().tiers[0].bytes_used, 3 * kSlotGranule);
  f.Release(fork);
  EXPECT_EQ(f.cache().Stats().tiers[0].bytes_used, 2 * kSlotGranule);
  EXPECT_EQ(f.Pinned(), 0u);
  f.cache().CheckInvariants();
}

TEST(Lease, AForkSharesThePathAndDiverges) {
  Fixture f({.gpu = 8});
  const Tokens a = Prompt("p", 2) + Prompt("a", 1);
  const Tokens b = Prompt("p", 2) + Prompt("b", 1);
  const LeaseId lease = f.Hold(Prompt("p", 2));
  ASSERT_TRUE(f.cache().Reserve(f.session, lease, 2, 1, std::nullopt).ok());
  const auto fork = f.cache().Fork(f.session, lease);
  ASSERT_TRUE(fork.ok());
  EXPECT_EQ(fork->end, 2u);
  EXPECT_EQ(fork->reserved_blocks, 0u) << "the writable tail stays with the first";
  ASSERT_TRUE(f.Extend(lease, a, 1).ok());
  ASSERT_TRUE(f.Extend(fork->lease, b, 1).ok());
  EXPECT_EQ(f.cache().Stats().tiers[0].blocks, 4u) << "two shared, one each";
  f.Release(lease);
  EXPECT_EQ(f.cache().Evict(Tier::kGpu, 0, 10).first, 1u) << "what the fork pins stays";
  EXPECT_EQ(f.Matched(b), 3u);
  f.cache().CheckInvariants();
}

TEST(Lease, TruncateMovesTheEndBackAndFreesWhatIsReserved) {
  Fixture f({.gpu = 6});
  const Tokens prompt = Prompt("p", 4);
  const LeaseId lease = f.Hold(prompt);
  ASSERT_TRUE(f.cache().Reserve(f.session, lease, 4, 2, std::nullopt).ok());
  const auto refused = f.cache().Truncate(f.session, lease, 5);
  EXPECT_TRUE(absl::IsInvalidArgument(refused.status()));
  EXPECT_EQ(refused.status().message(), "position: 5 given, at most the lease's end, block 4");
  const auto state = f.cache().Truncate(f.session, lease, 1);
  ASSERT_TRUE(state.ok());
  EXPECT_EQ(state->end, 1u);
  EXPECT_EQ(state->reserved_blocks, 0u);
  EXPECT_EQ(f.Matched(prompt), 4u) << "unpinned, not forgotten";
  EXPECT_EQ(f.cache().Stats().tiers[0].bytes_pinned, kSlotGranule);
  EXPECT_EQ(f.cache().Evict(Tier::kGpu, 0, 10).first, 3u);
  ASSERT_TRUE(f.Extend(lease, Prompt("p", 1) + Prompt("q", 2), 2).ok());
  f.cache().CheckInvariants();
}

TEST(Lease, ReleaseFreesUnpublishedBlocksAndUnpins) {
  Fixture f({.gpu = 6});
  const LeaseId lease = f.Hold(Prompt("p", 2));
  ASSERT_TRUE(f.cache().Reserve(f.session, lease, 2, 3, std::nullopt).ok());
  f.Release(lease);
  EXPECT_EQ(f.Pinned(), 0u);
  EXPECT_EQ(f.cache().Stats().tiers[0].bytes_used, 2 * kSlotGranule);
  EXPECT_TRUE(absl::IsNotFound(f.cache().Release(f.session, lease, false)));
}

TEST(Lease, SessionOverAgesTheUnsharedTailFirst) {
  Fixture f({.gpu = 6});
  f.Store(Prompt("old", 2));
  const LeaseId lease = f.Hold(Prompt("p", 2) + Prompt("mine", 2));
  f.Release(lease, /*session_over=*/true);
  f.Store(Prompt("new", 2));
  EXPECT_EQ(f.Matched(Prompt("old", 2)), 2u) << "older, but its conversation may go on";
  EXPECT_EQ(f.Matched(Prompt("p", 2) + Prompt("mine", 2)), 2u);
}

TEST(Lease, SessionOverLeavesWhatOthersShare) {
  Fixture f({.gpu = 5});
  f.Store(Prompt("old", 1));
  const LeaseId lease = f.Hold(Prompt("p", 2));
  f.Store(Prompt("p", 2) + Prompt("theirs", 2));
  f.Release(lease, /*session_over=*/true);
  f.Store(Prompt("new", 1));
  EXPECT_EQ(f.Matched(Prompt("old", 1)), 0u);
  EXPECT_EQ(f.Matched(Prompt("p", 2) + Prompt("theirs", 2)), 4u);
}

// Rule 8, through the cache.
TEST(Lease, APromptPutBlockByBlockIsOneNode) {
  Fixture f({.gpu = 64});
  const Tokens prompt = Prompt("p", 50);
  const LeaseId lease = f.EmptyLease();
  for (int i = 0; i < 50; ++i) ASSERT_TRUE(f.Extend(lease, prompt, 1).ok());
  EXPECT_EQ(f.cache().Models()[0].nodes, 1u);
  EXPECT_EQ(f.cache().Models()[0].blocks, 50u);
  EXPECT_EQ(f.world.WrongBytes(f.model, f.Look(prompt).runs, prompt), "");
}

TEST(Lease, ADecoderStopsCleanlyWhenItsOwnPinsFillTheTier) {
  Fixture f({.gpu = 4});
  const Tokens prompt = Prompt("p", 6);
  const LeaseId lease = f.EmptyLease();
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(f.Extend(lease, prompt, 1).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(f.Extend(lease, prompt, 1).status()));
  EXPECT_EQ(f.cache().GetLease(f.session, lease)->end, 4u);
  f.cache().CheckInvariants();
}

}  // namespace
}  // namespace larder::testing
