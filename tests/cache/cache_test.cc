// Ids, sessions, lookups, and what people ask of a cache.
#include <gtest/gtest.h>

#include "tests/cache/cache_fixture.h"

namespace larder::testing {
namespace {

TEST(Cache, OpenModelIsIdempotentAndAnotherGeometryIsAnotherModel) {
  Fixture f({.gpu = 4});
  EXPECT_EQ(f.cache().OpenModel(World::Spec("model"))->id, f.model);
  ModelSpec other = World::Spec("model");
  other.layers = 2;
  EXPECT_NE(f.cache().OpenModel(other)->id, f.model);
  EXPECT_EQ(f.cache().Models().size(), 2u);
  EXPECT_EQ(f.cache().FindModel(f.model)->spec, World::Spec("model"));
}

TEST(Cache, AModelOfTheSameTokensSharesNothing) {
  Fixture f({.gpu = 8});
  f.Store(Prompt("p", 3));
  const ModelId other = f.cache().OpenModel(World::Spec("other"))->id;
  EXPECT_EQ(f.cache().Lookup(f.session, other, Prompt("p", 3), {})->matched_blocks, 0u);
}

TEST(Cache, ABlockThatFitsNoSlabIsRefused) {
  Fixture f({.gpu = 4});
  ModelSpec big = World::Spec("big");
  big.layers = 1024;
  const auto model = f.cache().OpenModel(big);
  EXPECT_TRUE(absl::IsResourceExhausted(model.status()));
  EXPECT_EQ(model.status().message(),
            "spec: a block of 4194304 bytes, but tier GPU takes at most 16384 (a slab)");
}

TEST(Cache, UnknownIdsAreNotFound) {
  Fixture f({.gpu = 4});
  const LeaseId lease = f.EmptyLease();
  EXPECT_TRUE(absl::IsNotFound(f.cache().FindModel(1).status()));
  EXPECT_TRUE(absl::IsNotFound(f.cache().Lookup(f.session, 1, {}, {}).status()));
  EXPECT_TRUE(absl::IsNotFound(f.cache().Lookup(999, f.model, {}, {}).status()));
  EXPECT_TRUE(absl::IsNotFound(f.cache().GetLease(999, lease).status()));
  for (const absl::Status& status :
       {f.cache().GetLease(f.session, 999).status(),
        f.cache().Reserve(f.session, 999, 0, 1, std::nullopt).status(),
        f.cache().Put(f.session, 999, 0, Prompt("p", 1)).status(),
        f.cache().Truncate(f.session, 999, 0).status(), f.cache().Fork(f.session, 999).status(),
        f.cache().Release(f.session, 999, false),
        f.cache().Prefetch(f.session, 999, std::nullopt, [] {}).status(),
        f.cache().ModelOfLease(f.session, 999).status()}) {
    EXPECT_TRUE(absl::IsNotFound(status)) << status;
    EXPECT_EQ(status.message(), "lease_id: no lease 00000000000003e7");
  }
  EXPECT_TRUE(absl::IsNotFound(f.cache().PollPrefetch(999).status()));
  EXPECT_TRUE(absl::IsNotFound(f.cache().Explain(1, {}).status()));
}

TEST(Cache, AForeignLeaseIsDenied) {
  Fixture f({.gpu = 4, .host = 4, .nvme = 4});
  const LeaseId lease = f.Hold(Prompt("p", 2));
  const SessionId other = *f.cache().OpenSession("other");
  LookupOptions extend;
  extend.lease = lease;
  for (const absl::Status& status :
       {f.cache().GetLease(other, lease).status(),
        f.cache().Lookup(other, f.model, {}, extend).status(),
        f.cache().Reserve(other, lease, 2, 1, std::nullopt).status(),
        f.cache().Put(other, lease, 2, Prompt("p", 1)).status(),
        f.cache().Truncate(other, lease, 0).status(), f.cache().Fork(other, lease).status(),
        f.cache().Release(other, lease, false),
        f.cache().Flush(other, lease, [](absl::Status) {}).status(),
        f.cache().Prefetch(other, lease, std::nullopt, [] {}).status()}) {
    EXPECT_TRUE(absl::IsPermissionDenied(status)) << status;
  }
  EXPECT_EQ(f.cache().GetLease(f.session, lease)->end, 2u) << "nothing changed";
}

// DESIGN.md section 10: worker hangs, stream lost; then: worker killed.
TEST(Cache, ALostSessionCanDoNothingAndKeepsItsSlotsUntilItEnds) {
  Fixture f({.gpu = 4});
  const LeaseId lease = f.Hold(Prompt("p", 2));
  ASSERT_TRUE(f.cache().Reserve(f.session, lease, 2, 2, std::nullopt).ok());
  f.cache().LoseSession(f.session);
  EXPECT_TRUE(absl::IsFailedPrecondition(f.cache().GetLease(f.session, lease).status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(f.cache().Lookup(f.session, f.model, {}, {}).status()));
  EXPECT_EQ(f.cache().Stats().sessions_lost, 1u);
  EXPECT_TRUE(f.cache().Sessions(true)[0].lost);

  const SessionId next = *f.cache().OpenSession("next");
  const LeaseId wants = f.cache().Lookup(next, f.model, {}, {})->lease;
  EXPECT_TRUE(
      absl::IsResourceExhausted(f.cache().Reserve(next, wants, 0, 1, std::nullopt).status()));
  f.cache().CheckInvariants();
  f.cache().EndSession(f.session);
  EXPECT_EQ(f.Matched(Prompt("p", 2)), 2u) << "published blocks stay";
  EXPECT_TRUE(f.cache().Reserve(next, wants, 0, 2, std::nullopt).ok());
  EXPECT_EQ(f.cache().Stats().sessions_lost, 0u);
  f.cache().CheckInvariants();
}

TEST(Cache, ALostSessionWithoutLeasesEndsAtOnce) {
  Fixture f({.gpu = 4});
  f.cache().LoseSession(f.session);
  EXPECT_TRUE(absl::IsNotFound(f.cache().Lookup(f.session, f.model, {}, {}).status()));
  EXPECT_TRUE(f.cache().Sessions(false).empty());
}

TEST(Cache, LookupMatchesWholeBlocksAndIgnoresTheTail) {
  Fixture f({.gpu = 8});
  const Tokens prompt = Prompt("p", 3);
  f.Store(prompt);
  Tokens longer = prompt + Prompt("q", 2);
  EXPECT_EQ(f.Matched(longer), 3u);
  Tokens shorter(prompt.begin(), prompt.end() - 1);
  EXPECT_EQ(f.Matched(shorter), 2u);
  Tokens wrong = prompt;
  wrong[5] ^= 1;
  EXPECT_EQ(f.Matched(wrong), 1u);
}

TEST(Cache, LookupExtendsALeaseFromItsEnd) {
  Fixture f({.gpu = 8});
  const Tokens prompt = Prompt("p", 5);
  f.Store(prompt);
  const LookupResult first = f.Look(Tokens(prompt.begin(), prompt.begin() + 8));
  ASSERT_EQ(first.matched_blocks, 2u);
  LookupOptions extend;
  extend.lease = first.lease;
  const auto second = f.cache().Lookup(f.session, f.model, Fixture::Part(prompt, 2, 3), extend);
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(second->lease, first.lease);
  EXPECT_EQ(second->matched_blocks, 5u);
  ASSERT_EQ(second->runs.size(), 1u);
  EXPECT_EQ(second->runs[0].position, 2u);
  EXPECT_EQ(f.world.WrongBytes(f.model, second->runs, prompt), "");
  EXPECT_EQ(f.cache().GetLease(f.session, first.lease)->end, 5u);
}

TEST(Cache, ALeaseWithReservedBlocksIsNotExtended) {
  Fixture f({.gpu = 8});
  const LeaseId lease = f.EmptyLease();
  ASSERT_TRUE(f.cache().Reserve(f.session, lease, 0, 1, std::nullopt).ok());
  LookupOptions extend;
  extend.lease = lease;
  EXPECT_TRUE(absl::IsFailedPrecondition(
      f.cache().Lookup(f.session, f.model, Prompt("p", 1), extend).status()));
  const ModelId other = f.cache().OpenModel(World::Spec("other"))->id;
  EXPECT_TRUE(absl::IsInvalidArgument(f.cache().Lookup(f.session, other, {}, extend).status()));
}

TEST(Cache, PeekPinsAndTouchesNothing) {
  Fixture f({.gpu = 2});
  f.Store(Prompt("a", 1));
  f.Store(Prompt("b", 1));
  EXPECT_EQ(f.Matched(Prompt("a", 1)), 1u);
  EXPECT_EQ(f.Pinned(), 0u);
  EXPECT_EQ(f.cache().Stats().leases, 0u);
  EXPECT_EQ(f.cache().Stats().tiers[0].hits, 0u);
  f.Store(Prompt("c", 1));
  EXPECT_EQ(f.Matched(Prompt("a", 1)), 0u) << "a peek at it did not make it recent";
  EXPECT_EQ(f.Matched(Prompt("b", 1)), 1u);
}

TEST(Cache, ATierThatIsNotThereOrCannotBeReadIsRefused) {
  Fixture f({.gpu = 4});
  const LeaseId lease = f.EmptyLease();
  const auto host = f.cache().Reserve(f.session, lease, 0, 1, Tier::kHost);
  EXPECT_TRUE(absl::IsFailedPrecondition(host.status()));
  EXPECT_EQ(host.status().message(), "tier: this daemon has no HOST tier");
  const auto nvme = f.cache().Reserve(f.session, lease, 0, 1, Tier::kNvme);
  EXPECT_TRUE(absl::IsInvalidArgument(nvme.status()));
  EXPECT_EQ(nvme.status().message(), "tier: NVME given, allowed are GPU and HOST");
  EXPECT_TRUE(
      absl::IsFailedPrecondition(f.cache().Flush(f.session, lease, [](absl::Status) {}).status()));
}

TEST(Cache, StatsCountWhatHappened) {
  Fixture f({.gpu = 8});
  f.Store(Prompt("p", 3));
  const LookupResult found = f.Look(Prompt("p", 3) + Prompt("q", 2));
  const CacheStats stats = f.cache().Stats();
  EXPECT_EQ(stats.lookups, 2u);
  EXPECT_EQ(stats.lookup_blocks, 3u + 5);
  EXPECT_EQ(stats.miss_blocks, 3u + 2);
  EXPECT_EQ(stats.put_blocks, 3u);
  EXPECT_EQ(stats.leases, 1u);
  EXPECT_EQ(stats.tiers[0].hits, 3u);
  EXPECT_EQ(stats.tiers[0].blocks, 3u);
  EXPECT_EQ(stats.tiers[0].bytes_total, 8 * kSlotGranule);
  EXPECT_EQ(stats.tiers[0].bytes_used, 3 * kSlotGranule);
  EXPECT_EQ(stats.tiers[0].bytes_pinned, 3 * kSlotGranule);
  f.Release(found.lease);
  EXPECT_EQ(f.Pinned(), 0u);
}

TEST(Cache, SessionsListTheirLeases) {
  Fixture f({.gpu = 8});
  const LeaseId lease = f.Hold(Prompt("p", 3));
  ASSERT_TRUE(f.cache().Reserve(f.session, lease, 3, 2, std::nullopt).ok());
  f.world.clock.Advance(absl::Seconds(3));
  const std::vector<SessionInfo> sessions = f.cache().Sessions(true);
  ASSERT_EQ(sessions.size(), 1u);
  EXPECT_EQ(sessions[0].worker, "worker");
  EXPECT_EQ(sessions[0].age, absl::Seconds(3));
  ASSERT_EQ(sessions[0].leases.size(), 1u);
  EXPECT_EQ(sessions[0].leases[0].lease, lease);
  EXPECT_EQ(sessions[0].leases[0].end, 3u);
  EXPECT_EQ(sessions[0].leases[0].reserved_blocks, 2u);
  EXPECT_EQ(f.cache().Sessions(false)[0].leases.size(), 0u);
  EXPECT_EQ(f.cache().Sessions(false)[0].lease_count, 1u);
}

TEST(Cache, ExplainSaysWhereAPrefixIsAndWhyItStops) {
  Fixture f({.gpu = 8, .host = 8, .nvme = 8});
  EXPECT_EQ(f.cache().Explain(f.model, Prompt("p", 2))->stopped_because,
            "nothing of this model is cached");
  const LeaseId lease = f.Hold(Prompt("p", 3), Tier::kGpu);
  f.Store(Prompt("p", 3) + Prompt("x", 2), Tier::kHost);
  f.Store(Prompt("p", 3) + Prompt("y", 1), Tier::kHost);
  const auto why = f.cache().Explain(f.model, Prompt("p", 3) + Prompt("x", 3));
  ASSERT_TRUE(why.ok());
  EXPECT_EQ(why->asked_blocks, 6u);
  EXPECT_EQ(why->matched_blocks, 5u);
  EXPECT_EQ(why->stopped_because, "no cached block continues with tokens 20 to 23");
  ASSERT_EQ(why->segments.size(), 2u);
  EXPECT_EQ(why->segments[0].position, 0u);
  EXPECT_EQ(why->segments[0].blocks, 3u);
  EXPECT_TRUE(why->segments[0].in_tier[0]);
  EXPECT_GE(why->segments[0].pins, 1u);
  EXPECT_EQ(why->segments[0].children, 2u);
  EXPECT_EQ(why->segments[1].position, 3u);
  EXPECT_EQ(why->segments[1].blocks, 2u);
  EXPECT_TRUE(why->segments[1].in_tier[1]);
  EXPECT_FALSE(why->segments[1].in_tier[0]);
  EXPECT_EQ(f.cache().Explain(f.model, Prompt("p", 3))->stopped_because,
            "everything asked for is cached");
  f.Release(lease);
}

TEST(Cache, ExplainShowsWhatOnlyNvmeHolds) {
  Fixture f({.host = 8, .nvme = 8});
  f.Store(Prompt("p", 3));
  ASSERT_TRUE(f.world.Settle());
  f.world.Restart();
  f.Open();
  const auto why = f.cache().Explain(f.model, Prompt("p", 4));
  EXPECT_EQ(why->matched_blocks, 3u);
  ASSERT_EQ(why->segments.size(), 1u);
  EXPECT_EQ(why->segments[0].in_tier, (std::array<bool, 3>{false, false, true}));
}

TEST(Cache, TopPrefixesAreTheMostUsed) {
  Fixture f({.gpu = 16});
  f.Store(Prompt("a", 2));
  f.Store(Prompt("b", 3));
  for (int i = 0; i < 3; ++i) f.Release(f.Look(Prompt("b", 3)).lease);
  f.Release(f.Look(Prompt("a", 2)).lease);
  const std::vector<TopPrefix> top = f.cache().TopPrefixes(f.model, 1);
  ASSERT_EQ(top.size(), 1u);
  EXPECT_EQ(top[0].blocks, 3u);
  EXPECT_EQ(top[0].hits, 3u);
  const Tokens b = Prompt("b", 3);
  EXPECT_EQ(top[0].head, Tokens(b.begin(), b.begin() + 12));
  EXPECT_EQ(f.cache().TopPrefixes(0, 10).size(), 2u);
  EXPECT_EQ(f.cache().TopPrefixes(12345, 10).size(), 0u);
}

TEST(Cache, EvictNeverTouchesWhatIsPinned) {
  Fixture f({.gpu = 8, .host = 8, .nvme = 8});
  const LeaseId lease = f.Hold(Prompt("pinned", 2));
  f.Store(Prompt("free", 3));
  const auto [dropped, kept] = f.cache().Evict(Tier::kGpu, f.model, 100);
  EXPECT_EQ(dropped, 3u);
  EXPECT_EQ(kept, 2u);
  EXPECT_EQ(f.Where(Prompt("pinned", 2))[0], 2u);
  EXPECT_EQ(f.Where(Prompt("free", 3))[0], 0u);
  f.Release(lease);
  EXPECT_EQ(f.cache().Evict(Tier::kGpu, f.model, 1).first, 1u);
  EXPECT_EQ(f.cache().Evict(Tier::kGpu, 0, 100).second, 0u);
  f.cache().CheckInvariants();
}

TEST(Cache, LimitsOfSessionsModelsAndLeasesAreResourceExhausted) {
  FakeClock clock;
  SteppedMover mover(1);
  Cache::Options options;
  options.tiers[0] = {8 * kSlotGranule, 8 * kSlotGranule, 0};
  options.models_max = 1;
  options.sessions_max = 1;
  options.leases_per_session_max = 1;
  Cache cache(options, clock, mover, MakeLruPolicy());
  const ModelId model = cache.OpenModel(World::Spec("a"))->id;
  const SessionId session = *cache.OpenSession("a");
  const LeaseId lease = cache.Lookup(session, model, {}, {})->lease;
  for (const absl::Status& status :
       {cache.OpenModel(World::Spec("b")).status(), cache.OpenSession("b").status(),
        cache.Lookup(session, model, {}, {}).status(), cache.Fork(session, lease).status()}) {
    EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  }
  EXPECT_EQ(cache.Stats().exhausted, 4u);
}

}  // namespace
}  // namespace larder::testing
