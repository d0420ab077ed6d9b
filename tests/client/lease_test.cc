// Leases against a fake daemon: what they hold after each answer, and which answers they refuse.
#include "client/lease.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "client/client.h"
#include "fake_daemon.h"

namespace larder {
namespace {

const uint32_t kTokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};

class LeaseTest : public testing::Test {
 protected:
  LeaseTest() {
    std::string pattern = testing::TempDir() + "larder_lease_XXXXXX";
    directory_ = mkdtemp(pattern.data());
    daemon_ = std::make_unique<FakeDaemon>(directory_, 1);
    absl::StatusOr<Client> client =
        Client::Connect(daemon_->address(), {.call_timeout = absl::Seconds(2)});
    if (client.ok()) client_ = *std::move(client);
    absl::StatusOr<Session> session = client_->NewSession("test");
    if (session.ok()) session_ = *std::move(session);
  }
  ~LeaseTest() override {
    session_.reset();
    daemon_.reset();
    std::filesystem::remove_all(directory_);
  }

  static v1::Run NvmeRun(uint32_t position, uint32_t blocks) {
    v1::Run run;
    run.set_tier(v1::TIER_NVME);
    run.set_position(position);
    run.set_blocks(blocks);
    return run;
  }

  static v1::LeaseState State(uint32_t end, uint32_t reserved) {
    v1::LeaseState state;
    state.set_lease_id(7);
    state.set_end(end);
    state.set_reserved_blocks(reserved);
    return state;
  }

  // Two blocks in HOST, one on NVMe.
  absl::StatusOr<Lease> LookupThree() {
    v1::LookupPrefixResponse found;
    found.set_lease_id(7);
    found.set_matched_tokens(12);
    *found.add_runs() = FakeDaemon::HostRun(0, {0, 4096});
    *found.add_runs() = NvmeRun(2, 1);
    found.mutable_restore()->set_microseconds(99);
    daemon_->AnswerLookup(found);
    return session_->Lookup(FakeDaemon::Model(), kTokens);
  }

  absl::StatusOr<Lease> LookupNothing() {
    v1::LookupPrefixResponse found;
    found.set_lease_id(7);
    daemon_->AnswerLookup(found);
    return session_->Lookup(FakeDaemon::Model(), kTokens);
  }

  std::string directory_;
  std::unique_ptr<FakeDaemon> daemon_;
  std::optional<Client> client_;
  std::optional<Session> session_;
};

TEST_F(LeaseTest, BlocksAreWhereTheRunsSay) {
  absl::StatusOr<Lease> lease = LookupThree();
  ASSERT_TRUE(lease.ok()) << lease.status();
  EXPECT_EQ(lease->id(), 7u);
  EXPECT_EQ(lease->end(), 3u);
  EXPECT_EQ(lease->reserved(), 0u);
  EXPECT_EQ(lease->restore().microseconds(), 99u);
  EXPECT_EQ(lease->places()[1], (BlockPlace{v1::TIER_HOST, 1, 4096}));
  daemon_->arena()[4096] = std::byte{5};
  ASSERT_TRUE(lease->Block(1).ok()) << lease->Block(1).status();
  EXPECT_EQ(lease->Block(1)->size(), FakeDaemon::kBlockBytes);
  EXPECT_EQ(lease->Block(1)->front(), std::byte{5});
  EXPECT_TRUE(absl::IsFailedPrecondition(lease->Block(2).status())) << "on NVMe";
  EXPECT_TRUE(absl::IsOutOfRange(lease->Block(3).status()));
  EXPECT_TRUE(absl::IsOutOfRange(lease->Reserved(3).status()));
}

TEST_F(LeaseTest, PrefetchMovesPlaces) {
  absl::StatusOr<Lease> lease = LookupThree();
  ASSERT_TRUE(lease.ok());
  v1::PrefetchEvent first;
  *first.add_runs() = FakeDaemon::HostRun(2, {12288});
  first.set_ready_blocks(3);
  first.set_promised_blocks(3);
  v1::PrefetchEvent last;
  last.set_ready_blocks(3);
  last.set_promised_blocks(3);
  last.set_done(true);
  daemon_->AnswerPrefetch({first, last});
  int events = 0;
  absl::StatusOr<PrefetchResult> result =
      lease->Prefetch({}, [&](const v1::PrefetchEvent&) { ++events; });
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(events, 2);
  EXPECT_EQ(result->ready_blocks, 3u);
  EXPECT_FALSE(result->unreadable_position.has_value());
  EXPECT_TRUE(lease->Block(2).ok()) << lease->Block(2).status();
}

TEST_F(LeaseTest, UnreadableBlockIsReportedAndTheEndStays) {
  absl::StatusOr<Lease> lease = LookupThree();
  ASSERT_TRUE(lease.ok());
  v1::PrefetchEvent event;
  event.set_ready_blocks(2);
  event.set_promised_blocks(3);
  event.set_unreadable(true);
  event.set_unreadable_position(2);
  daemon_->AnswerPrefetch({event});
  absl::StatusOr<PrefetchResult> result = lease->Prefetch();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->unreadable_position, 2u);
  EXPECT_EQ(lease->end(), 3u);
  daemon_->AnswerState(State(2, 0));
  ASSERT_TRUE(lease->Truncate(2).ok());
  EXPECT_EQ(daemon_->LastPosition(), 2u);
  EXPECT_EQ(lease->end(), 2u);
  EXPECT_EQ(lease->places().size(), 2u);
}

