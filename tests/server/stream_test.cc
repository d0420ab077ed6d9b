// Attach, Prefetch and Download: deadlines, cancellation, and what they leave behind.
#include <gtest/gtest.h>

#include <thread>

#include "test_server.h"

namespace larder {
namespace {

class StreamTest : public testing::Test {
 protected:
  // Publishes path `seed` and leaves it on NVME only.
  void Sink(uint32_t blocks, uint32_t seed = 1) {
    TestWorker worker(server_);
    worker.Release(worker.Publish(model_, blocks, seed));
    server_.mover().AwaitIdle();
    server_.cache().Evict(Tier::kHost, 0, ~uint64_t{0});
    ASSERT_EQ(server_.cache().Stats().tiers[1].blocks, 0u);
  }
  v1::BlockSelector Prefix(uint32_t blocks, uint32_t seed = 1) {
    v1::BlockSelector selector;
    selector.set_model_id(model_);
    const auto tokens = Tokens(blocks, seed);
    selector.mutable_tokens()->Add(tokens.begin(), tokens.end());
    return selector;
  }
  v1::BlockSelector Lease(const TestWorker& worker, uint64_t lease) {
    v1::BlockSelector selector;
    selector.set_session_id(worker.session());
    selector.set_lease_id(lease);
    return selector;
  }
  grpc::Status Prefetch(const v1::PrefetchRequest& request, std::vector<v1::PrefetchEvent>& events,
                        absl::Duration deadline = absl::Seconds(20)) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + deadline));
    const auto stream = server_.kv().Prefetch(&context, request);
    v1::PrefetchEvent event;
    events.clear();
    while (stream->Read(&event)) events.push_back(event);
    return stream->Finish();
  }
  grpc::Status Download(const v1::DownloadRequest& request, std::string& data) {
    grpc::ClientContext context;
    const auto stream = server_.kv().Download(&context, request);
    v1::DownloadChunk chunk;
    data.clear();
    while (stream->Read(&chunk)) {
      EXPECT_EQ(chunk.block_bytes(), kBlockBytes);
      EXPECT_EQ((uint64_t{chunk.position()} - request.position()) * kBlockBytes + chunk.offset(),
                data.size());
      data += chunk.data();
    }
    return stream->Finish();
  }
  // Nothing is left but the tree.
  bool Quiet() {
    return Eventually([&] {
      const CacheStats stats = server_.cache().Stats();
      return stats.sessions == 0 && stats.sessions_lost == 0 && stats.leases == 0 &&
             stats.tiers[0].bytes_pinned == 0 && stats.tiers[1].bytes_pinned == 0;
    });
  }

  TestServer server_;
  const uint64_t model_ = OpenSmallModel(server_);
};

