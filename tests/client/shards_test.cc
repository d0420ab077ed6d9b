// A group of two ranks: its lead's lease and a member, against a fake daemon.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "client/client.h"
#include "client/group_member.h"
#include "fake_daemon.h"

namespace larder {
namespace {

constexpr uint64_t kPart = FakeDaemon::kBlockBytes;
const uint32_t kTokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

class ShardsTest : public testing::Test {
 protected:
  ShardsTest() {
    std::string pattern = testing::TempDir() + "larder_shards_XXXXXX";
    directory_ = mkdtemp(pattern.data());
    daemon_ = std::make_unique<FakeDaemon>(directory_, 1);
    model_ = FakeDaemon::Model();
    model_.mutable_spec()->set_shards(2);
    client_.emplace(*Client::Connect(daemon_->address(), {.call_timeout = absl::Seconds(2)}));
    session_.emplace(*client_->NewSession("lead"));
    v1::LookupPrefixResponse found;
    found.set_lease_id(7);
    found.set_matched_tokens(16);
    *found.add_runs() = FakeDaemon::GpuRun(0, {0, 8192});
    *found.add_runs() = FakeDaemon::HostRun(2, {16384});
    v1::Run& nvme = *found.add_runs();
    nvme.set_tier(v1::TIER_NVME);
    nvme.set_position(3);
    nvme.set_blocks(1);
    daemon_->AnswerLookup(found);
    lease_.emplace(*session_->Lookup(model_, kTokens));
  }
  ~ShardsTest() override {
    lease_.reset();
    session_.reset();
    daemon_.reset();
    std::filesystem::remove_all(directory_);
  }
  // Where each rank's part of these blocks begins.
  std::byte* Expected(uint32_t position, uint32_t rank) {
    switch (position) {
      case 0: return daemon_->gpu(rank).data();
      case 1: return daemon_->gpu(rank).data() + 8192;
      default: return daemon_->arena().data() + 16384 + rank * kPart;
    }
  }

  std::string directory_;
  std::unique_ptr<FakeDaemon> daemon_;
  v1::Model model_;
  std::optional<Client> client_;
  std::optional<Session> session_;
  std::optional<Lease> lease_;
};

TEST_F(ShardsTest, ALeaseKnowsEachRanksPart) {
  EXPECT_EQ(lease_->shards(), 2u);
  for (uint32_t position = 0; position < 3; ++position) {
    for (uint32_t rank = 0; rank < 2; ++rank) {
      std::byte& mark = *Expected(position, rank);
      mark = static_cast<std::byte>(10 * position + rank + 1);
      const auto part = lease_->Block(position, rank);
      ASSERT_TRUE(part.ok()) << part.status();
      EXPECT_EQ(part->size(), kPart);
      EXPECT_EQ(part->front(), mark) << position << ", rank " << rank;
    }
    const absl::Status none = lease_->Block(position, 2).status();
    EXPECT_TRUE(absl::IsOutOfRange(none)) << none;
    EXPECT_TRUE(absl::StrContains(none.message(), "rank 2 has no part: the model has 2 shards"));
  }
}

TEST_F(ShardsTest, AMemberFindsItsPartByTheLeadsRuns) {
  const auto member = GroupMember::Join(session_->group(), model_, 1);
  ASSERT_TRUE(member.ok()) << member.status();
  const auto runs = lease_->Runs(0, 4);
  ASSERT_TRUE(runs.ok()) << runs.status();
  ASSERT_EQ(runs->size(), 3u) << "a run a tier";
  uint32_t position = 0;
  for (const v1::Run& sent : *runs) {
    v1::Run run;  // as it arrives
    ASSERT_TRUE(run.ParseFromString(sent.SerializeAsString()));
    EXPECT_EQ(run.position(), position);
    for (uint32_t i = 0; i < run.blocks(); ++i, ++position) {
      const auto part = member->Part(run, i);
      if (run.tier() == v1::TIER_NVME) {
        EXPECT_TRUE(absl::IsFailedPrecondition(part.status())) << part.status();
        continue;
      }
      ASSERT_TRUE(part.ok()) << part.status();
      EXPECT_EQ(part->size(), kPart);
      part->front() = std::byte{77};
      EXPECT_EQ(*Expected(position, 1), std::byte{77});
      EXPECT_NE(*Expected(position, 0), std::byte{77});
    }
    EXPECT_TRUE(absl::IsOutOfRange(member->Part(run, run.blocks()).status()));
  }
  EXPECT_EQ(position, 4u);
}

TEST_F(ShardsTest, PartOfALeaseAsRuns) {
  const auto runs = lease_->Runs(1, 3);
  ASSERT_TRUE(runs.ok());
  ASSERT_EQ(runs->size(), 2u);
  EXPECT_EQ((*runs)[0].position(), 1u);
  EXPECT_EQ((*runs)[0].offsets(0), 8192u);
  EXPECT_EQ((*runs)[1].position(), 2u);
  EXPECT_TRUE(lease_->Runs(2, 2)->empty());
  EXPECT_TRUE(absl::IsOutOfRange(lease_->Runs(0, 5).status()));
  EXPECT_TRUE(absl::IsOutOfRange(lease_->Runs(2, 1).status()));
}

TEST_F(ShardsTest, WhoMayNotJoin) {
  const absl::Status rank = GroupMember::Join(session_->group(), model_, 2).status();
  EXPECT_TRUE(absl::IsInvalidArgument(rank));
  EXPECT_EQ(rank.message(), "rank: 2 given, must be less than the model's 2 shards");
  Group other = session_->group();
  other.session_id += 1;
  EXPECT_TRUE(absl::IsNotFound(GroupMember::Join(other, model_, 1).status()));
  other = session_->group();
  other.boot_id += 1;
  EXPECT_TRUE(absl::IsNotFound(GroupMember::Join(other, model_, 1).status()));
}

// A daemon that gives an offset whose later parts are outside of the arena.
TEST_F(ShardsTest, APartOutsideOfItsArenaIsRefused) {
  const auto member = GroupMember::Join(session_->group(), model_, 1);
  ASSERT_TRUE(member.ok()) << member.status();
  const uint64_t last = FakeDaemon::kArenaBytes - kPart;
  EXPECT_TRUE(member->Part(FakeDaemon::GpuRun(0, {last}), 0).ok());
  EXPECT_TRUE(absl::IsInternal(member->Part(FakeDaemon::HostRun(0, {last}), 0).status()));
  EXPECT_TRUE(absl::IsInternal(member->Part(FakeDaemon::HostRun(0, {~uint64_t{0}}), 0).status()));
}

}  // namespace
}  // namespace larder