TEST_F(LeaseTest, PrefetchWithoutALastEventIsAnError) {
  absl::StatusOr<Lease> lease = LookupThree();
  ASSERT_TRUE(lease.ok());
  daemon_->AnswerPrefetch({});
  EXPECT_TRUE(absl::IsInternal(lease->Prefetch().status()));
}

TEST_F(LeaseTest, ReserveWriteAndPut) {
  absl::StatusOr<Lease> lease = LookupNothing();
  ASSERT_TRUE(lease.ok()) << lease.status();
  v1::ReserveResponse room;
  *room.add_runs() = FakeDaemon::HostRun(0, {4096});
  *room.add_runs() = FakeDaemon::HostRun(1, {0});
  daemon_->AnswerReserve(room);
  ASSERT_TRUE(lease->Reserve(2).ok());
  EXPECT_EQ(lease->reserved(), 2u);
  EXPECT_TRUE(absl::IsOutOfRange(lease->Block(0).status()));
  absl::StatusOr<std::span<std::byte>> block = lease->Reserved(0);
  ASSERT_TRUE(block.ok()) << block.status();
  block->front() = std::byte{3};
  EXPECT_EQ(daemon_->arena()[4096], std::byte{3}) << "written in place";
  daemon_->AnswerState(State(1, 1));
  absl::StatusOr<v1::LeaseState> put = lease->Put(std::span(kTokens).first(4));
  ASSERT_TRUE(put.ok()) << put.status();
  EXPECT_EQ(daemon_->LastPosition(), 0u);
  EXPECT_EQ(lease->end(), 1u);
  EXPECT_EQ(lease->reserved(), 1u);
  EXPECT_EQ(lease->Block(0)->front(), std::byte{3}) << "the offset stays";
  EXPECT_TRUE(lease->Reserved(1).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(lease->Extend(kTokens).status()));
}

TEST_F(LeaseTest, RefusedPutChangesNothing) {
  absl::StatusOr<Lease> lease = LookupThree();
  ASSERT_TRUE(lease.ok());
  daemon_->AnswerError("Put", grpc::Status(grpc::ABORTED, "position: 3, the lease ends at 4"));
  EXPECT_EQ(lease->Put(std::span(kTokens).first(4)).status(),
            absl::AbortedError("position: 3, the lease ends at 4"));
  EXPECT_EQ(lease->end(), 3u);
}

