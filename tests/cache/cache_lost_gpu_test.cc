// A GPU tier whose device is lost: nothing new goes there, what is read stays until it is let go.
#include "absl/status/status.h"
#include "tests/cache/cache_fixture.h"

namespace larder::testing {
namespace {

TEST(LostGpu, IsGivenUpCopyByCopy) {
  Fixture f({.gpu = 32, .host = 64, .nvme = 64});
  const Tokens durable = Prompt("durable", 3);
  const Tokens held = Prompt("held", 4);
  const Tokens only_there = Prompt("only there", 5);
  LeaseId lease = f.Hold(durable, Tier::kGpu);
  ASSERT_TRUE(f.cache().Flush(f.session, lease, [](absl::Status) {}).ok());
  ASSERT_TRUE(f.world.Settle());
  f.Release(lease);
  lease = f.Hold(held, Tier::kGpu);
  f.Store(only_there, Tier::kGpu);
  ASSERT_EQ(f.Where(only_there), (Tiers{5, 0, 0}));

  f.cache().LoseGpu();
  f.cache().CheckInvariants();
  EXPECT_EQ(f.Where(durable), (Tiers{0, 3, 0}));
  EXPECT_EQ(f.Matched(held), 0u);
  EXPECT_EQ(f.Matched(only_there), 0u);
  EXPECT_EQ(f.cache().Stats().tiers[Index(Tier::kGpu)].blocks, 4u);  // held

  const LeaseId empty = f.EmptyLease();
  EXPECT_TRUE(absl::IsUnavailable(f.cache().Reserve(f.session, empty, 0, 1, Tier::kGpu).status()));
  EXPECT_TRUE(
      absl::IsUnavailable(f.cache().Prefetch(f.session, empty, Tier::kGpu, [] {}).status()));
  f.Release(empty);
  f.Store(only_there);  // wherever the cache wants it
  EXPECT_EQ(f.Where(only_there), (Tiers{0, 5, 0}));

  f.Release(lease);
  EXPECT_EQ(f.Matched(held), 0u);
  EXPECT_EQ(f.cache().Stats().tiers[Index(Tier::kGpu)].bytes_used, 0u);
  f.cache().CheckInvariants();
}

// A flush of what can no longer come down would wait for its caller's deadline.
TEST(LostGpu, EndsFlushesOfWhatIsOnlyThere) {
  Fixture f({.gpu = 32, .host = 64, .nvme = 64});
  const LeaseId lease = f.Hold(Prompt("half down", 6), Tier::kGpu);
  std::vector<absl::Status> ends;
  const auto flush = [&](LeaseId id) {
    ASSERT_TRUE(f.cache()
                    .Flush(f.session, id, [&](absl::Status status) { ends.push_back(status); })
                    .ok());
  };
  flush(lease);  // its copies are under way, and the device's loss fails them later
  f.cache().LoseGpu();
  EXPECT_TRUE(ends.empty());
  ASSERT_FALSE(f.world.mover.idle());
  while (!f.world.mover.idle()) {
    f.world.mover.Complete(f.world.mover.jobs().front().id, absl::UnavailableError("lost"));
  }
  ASSERT_EQ(ends.size(), 1u);
  EXPECT_TRUE(absl::IsDataLoss(ends[0])) << ends[0];
  EXPECT_NE(ends[0].message().find("block 0 is only in GPU"), absl::string_view::npos) << ends[0];

  flush(lease);  // none is under way now
  ASSERT_EQ(ends.size(), 2u);
  EXPECT_TRUE(absl::IsDataLoss(ends[1])) << ends[1];

  flush(f.Hold(Prompt("in HOST", 3), Tier::kHost));  // others are flushed as before
  ASSERT_TRUE(f.world.Settle());
  ASSERT_EQ(ends.size(), 3u);
  EXPECT_TRUE(ends[2].ok()) << ends[2];
  f.cache().CheckInvariants();
}

// What a lost device holds is still there while a lease or a copy has it, and for nobody else.
TEST(LostGpu, OffersNothingOfIt) {
  Fixture f({.gpu = 32, .host = 64, .nvme = 64});
  const Tokens held = Prompt("held", 4);
  const Tokens moving = Prompt("moving", 3);
  const LeaseId lease = f.Hold(held, Tier::kGpu);
  const LeaseId flushed = f.Hold(moving, Tier::kGpu);
  ASSERT_TRUE(f.cache().Flush(f.session, flushed, [](absl::Status) {}).ok());
  f.Release(flushed);
  ASSERT_FALSE(f.world.mover.idle());

  f.cache().LoseGpu();
  EXPECT_EQ(f.Matched(moving), 0u);
  EXPECT_EQ(f.Matched(held), 0u);
  f.Store(held);  // anew, by another worker: now HOST has it too
  EXPECT_EQ(f.Matched(held), 4u);
  f.Release(lease);
  EXPECT_EQ(f.Where(held), (Tiers{0, 4, 0}));
  f.cache().CheckInvariants();
}

// More than one turn of the cleaner drops.
TEST(LostGpu, LargeOnesGoInTurns) {
  constexpr uint32_t kBlocks = 1200;
  Fixture f({.gpu = 2048, .host = 64, .nvme = 64});
  f.Store(Prompt("long", kBlocks), Tier::kGpu);
  f.cache().LoseGpu();
  const uint64_t left = f.cache().Stats().tiers[Index(Tier::kGpu)].blocks;
  EXPECT_LT(left, kBlocks);
  EXPECT_GT(left, 0u);
  for (int i = 0; i < 3; ++i) f.cache().Clean();
  EXPECT_EQ(f.cache().Stats().tiers[Index(Tier::kGpu)].blocks, 0u);
  f.cache().CheckInvariants();
}

}  // namespace
}  // namespace larder::testing
