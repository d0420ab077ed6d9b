// What is bounded: pins, calls that wait, and the work of one call.
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "tests/cache/cache_fixture.h"

namespace larder::testing {
namespace {

uint32_t PinsOfFirst(Fixture& f, const Tokens& prompt) {
  const auto explained = f.cache().Explain(f.model, prompt);
  EXPECT_TRUE(explained.ok()) << explained.status();
  return explained->segments.empty() ? 0 : explained->segments[0].pins;
}

TEST(Bounds, AskingAgainForWhatIsReadableAddsNoPin) {
  Fixture f({.host = 8, .nvme = 16});
  const Tokens prompt = Prompt("p", 4);
  f.Store(prompt);
  ASSERT_TRUE(f.world.Settle());
  const LeaseId lease = f.Look(prompt).lease;
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(f.world.PrefetchAll(f.session, lease, Tier::kHost).has_value());
    EXPECT_EQ(PinsOfFirst(f, prompt), 1u);
    f.cache().CheckInvariants();
  }
  // Partly pinned: the rest is pinned, and the part is not pinned again.
  ASSERT_TRUE(f.cache().Truncate(f.session, lease, 2).ok());
  LookupOptions extend;
  extend.lease = lease;
  ASSERT_TRUE(f.cache().Lookup(f.session, f.model, f.Part(prompt, 2, 2), extend).ok());
  ASSERT_TRUE(f.world.PrefetchAll(f.session, lease, Tier::kHost).has_value());
  EXPECT_EQ(PinsOfFirst(f, prompt), 1u);
  f.cache().CheckInvariants();
  f.Release(lease);
  EXPECT_EQ(f.Pinned(), 0u);
}

TEST(Bounds, PrefetchesUnderWayAreCounted) {
  Fixture f({.gpu = 4, .host = 8, .nvme = 16});
  const Tokens prompt = Prompt("p", 2);
  f.Store(prompt, Tier::kHost);
  ASSERT_TRUE(f.world.Settle());
  const LeaseId lease = f.Look(prompt).lease;
  std::vector<PrefetchId> under_way;
  absl::Status refused;
  while (refused.ok() && under_way.size() < 1000) {
    const auto id = f.cache().Prefetch(f.session, lease, Tier::kGpu, [] {});
    refused = id.status();
    if (id.ok()) under_way.push_back(*id);
  }
  EXPECT_EQ(under_way.size(), Cache::Options().prefetches_per_lease_max);
  EXPECT_TRUE(absl::IsResourceExhausted(refused)) << refused;
  f.cache().CancelPrefetch(under_way[0]);
  EXPECT_TRUE(f.cache().Prefetch(f.session, lease, Tier::kGpu, [] {}).ok());
}

TEST(Bounds, AFlushOfALongPathStartsItsMovesAFewAtATime) {
  const uint32_t most = Cache::Options().flush_moves_max;
  for (const bool from_gpu : {false, true}) {
    Fixture f({.gpu = from_gpu ? 3 * most : 0, .host = 3 * most, .nvme = 3 * most,
               .background_moves = 0});
    const LeaseId lease = f.Hold(Prompt("p", 2 * most + 10));
    EXPECT_TRUE(f.world.mover.idle());
    int done = 0;
    ASSERT_TRUE(f.cache().Flush(f.session, lease, [&](absl::Status) { ++done; }).ok());
    EXPECT_EQ(f.world.mover.queued(), most);
    size_t queued = most;
    while (f.world.mover.Step()) {
      // One has ended: of each tier pair one may start.
      EXPECT_LE(f.world.mover.queued(), queued + 1);
      queued = f.world.mover.queued();
      ASSERT_LE(queued, 2 * most) << "two tier pairs";
    }
    EXPECT_EQ(done, 1);
    EXPECT_EQ(f.world.mover.nvme.size(), 2 * most + 10);
  }
}

TEST(Bounds, AFlushEndsWhenTheLeaseIsMovedBackToWhatIsDurable) {
  Fixture f({.host = 8, .nvme = 16});
  const LeaseId lease = f.Hold(Prompt("p", 4));
  ASSERT_TRUE(f.world.mover.Step());
  std::optional<absl::Status> ended;
  ASSERT_TRUE(
      f.cache().Flush(f.session, lease, [&](absl::Status status) { ended = status; }).ok());
  EXPECT_FALSE(ended.has_value());
  ASSERT_TRUE(f.cache().Truncate(f.session, lease, 2).ok());
  EXPECT_FALSE(ended.has_value()) << "block 1 is not durable";
  ASSERT_TRUE(f.cache().Truncate(f.session, lease, 1).ok());
  ASSERT_TRUE(ended.has_value());
  EXPECT_TRUE(ended->ok()) << *ended;
}

TEST(Bounds, AFlushEndsWhenNvmeTakesNoWritesAnyMore) {
  Fixture f({.host = 8, .nvme = 16});
  const LeaseId lease = f.Hold(Prompt("p", 4));
  std::optional<absl::Status> ended;
  ASSERT_TRUE(
      f.cache().Flush(f.session, lease, [&](absl::Status status) { ended = status; }).ok());
  f.cache().SetNvmeWritable(false);
  ASSERT_TRUE(ended.has_value());
  EXPECT_TRUE(absl::IsUnavailable(*ended)) << *ended;
}

TEST(Bounds, AFlushRaisesTheMovesOfItsOwnPathOnly) {
  Fixture f({.host = 16, .nvme = 16});
  const LeaseId lease = f.Hold(Prompt("p", 3));
  f.Hold(Prompt("p", 3) + Prompt("q", 2));
  f.Hold(Prompt("other", 4));
  ASSERT_EQ(f.world.mover.queued(), 9u);
  ASSERT_TRUE(f.cache().Flush(f.session, lease, [](absl::Status) {}).ok());
  EXPECT_EQ(f.world.mover.raises, 3u);
}

TEST(Bounds, DurableBlocksAreCountedAcrossNodes) {
  Fixture f({.host = 16, .nvme = 16});
  f.Hold(Prompt("p", 3) + Prompt("q", 2));
  const LeaseId lease = f.Hold(Prompt("p", 3) + Prompt("r", 3));
  for (uint32_t before = 0; f.world.mover.Step();) {
    const uint32_t durable = f.cache().GetLease(f.session, lease)->durable_blocks;
    EXPECT_GE(durable, before);
    EXPECT_LE(durable, before + 1);
    before = durable;
  }
  EXPECT_EQ(f.cache().GetLease(f.session, lease)->durable_blocks, 6u);
}

TEST(Bounds, EvictAndSessionsSeeMoreThanOneTurnOfTheMutexAllows) {
  constexpr uint32_t kPrompts = 1300;
  Fixture f({.host = 2048});
  for (uint32_t i = 0; i < kPrompts; ++i) f.Store(Prompt(absl::StrCat(i), 1));
  for (uint32_t i = 0; i < kPrompts; ++i) ASSERT_TRUE(f.cache().OpenSession("w").ok());
  EXPECT_EQ(f.cache().Sessions(/*leases=*/true).size(), kPrompts + 1);
  EXPECT_EQ(f.cache().TopPrefixes(f.model, 2000).size(), kPrompts);
  const auto few = f.cache().Evict(Tier::kHost, f.model, 700);
  EXPECT_EQ(few, (std::pair<uint64_t, uint64_t>(700, kPrompts - 700)));
  const auto rest = f.cache().Evict(Tier::kHost, 0, ~uint64_t{0});
  EXPECT_EQ(rest, (std::pair<uint64_t, uint64_t>(kPrompts - 700, 0)));
  f.cache().CheckInvariants();
}

TEST(Bounds, AnEndedSessionLetsGoOfManyLeases) {
  Fixture f({.host = 4});
  f.Store(Prompt("p", 2));
  for (int i = 0; i < 100; ++i) f.Look(Prompt("p", 2));
  EXPECT_EQ(f.cache().Stats().leases, 100u);
  f.cache().EndSession(f.session);
  EXPECT_EQ(f.cache().Stats().leases, 0u);
  EXPECT_EQ(f.cache().Stats().sessions + f.cache().Stats().sessions_lost, 0u);
  EXPECT_EQ(f.Pinned(), 0u);
}

TEST(Bounds, ALeaseFollowsItsForkOnlyFromWhereItWas) {
  Fixture f({.host = 16});
  const Tokens prompt = Prompt("p", 2) + Prompt("q", 2);
  const LeaseId lease = f.Hold(Prompt("p", 2));
  const SessionId own = *f.cache().OpenSession("own", /*secret=*/12345);
  const LeaseId fork = f.cache().Fork(f.session, lease, own)->lease;
  const auto runs = f.cache().Reserve(own, fork, 2, 2, std::nullopt);
  ASSERT_TRUE(runs.ok());
  ASSERT_TRUE(f.cache().Put(own, fork, 2, f.Part(prompt, 2, 2)).ok());

  // Moved to another path of the same length meanwhile.
  ASSERT_TRUE(f.cache().Truncate(f.session, lease, 0).ok());
  EXPECT_TRUE(absl::IsAborted(f.cache().Follow(f.session, lease, 2, own, fork).status()));
  ASSERT_TRUE(f.Extend(lease, Prompt("other", 2), 2).ok());
  EXPECT_TRUE(absl::IsAborted(f.cache().Follow(f.session, lease, 2, own, fork).status()));
  f.cache().CheckInvariants();

  const LeaseId again = f.Look(Prompt("p", 2)).lease;
  const auto state = f.cache().Follow(f.session, again, 2, own, fork);
  ASSERT_TRUE(state.ok()) << state.status();
  EXPECT_EQ(state->end, 4u);
  f.cache().CheckInvariants();
  f.cache().EndSession(own);
  EXPECT_EQ(f.cache().Evict(Tier::kHost, 0, 100).first, 0u) << "the lease pins them now";
  f.cache().CheckInvariants();
}

}  // namespace
}  // namespace larder::testing