TEST_F(LeaseTest, ReserveUpToTakesWhatThereIs) {
  absl::StatusOr<Lease> lease = LookupNothing();
  ASSERT_TRUE(lease.ok());
  v1::ReserveResponse room;
  *room.add_runs() = FakeDaemon::HostRun(0, {0});
  *room.add_runs() = FakeDaemon::HostRun(1, {4096});
  daemon_->AnswerReserve(room);
  absl::StatusOr<uint32_t> count = lease->ReserveUpTo(9);  // 9, 4, 2
  ASSERT_TRUE(count.ok()) << count.status();
  EXPECT_EQ(*count, 2u);
  EXPECT_EQ(lease->reserved(), 2u);
  EXPECT_TRUE(absl::IsInvalidArgument(lease->ReserveUpTo(0).status()));
  // The CPU reaches them, kernels of a device do not.
  EXPECT_TRUE(lease->Reserved(0).ok());
  EXPECT_TRUE(absl::IsNotFound(lease->DeviceAddress(0).status()));
  EXPECT_TRUE(absl::IsOutOfRange(lease->DeviceAddress(2).status()));
  EXPECT_TRUE(absl::IsOutOfRange(lease->DeviceAddress(0, 1).status()));
  // No more is to be had: what it has is the answer, and another tier is not asked.
  daemon_->AnswerReserve({});
  const int calls = daemon_->Calls("Reserve");
  EXPECT_EQ(*lease->ReserveUpTo(8), 2u);  // 8, 4
  EXPECT_EQ(daemon_->Calls("Reserve"), calls + 2);
  EXPECT_EQ(*lease->ReserveUpTo(1), 1u);
  EXPECT_EQ(lease->reserved(), 2u);
  daemon_->AnswerState(State(0, 0));
  ASSERT_TRUE(lease->Truncate(0).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(lease->ReserveUpTo(4).status()));
}

// A block past one that is only in HOST cannot go into GPU.
TEST_F(LeaseTest, ReserveUpToKeepsGpuPrefixClosed) {
  absl::StatusOr<Lease> lease = LookupNothing();
  ASSERT_TRUE(lease.ok());
  EXPECT_TRUE(absl::IsResourceExhausted(lease->ReserveUpTo(1).status()));
  EXPECT_EQ(daemon_->Calls("Reserve"), 2) << "the highest tier, then HOST";
  v1::LookupPrefixResponse found;
  found.set_lease_id(7);
  found.set_matched_tokens(4);
  *found.add_runs() = FakeDaemon::HostRun(0, {0});
  daemon_->AnswerLookup(found);
  lease = session_->Lookup(FakeDaemon::Model(), kTokens);
  ASSERT_TRUE(lease.ok());
  EXPECT_TRUE(absl::IsResourceExhausted(lease->ReserveUpTo(1).status()));
  EXPECT_EQ(daemon_->Calls("Reserve"), 3) << "HOST only";
}

TEST_F(LeaseTest, PutInlineHasNoPlaceHere) {
  absl::StatusOr<Lease> lease = LookupNothing();
  ASSERT_TRUE(lease.ok());
  daemon_->AnswerState(State(1, 0));
  const std::vector<std::byte> data(FakeDaemon::kBlockBytes);
  ASSERT_TRUE(lease->PutInline(std::span(kTokens).first(4), data).ok());
  EXPECT_EQ(lease->end(), 1u);
  EXPECT_TRUE(absl::IsFailedPrecondition(lease->Block(0).status()));
}

TEST_F(LeaseTest, ForkSharesThePath) {
  absl::StatusOr<Lease> lease = LookupThree();
  ASSERT_TRUE(lease.ok());
  v1::LeaseState state = State(3, 0);
  state.set_lease_id(8);
  daemon_->AnswerState(state);
  absl::StatusOr<Lease> fork = lease->Fork();
  ASSERT_TRUE(fork.ok()) << fork.status();
  EXPECT_EQ(fork->id(), 8u);
  EXPECT_EQ(fork->end(), 3u);
  EXPECT_EQ(fork->places()[1], lease->places()[1]);
}

TEST_F(LeaseTest, ReleasesOnce) {
  {
    absl::StatusOr<Lease> lease = LookupThree();
    ASSERT_TRUE(lease.ok());
    Lease moved = *std::move(lease);
    EXPECT_TRUE(moved.Release(/*session_over=*/true).ok());
    EXPECT_TRUE(daemon_->LastSessionOver());
    EXPECT_TRUE(absl::IsFailedPrecondition(moved.Release()));
    EXPECT_TRUE(absl::IsFailedPrecondition(moved.Reserve(1)));
    EXPECT_EQ(moved.end(), 0u);
  }
  EXPECT_EQ(daemon_->Calls("Release"), 1);
  { ASSERT_TRUE(LookupThree().ok()); }
  const absl::StatusOr<Lease> next = LookupNothing();
  EXPECT_EQ(daemon_->Calls("Release"), 2) << "by its destructor, before the next call";
}

