#include "client/worker/cache_session.h"

#include <vector>

#include "gtest/gtest.h"
#include "tests/worker/test_daemon.h"

namespace larder::worker {
namespace {

class CacheSessionTest : public testing::Test {
 protected:
  CacheSession Open() {
    return CacheSession(daemon_.options(), v1::ModelSpec(), std::nullopt,
                        [this](std::string_view text) { notices_.emplace_back(text); });
  }

  TestDaemon daemon_;
  const std::vector<uint32_t> tokens_ = std::vector<uint32_t>(9);
  std::vector<std::string> notices_;
};

TEST_F(CacheSessionTest, LooksUp) {
  daemon_.AnswerLookup(2);
  CacheSession cache = Open();
  const absl::StatusOr<Lease> lease = cache.Lookup(tokens_, {});
  ASSERT_TRUE(lease.ok()) << lease.status();
  EXPECT_EQ(lease->end(), 2u);
  EXPECT_TRUE(notices_.empty());
}

TEST_F(CacheSessionTest, FindsARestartedDaemonAtTheNextLookup) {
  CacheSession cache = Open();
  daemon_.AnswerLookup(2);
  daemon_.HostBlock(1)[5] = std::byte{42};
  const absl::StatusOr<Lease> lease = cache.Lookup(tokens_, {});
  ASSERT_TRUE(lease.ok());
  const std::span<const std::byte> block = *lease->Block(1);
  daemon_.Kill();
  daemon_.Restart();
  daemon_.AnswerLookup(1);
  // Until the end of the stream has arrived a lookup still goes to the old session.
  absl::StatusOr<Lease> again = cache.Lookup(tokens_, {});
  while (!again.ok()) again = cache.Lookup(tokens_, {});
  EXPECT_EQ(again->end(), 1u);
  EXPECT_EQ(notices_.back(), "using the cache again");
  EXPECT_EQ(block[5], std::byte{42});
}

TEST_F(CacheSessionTest, SaysOnceThatTheDaemonIsGone) {
  CacheSession cache = Open();
  daemon_.Kill();
  for (int i = 0; i < 100; ++i) {
    EXPECT_TRUE(absl::IsUnavailable(cache.Lookup(tokens_, {}).status()));
  }
  ASSERT_EQ(notices_.size(), 1u);
  EXPECT_NE(notices_[0].find("computing without the cache: "), std::string::npos);
}

TEST_F(CacheSessionTest, StartsWithoutADaemon) {
  daemon_.Kill();
  CacheSession cache = Open();
  EXPECT_TRUE(absl::IsUnavailable(cache.lost()));
  EXPECT_TRUE(absl::IsUnavailable(cache.Lookup(tokens_, {}).status()));
  EXPECT_EQ(notices_.size(), 1u);
}

TEST_F(CacheSessionTest, LeavesADaemonThatDrains) {
  CacheSession cache = Open();
  daemon_.AnswerLookup(0);
  ASSERT_TRUE(cache.Lookup(tokens_, {}).ok());
  daemon_.fake().Drain();
  while (cache.attached()) cache.Tend();
  EXPECT_EQ(notices_,
            std::vector<std::string>{"computing without the cache: the daemon is stopping"});
}

TEST_F(CacheSessionTest, AnErrorOfOneLookupIsNoLoss) {
  CacheSession cache = Open();
  daemon_.fake().AnswerError("LookupPrefix",
                             grpc::Status(grpc::RESOURCE_EXHAUSTED, "too many leases"));
  EXPECT_TRUE(absl::IsResourceExhausted(cache.Lookup(tokens_, {}).status()));
  EXPECT_TRUE(cache.attached());
  EXPECT_TRUE(notices_.empty());
}

// A worker on a GPU can do nothing with blocks elsewhere, and says what the daemon lacks.
TEST_F(CacheSessionTest, WantsTheGpuTierOfItsDevice) {
  DeviceUuid uuid;
  for (uint8_t i = 0; i < 16; ++i) uuid[i] = i;
  const CacheSession cache(daemon_.options(), v1::ModelSpec(), uuid,
                           [this](std::string_view text) { notices_.emplace_back(text); });
  EXPECT_FALSE(cache.attached());
  EXPECT_TRUE(absl::IsFailedPrecondition(cache.lost())) << cache.lost();
  EXPECT_NE(cache.lost().message().find(
                "start it with --gpu=cuda:GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"),
            std::string::npos)
      << cache.lost();
  EXPECT_EQ(notices_.size(), 1u);
}

TEST(SpecOf, SaysAllThatBlocksDependOn) {
  const KvGeometry geometry{.layers = 3,
                            .kv_heads = 2,
                            .head_dim = 64,
                            .dtype = Dtype::kF16,
                            .block_tokens = 32,
                            .weights_revision = "r"};
  const v1::ModelSpec spec = SpecOf("LlamaForCausalLM", geometry);
  EXPECT_EQ(spec.name(), "LlamaForCausalLM");
  EXPECT_EQ(spec.weights_revision(), "r");
  EXPECT_EQ(spec.layers(), 3u);
  EXPECT_EQ(spec.kv_heads(), 2u);
  EXPECT_EQ(spec.head_dim(), 64u);
  EXPECT_EQ(spec.dtype(), v1::DTYPE_F16);
  EXPECT_EQ(spec.block_tokens(), 32u);
  EXPECT_EQ(spec.shards(), 1u);
}

}  // namespace
}  // namespace larder::worker
