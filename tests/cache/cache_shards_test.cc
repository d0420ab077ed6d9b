// Models of several shards: what a block takes in each tier, and that each rank's part is where
// it belongs.
#include "absl/strings/match.h"
#include "tests/cache/cache_fixture.h"

namespace larder::testing {
namespace {

constexpr uint64_t kPart = World::kPartBytes;

// A world whose model has `shards`, as many as the GPU tier has ranks.
struct ShardFixture : Fixture {
  ShardFixture(World::Sizes sizes, uint32_t shards) : Fixture(WithRanks(sizes, shards)) {
    auto opened = cache().OpenModel(World::Spec("sharded", shards));
    EXPECT_TRUE(opened.ok()) << opened.status();
    model = opened->id;
  }
  static World::Sizes WithRanks(World::Sizes sizes, uint32_t ranks) {
    sizes.gpu_ranks = ranks;
    return sizes;
  }
  absl::Status Open(const std::string& name, uint32_t shards) {
    return cache().OpenModel(World::Spec(name, shards)).status();
  }
  uint64_t Used(Tier tier) { return cache().Stats().tiers[Index(tier)].bytes_used; }
  // Brings the prompt up to GPU; what is wrong with its bytes.
  std::string Restored(const Tokens& prompt) {
    const LookupResult found = Look(prompt);
    EXPECT_EQ(found.matched_blocks, Blocks(prompt));
    const auto up = world.PrefetchAll(session, found.lease, Tier::kGpu);
    EXPECT_TRUE(up.has_value() && up->ready_blocks == Blocks(prompt));
    const std::string wrong = up ? world.WrongBytes(model, up->runs, prompt) : "no prefetch";
    Release(found.lease);
    return wrong;
  }
};

TEST(Shards, ABlockTakesAPartInGpuAndAllPartsElsewhere) {
  ShardFixture f({.gpu = 8, .host = 64, .nvme = 64}, 4);
  const Tokens prompt = Prompt("p", 3);
  f.Store(prompt, Tier::kGpu);
  EXPECT_EQ(f.Used(Tier::kGpu), 3 * kPart);
  EXPECT_EQ(f.Used(Tier::kHost), 0u);
  const LeaseId lease = f.Look(prompt).lease;
  ASSERT_TRUE(f.cache().Flush(f.session, lease, [](absl::Status) {}).ok());
  ASSERT_FALSE(f.world.mover.jobs().empty());
  for (const MoveJob& job : f.world.mover.jobs()) {
    EXPECT_EQ(job.bytes, 4 * kPart);
    EXPECT_EQ(job.shards, 4u);
  }
  ASSERT_TRUE(f.world.Settle());
  EXPECT_EQ(f.Used(Tier::kGpu), 3 * kPart);
  EXPECT_EQ(f.Used(Tier::kHost), 3 * 4 * kPart);
  EXPECT_EQ(f.Used(Tier::kNvme), 3 * 4 * kPart);
  for (const HopStats& hop : f.cache().Stats().hops) {
    if (hop.to != Tier::kGpu && hop.from != Tier::kNvme) {
      EXPECT_EQ(hop.bytes, 3 * 4 * kPart);
    }
  }
  f.Release(lease);
  f.cache().CheckInvariants();
}

TEST(Shards, EachTierIsFullByItsOwnMeasure) {
  ShardFixture f({.gpu = 6, .host = 9}, 4);
  const LeaseId gpu = f.EmptyLease();
  EXPECT_TRUE(f.cache().Reserve(f.session, gpu, 0, 6, Tier::kGpu).ok());
  const LeaseId host = f.EmptyLease();
  EXPECT_TRUE(f.cache().Reserve(f.session, host, 0, 2, Tier::kHost).ok());
  const auto none = f.cache().Reserve(f.session, f.EmptyLease(), 0, 1, Tier::kHost).status();
  EXPECT_TRUE(absl::IsResourceExhausted(none));
  EXPECT_TRUE(absl::StrContains(none.message(), "tier HOST: 1 blocks (16384 bytes) asked for"))
      << none;
  const auto more = f.cache().Reserve(f.session, f.EmptyLease(), 0, 2, Tier::kGpu).status();
  EXPECT_TRUE(absl::StrContains(more.message(), "tier GPU (each rank): 2 blocks (8192 bytes)"))
      << more;
  f.cache().CheckInvariants();
}

TEST(Shards, TheLowWaterMarkIsCountedInSlotsOfTheTier) {
  // 16 KiB of 48 are to be free in HOST: one block of four parts; and 4 of 12 slots in GPU.
  ShardFixture f({.gpu = 12, .host = 12, .nvme = 64, .low_water = 4}, 4);
  for (int i = 0; i < 6; ++i) f.Store(Prompt("p" + std::to_string(i), 2), Tier::kGpu);
  ASSERT_TRUE(f.world.Settle());
  EXPECT_LE(f.Used(Tier::kGpu), 8 * kPart);
  EXPECT_LE(f.Used(Tier::kHost), 8 * kPart);
  EXPECT_GE(f.Used(Tier::kGpu), 7 * kPart) << "no more than that";
  EXPECT_GE(f.Used(Tier::kHost), 8 * kPart);
}

TEST(Shards, EvictionAndRestartKeepEachRanksBytes) {
  ShardFixture f({.gpu = 8, .host = 32, .nvme = 128}, 4);
  const Tokens prompt = Prompt("p", 5);
  f.Store(prompt, Tier::kGpu);
  ASSERT_TRUE(f.world.Settle());
  const LeaseId lease = f.Look(prompt).lease;
  ASSERT_TRUE(f.cache().Flush(f.session, lease, [](absl::Status) {}).ok());
  ASSERT_TRUE(f.world.Settle());
  f.Release(lease);
  f.cache().Evict(Tier::kGpu, 0, 100);
  EXPECT_EQ(f.Where(prompt), (Tiers{0, 5, 0}));
  EXPECT_EQ(f.Restored(prompt), "");
  f.cache().Evict(Tier::kGpu, 0, 100);
  f.cache().Evict(Tier::kHost, 0, 100);
  EXPECT_EQ(f.Where(prompt), (Tiers{0, 0, 5}));
  EXPECT_EQ(f.Restored(prompt), "");

  f.world.Restart();
  f.Fixture::Open();
  f.model = f.cache().OpenModel(World::Spec("sharded", 4))->id;
  EXPECT_EQ(f.Where(prompt), (Tiers{0, 0, 5}));
  EXPECT_EQ(f.Used(Tier::kNvme), 5 * 4 * kPart);
  EXPECT_EQ(f.Restored(prompt), "");
  f.cache().CheckInvariants();
}

TEST(Shards, DegreesOfOneModelNeverMix) {
  ShardFixture f({.gpu = 8, .host = 32}, 4);
  f.Store(Prompt("p", 2));
  for (const uint32_t shards : {1u, 2u}) {
    ModelSpec spec = World::Spec("sharded", 4);
    spec.shards = shards;
    const auto other = f.cache().OpenModel(spec);
    ASSERT_TRUE(other.ok()) << other.status();
    EXPECT_NE(other->id, f.model);
    EXPECT_EQ(other->WholeBlockBytes(), 4 * kPart);
    EXPECT_EQ(f.cache().Lookup(f.session, other->id, Prompt("p", 2), {})->matched_blocks, 0u);
  }
}

// A model of one shard takes a slot number like any other, and only the first rank has its bytes.
TEST(Shards, AModelOfFewerShardsSharesTheSlotNumbers) {
  ShardFixture f({.gpu = 8, .host = 32, .slab = 4}, 4);
  const ModelId one = f.cache().OpenModel(World::Spec("one"))->id;
  f.Hold(Prompt("p", 4), Tier::kGpu);
  std::swap(f.model, const_cast<ModelId&>(one));
  f.Hold(Prompt("q", 4), Tier::kGpu);
  EXPECT_EQ(f.Used(Tier::kGpu), 8 * kPart);
  std::swap(f.model, const_cast<ModelId&>(one));
  const LookupResult found = f.Look(Prompt("p", 4));
  EXPECT_EQ(f.world.WrongBytes(f.model, found.runs, Prompt("p", 4)), "");
}

TEST(Shards, WhatIsWrittenAndRestoredIsCountedWhole) {
  World::Sizes sizes{.host = 64, .nvme = 64};
  sizes.nvme_writes.bytes_per_day = 3 * 4 * kPart;  // three blocks
  ShardFixture f(sizes, 4);
  f.Store(Prompt("p", 5));
  ASSERT_TRUE(f.world.Settle());
  EXPECT_EQ(f.world.mover.nvme.size(), 3u);
  f.cache().Evict(Tier::kHost, 0, 100);
  const LookupResult found = f.Look(Prompt("p", 5));
  EXPECT_EQ(found.matched_blocks, 3u);
  EXPECT_EQ(found.restore.bytes, 3 * 4 * kPart);
}

TEST(Shards, BoundsAreNamed) {
  ShardFixture f({.gpu = 8, .host = 12, .nvme = 12}, 4);
  const absl::Status more = f.Open("m", 5);
  EXPECT_TRUE(absl::IsInvalidArgument(more));
  EXPECT_EQ(more.message(),
            "spec.shards: 5 given, allowed are 1 to 4, the ranks of this daemon's GPU tier");
  ModelSpec uneven = World::Spec("m", 4);
  uneven.shards = 3;
  EXPECT_EQ(f.cache().OpenModel(uneven).status().message(),
            "spec.kv_heads: 4 given, must be a multiple of shards, 3");
  // A part fits into GPU, but the whole block not into HOST.
  ModelSpec large = World::Spec("m", 4);
  large.head_dim *= 4;
  const absl::Status whole = f.cache().OpenModel(large).status();
  EXPECT_TRUE(absl::IsResourceExhausted(whole));
  EXPECT_EQ(whole.message(),
            "spec: a block of 65536 bytes, but tier HOST takes at most 49152 (a slab)");
  // Without a GPU tier every rank reads HOST; there may be as many as a model allows.
  ShardFixture host({.host = 64}, 1);
  EXPECT_TRUE(host.Open("m", 16).ok());
  EXPECT_TRUE(absl::IsInvalidArgument(host.Open("m", 17)));
}

}  // namespace
}  // namespace larder::testing