TEST_F(LeaseTest, ItsDestructorWaitsForNobody) {
  {
    const absl::StatusOr<Lease> lease = LookupThree();
    ASSERT_TRUE(lease.ok());
    daemon_->HangCalls();
  }
  // Had it waited, the call would have met its deadline: nothing is answered before this.
  daemon_->ResumeCalls();
  session_.reset();
  EXPECT_EQ(daemon_->Answered("Release"), 1);
}

TEST_F(LeaseTest, ManyReleasesAtOnceAllArrive) {
  std::vector<Lease> leases;
  for (int i = 0; i < 200; ++i) {
    absl::StatusOr<Lease> lease = LookupThree();
    ASSERT_TRUE(lease.ok());
    leases.push_back(*std::move(lease));
  }
  leases.clear();
  session_.reset();
  EXPECT_EQ(daemon_->Calls("Release"), 200);
}

TEST_F(LeaseTest, MoveAssignmentReleasesWhatWasHeld) {
  absl::StatusOr<Lease> first = LookupThree();
  absl::StatusOr<Lease> second = LookupThree();
  ASSERT_TRUE(first.ok() && second.ok());
  *first = *std::move(second);
  const absl::StatusOr<Lease> next = LookupThree();
  EXPECT_EQ(daemon_->Calls("Release"), 1);
  EXPECT_EQ(first->end(), 3u);
}

TEST_F(LeaseTest, AnswersThatMakeNoSenseAreRefused) {
  v1::LookupPrefixResponse more_than_asked;
  more_than_asked.set_lease_id(7);
  more_than_asked.set_matched_tokens(400);
  daemon_->AnswerLookup(more_than_asked);
  EXPECT_TRUE(absl::IsInternal(session_->Lookup(FakeDaemon::Model(), kTokens).status()));

  v1::LookupPrefixResponse run_too_long;
  run_too_long.set_lease_id(7);
  run_too_long.set_matched_tokens(4);
  *run_too_long.add_runs() = FakeDaemon::HostRun(0, {0, 4096});
  daemon_->AnswerLookup(run_too_long);
  EXPECT_TRUE(absl::IsInternal(session_->Lookup(FakeDaemon::Model(), kTokens).status()));

  v1::LookupPrefixResponse outside;
  outside.set_lease_id(7);
  outside.set_matched_tokens(4);
  *outside.add_runs() = FakeDaemon::HostRun(0, {FakeDaemon::kArenaBytes - 1});
  daemon_->AnswerLookup(outside);
  absl::StatusOr<Lease> lease = session_->Lookup(FakeDaemon::Model(), kTokens);
  ASSERT_TRUE(lease.ok());
  EXPECT_TRUE(absl::IsInternal(lease->Block(0).status()));
}

TEST_F(LeaseTest, DownloadEndsWhenTheCallbackSaysSo) {
  absl::StatusOr<Lease> lease = LookupThree();
  ASSERT_TRUE(lease.ok());
  int chunks = 0;
  const absl::Status status =
      lease->Download(0, 0, absl::Seconds(2), [&](const v1::DownloadChunk& chunk) {
        EXPECT_EQ(chunk.data().size(), FakeDaemon::kBlockBytes);
        return ++chunks < 3 ? absl::OkStatus() : absl::CancelledError("enough");
      });
  EXPECT_EQ(status, absl::CancelledError("enough"));
  EXPECT_EQ(chunks, 3);
}

TEST_F(LeaseTest, LeaseOutlivesItsSession) {
  absl::StatusOr<Lease> lease = LookupThree();
  ASSERT_TRUE(lease.ok());
  const std::span<const std::byte> block = *lease->Block(0);
  session_.reset();
  EXPECT_TRUE(absl::IsUnavailable(lease->Block(0).status()));
  EXPECT_EQ(block.size(), FakeDaemon::kBlockBytes);
  EXPECT_EQ(block.front(), std::byte{0}) << "still mapped";
}

}  // namespace
}  // namespace larder