TEST_F(StreamTest, AttachTellsWhereTheArenasAre) {
  TestWorker worker(server_, "w0");
  EXPECT_EQ(worker.attached().attached().boot_id(), 77u);
  EXPECT_EQ(worker.attached().attached().handover_socket(), "/test.handover");
  EXPECT_NE(worker.session(), 0u);
  EXPECT_TRUE(server_.sessions().IsLive(worker.session()));
  EXPECT_EQ(worker.Detach().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(Quiet());
}

TEST_F(StreamTest, AttachRefusesLongNames) {
  grpc::ClientContext context;
  v1::AttachRequest request;
  request.set_worker(std::string(129, 'x'));
  const auto stream = server_.kv().Attach(&context, request);
  v1::AttachEvent event;
  EXPECT_FALSE(stream->Read(&event));
  EXPECT_STATUS(stream->Finish(), INVALID_ARGUMENT, "worker: 129 bytes given, at most 128");
}

TEST_F(StreamTest, LostStreamWithoutAProcessFreesItsLeases) {
  TestWorker worker(server_);
  worker.Publish(model_, 2);
  EXPECT_EQ(server_.cache().Stats().leases, 1u);
  worker.Detach();
  EXPECT_TRUE(Quiet());
}

TEST_F(StreamTest, LostStreamOfALiveProcessKeepsItsPinsUntilItIsGone) {
  TestWorker worker(server_);
  server_.Map(worker.session(), 1234);
  const uint64_t lease = worker.Publish(model_, 2);
  worker.Detach();
  ASSERT_TRUE(Eventually([&] { return server_.cache().Stats().sessions_lost == 1; }));
  EXPECT_EQ(server_.cache().Stats().leases, 1u);
  EXPECT_FALSE(server_.sessions().IsLive(worker.session())) << "no addresses for the lost";
  grpc::ClientContext context;
  v1::ForkRequest fork;
  v1::LeaseState state;
  fork.set_session_id(worker.session());
  fork.set_lease_id(lease);
  EXPECT_STATUS(server_.kv().Fork(&context, fork, &state), FAILED_PRECONDITION, "");
  server_.Unmap(worker.session());
  EXPECT_TRUE(Quiet());
}

TEST_F(StreamTest, ProcessGoneEndsAnOpenStream) {
  TestWorker worker(server_);
  server_.Map(worker.session(), 1234);
  worker.Publish(model_, 2);
  server_.Unmap(worker.session());
  EXPECT_EQ(worker.Next(), std::nullopt);
  EXPECT_TRUE(Quiet());
}

TEST_F(StreamTest, PrefetchReportsRunsInOrder) {
  Sink(6);
  TestWorker worker(server_);
  const uint64_t lease = worker.Lookup(model_, Tokens(6));
  v1::PrefetchRequest request;
  *request.mutable_blocks() = Lease(worker, lease);
  request.set_tier(v1::TIER_HOST);
  std::vector<v1::PrefetchEvent> events;
  ASSERT_GRPC_OK(Prefetch(request, events));
  ASSERT_FALSE(events.empty());
  EXPECT_TRUE(events.back().done());
  EXPECT_EQ(events.back().ready_blocks(), 6u);
  EXPECT_EQ(events.back().promised_blocks(), 6u);
  uint32_t next = 0;
  for (const auto& event : events) {
    for (const v1::Run& run : event.runs()) {
      EXPECT_EQ(run.position(), next);
      for (int i = 0; i < run.offsets_size(); ++i, ++next) {
        EXPECT_EQ(std::string(reinterpret_cast<char*>(server_.At(run, i)), kBlockBytes),
                  BlockData(1, 1, next));
      }
    }
  }
  EXPECT_EQ(next, 6u);
}

TEST_F(StreamTest, PrefetchOfAPrefixHoldsItsLeaseAndLetsGo) {
  Sink(4);
  v1::PrefetchRequest request;
  *request.mutable_blocks() = Prefix(4);
  std::vector<v1::PrefetchEvent> events;
  ASSERT_GRPC_OK(Prefetch(request, events));
  EXPECT_EQ(events.back().ready_blocks(), 4u);
  EXPECT_TRUE(Quiet());
  EXPECT_EQ(server_.cache().Stats().tiers[0].blocks, 4u) << "the highest tier there is";
}

TEST_F(StreamTest, PrefetchOfNothingIsDoneAtOnce) {
  v1::PrefetchRequest request;
  *request.mutable_blocks() = Prefix(4);
  std::vector<v1::PrefetchEvent> events;
  ASSERT_GRPC_OK(Prefetch(request, events));
  ASSERT_EQ(events.size(), 1u);
  EXPECT_TRUE(events[0].done());
  EXPECT_EQ(events[0].promised_blocks(), 0u);
}

TEST_F(StreamTest, PrefetchPromisesWhatFits) {
  Sink(20);
  v1::PrefetchRequest request;
  *request.mutable_blocks() = Prefix(20);
  request.set_tier(v1::TIER_GPU);
  std::vector<v1::PrefetchEvent> events;
  ASSERT_GRPC_OK(Prefetch(request, events));
  EXPECT_TRUE(events.back().done());
  EXPECT_EQ(events.back().promised_blocks(), 8u) << "GPU has 8 blocks";
}

TEST_F(StreamTest, BestEffortEndsAtOnce) {
  Sink(4);
  server_.mover().Pause(true);
  v1::PrefetchRequest request;
  *request.mutable_blocks() = Prefix(4);
  request.set_policy(v1::PREFETCH_POLICY_BEST_EFFORT);
  std::vector<v1::PrefetchEvent> events;
  ASSERT_GRPC_OK(Prefetch(request, events));
  ASSERT_EQ(events.size(), 1u);
  EXPECT_TRUE(events[0].done());
  EXPECT_EQ(events[0].ready_blocks(), 0u);
  EXPECT_EQ(events[0].promised_blocks(), 4u);
}

TEST_F(StreamTest, TimeoutPolicyEndsWithOk) {
  Sink(4);
  server_.mover().Pause(true);
  v1::PrefetchRequest request;
  *request.mutable_blocks() = Prefix(4);
  request.set_policy(v1::PREFETCH_POLICY_TIMEOUT);
  request.set_timeout_ms(50);
  std::vector<v1::PrefetchEvent> events;
  ASSERT_GRPC_OK(Prefetch(request, events));
  ASSERT_GE(events.size(), 1u);
  EXPECT_TRUE(events.back().done());
  EXPECT_EQ(events.back().ready_blocks(), 0u);
}

TEST_F(StreamTest, WaitCompleteHonoursTheDeadline) {
  Sink(4);
  server_.mover().Pause(true);
  v1::PrefetchRequest request;
  *request.mutable_blocks() = Prefix(4);
  std::vector<v1::PrefetchEvent> events;
  EXPECT_EQ(Prefetch(request, events, absl::Milliseconds(50)).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(Eventually([&] { return server_.cache().Stats().leases == 0; }));
  server_.mover().Pause(false);
  ASSERT_GRPC_OK(Prefetch(request, events));
  EXPECT_EQ(events.back().ready_blocks(), 4u) << "the moves had gone on";
}

TEST_F(StreamTest, UnreadableBlockEndsThePrefetch) {
  Sink(4);
  TestWorker worker(server_);
  const uint64_t lease = worker.Lookup(model_, Tokens(4));
  server_.mover().FailFrom(Tier::kNvme, absl::DataLossError("checksum"));
  v1::PrefetchRequest request;
  *request.mutable_blocks() = Lease(worker, lease);
  request.set_tier(v1::TIER_HOST);
  std::vector<v1::PrefetchEvent> events;
  ASSERT_GRPC_OK(Prefetch(request, events));
  EXPECT_TRUE(events.back().done());
  EXPECT_TRUE(events.back().unreadable());
  EXPECT_EQ(events.back().unreadable_position(), 0u);
  EXPECT_EQ(server_.cache().GetLease(worker.session(), lease)->end, 4u) << "the lease is unchanged";
}

TEST_F(StreamTest, PrefetchErrors) {
  TestWorker worker(server_);
  std::vector<v1::PrefetchEvent> events;
  v1::PrefetchRequest request;
  EXPECT_STATUS(Prefetch(request, events), INVALID_ARGUMENT, "blocks: missing");
  *request.mutable_blocks() = Lease(worker, 42);
  EXPECT_STATUS(Prefetch(request, events), NOT_FOUND, "lease_id");
  *request.mutable_blocks() = Prefix(1);
  request.mutable_blocks()->set_model_id(43);
  EXPECT_STATUS(Prefetch(request, events), NOT_FOUND, "model_id");
  request.set_tier(v1::TIER_NVME);
  EXPECT_STATUS(Prefetch(request, events), INVALID_ARGUMENT, "tier: 3 given");
  EXPECT_EQ(server_.cache().Stats().leases, 0u);
}

TEST_F(StreamTest, DownloadOfAPrefixFromNvme) {
  Sink(6);
  v1::DownloadRequest request;
  *request.mutable_blocks() = Prefix(7);
  std::string data;
  ASSERT_GRPC_OK(Download(request, data));
  EXPECT_EQ(data, BlockData(6));
  request.set_position(2);
  request.set_count(3);
  ASSERT_GRPC_OK(Download(request, data));
  EXPECT_EQ(data, BlockData(3, 1, 2));
  request.set_position(9);
  ASSERT_GRPC_OK(Download(request, data));
  EXPECT_EQ(data, "");
  EXPECT_TRUE(Quiet());
}

TEST_F(StreamTest, DownloadOfALease) {
  TestWorker worker(server_);
  const uint64_t lease = worker.Publish(model_, 3);
  v1::DownloadRequest request;
  *request.mutable_blocks() = Lease(worker, lease);
  std::string data;
  ASSERT_GRPC_OK(Download(request, data));
  EXPECT_EQ(data, BlockData(3));
  EXPECT_EQ(server_.cache().GetLease(worker.session(), lease)->end, 3u);
  EXPECT_TRUE(Eventually([&] { return server_.cache().Stats().leases == 1; }));
  request.set_position(4);
  EXPECT_STATUS(Download(request, data), INVALID_ARGUMENT, "position: 4 given, at most 3");
  request.mutable_blocks()->set_lease_id(77);
  EXPECT_STATUS(Download(request, data), NOT_FOUND, "lease_id");
}

TEST_F(StreamTest, DownloadSaysWhenTheTierIsTooSmall) {
  Sink(20);
  Sink(20, 2);
  TestWorker hog(server_);
  hog.Reserve(hog.Lookup(model_, {}), 0, 20, v1::TIER_HOST);
  v1::DownloadRequest request;
  *request.mutable_blocks() = Prefix(20);
  std::string data;
  EXPECT_STATUS(Download(request, data), RESOURCE_EXHAUSTED, "HOST: room for 12 of 20 blocks");
  EXPECT_EQ(data, BlockData(12)) << "what there is comes first, and right";
}

TEST_F(StreamTest, DownloadOfAnUnreadableBlock) {
  Sink(3);
  server_.mover().FailFrom(Tier::kNvme, absl::DataLossError("checksum"));
  v1::DownloadRequest request;
  *request.mutable_blocks() = Prefix(3);
  std::string data;
  EXPECT_STATUS(Download(request, data), DATA_LOSS, "block 0 could not be read");
  EXPECT_TRUE(Quiet());
}

TEST_F(StreamTest, DownloadKeepsItsBlocksWhenTheSessionEnds) {
  Sink(4);
  auto worker = std::make_unique<TestWorker>(server_);
  const uint64_t lease = worker->Lookup(model_, Tokens(4));
  server_.mover().Pause(true);
  v1::DownloadRequest request;
  *request.mutable_blocks() = Lease(*worker, lease);
  std::string data;
  grpc::Status status;
  std::thread download([&] { status = Download(request, data); });
  ASSERT_TRUE(Eventually([&] { return server_.cache().Stats().leases == 2; }));
  worker.reset();
  ASSERT_TRUE(Eventually([&] { return server_.cache().Stats().leases == 1; })) << "the worker's";
  EXPECT_EQ(server_.cache().Stats().tiers[2].bytes_pinned, 4 * kBlockBytes)
      << "held while the daemon reads";
  server_.mover().Pause(false);
  download.join();
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(data, BlockData(4));
  EXPECT_TRUE(Quiet());
}

TEST_F(StreamTest, NoClientCanLetGoOfWhatADownloadReads) {
  Sink(4);
  TestWorker worker(server_);
  const uint64_t lease = worker.Lookup(model_, Tokens(4));
  server_.mover().Pause(true);
  v1::DownloadRequest request;
  *request.mutable_blocks() = Lease(worker, lease);
  std::string data;
  grpc::Status status;
  std::thread download([&] { status = Download(request, data); });
  EXPECT_TRUE(Eventually([&] { return server_.cache().Stats().leases == 2; }));
  for (const SessionInfo& session : server_.cache().Sessions(/*leases=*/true)) {
    for (const LeaseInfo& held : session.leases) {
      if (held.lease == lease) continue;
      for (const uint64_t guess : {session.session, worker.session()}) {
        EXPECT_FALSE(server_.cache().Release(guess, held.lease, false).ok());
      }
    }
  }
  worker.Release(lease);
  EXPECT_EQ(server_.cache().Stats().leases, 1u);
  server_.mover().Pause(false);
  download.join();
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(data, BlockData(4));
}

TEST_F(StreamTest, GarbageInsteadOfADownloadRequest) {
  const grpc::internal::RpcMethod method("/larder.v1.KvCache/Download",
                                         grpc::internal::RpcMethod::SERVER_STREAMING);
  grpc::ClientContext context;
  const std::string garbage = "\xff\xff\xff\xff";
  const grpc::Slice slice(garbage);
  const grpc::ByteBuffer request(&slice, 1);
  const std::unique_ptr<grpc::ClientReader<grpc::ByteBuffer>> stream(
      grpc::internal::ClientReaderFactory<grpc::ByteBuffer>::Create(server_.channel().get(), method,
                                                                    &context, request));
  grpc::ByteBuffer chunk;
  EXPECT_FALSE(stream->Read(&chunk));
  EXPECT_STATUS(stream->Finish(), INVALID_ARGUMENT, "not a larder.v1.DownloadRequest");
}

}  // namespace
}  // namespace larder
