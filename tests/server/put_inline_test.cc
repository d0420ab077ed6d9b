// Put with its bytes in the message.
#include <gtest/gtest.h>

#include <string>
#include <thread>

#include "test_server.h"

namespace larder {
namespace {

class PutInlineTest : public testing::Test {
 protected:
  // Without a lease: blocks [position, position + blocks) of path `seed`.
  v1::PutRequest Request(uint32_t position, uint32_t blocks, uint32_t seed = 1) {
    v1::PutRequest request;
    request.set_model_id(model_);
    request.set_position(position);
    const std::vector<uint32_t> path = Tokens(position + blocks, seed);
    const auto middle = path.begin() + position * kBlockTokens;
    request.mutable_prefix()->Add(path.begin(), middle);
    request.mutable_tokens()->Add(middle, path.end());
    request.set_data(BlockData(blocks, seed, position));
    return request;
  }
  grpc::Status Put(const v1::PutRequest& request) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    state_.Clear();
    return server_.kv().Put(&context, request, &state_);
  }
  grpc::Status Download(uint32_t blocks, std::string& data, uint32_t seed = 1) {
    v1::DownloadRequest request;
    request.mutable_blocks()->set_model_id(model_);
    const auto tokens = Tokens(blocks, seed);
    request.mutable_blocks()->mutable_tokens()->Add(tokens.begin(), tokens.end());
    grpc::ClientContext context;
    const auto stream = server_.kv().Download(&context, request);
    v1::DownloadChunk chunk;
    data.clear();
    while (stream->Read(&chunk)) data += chunk.data();
    return stream->Finish();
  }
  uint64_t HeldSlots() { return server_.cache().Stats().tiers[1].bytes_pinned; }

  TestServer server_;
  const uint64_t model_ = OpenSmallModel(server_);
  v1::LeaseState state_;
};

TEST_F(PutInlineTest, WithoutALeaseAndBack) {
  ASSERT_GRPC_OK(Put(Request(0, 3)));
  EXPECT_EQ(state_.lease_id(), 0u);
  EXPECT_EQ(state_.end(), 3u);
  ASSERT_GRPC_OK(Put(Request(3, 2)));
  EXPECT_EQ(state_.end(), 5u);
  std::string data;
  ASSERT_GRPC_OK(Download(5, data));
  EXPECT_EQ(data, BlockData(5));
  EXPECT_TRUE(Eventually([&] { return server_.cache().Stats().sessions == 0; }));
  EXPECT_EQ(server_.cache().Stats().leases, 0u);
}

TEST_F(PutInlineTest, AgainDoesNothing) {
  ASSERT_GRPC_OK(Put(Request(0, 3)));
  const uint64_t published = server_.cache().Stats().put_blocks;
  ASSERT_GRPC_OK(Put(Request(0, 3)));
  EXPECT_EQ(state_.end(), 3u);
  EXPECT_EQ(server_.cache().Stats().put_blocks, published);
  ASSERT_GRPC_OK(Put(Request(0, 5)));  // overlaps: only two are new
  EXPECT_EQ(server_.cache().Stats().put_blocks, published + 2);
  std::string data;
  ASSERT_GRPC_OK(Download(5, data));
  EXPECT_EQ(data, BlockData(5));
}

TEST_F(PutInlineTest, PrefixMustBeCached) {
  EXPECT_STATUS(Put(Request(2, 1)), FAILED_PRECONDITION, "prefix: 2 blocks given, 0 of them");
  ASSERT_GRPC_OK(Put(Request(0, 1)));
  EXPECT_STATUS(Put(Request(2, 1)), FAILED_PRECONDITION, "prefix: 2 blocks given, 1 of them");
  EXPECT_EQ(server_.cache().Stats().reserved_blocks, 0u);
}

TEST_F(PutInlineTest, BadCounts) {
  v1::PutRequest request = Request(0, 2);
  request.add_tokens(1);
  EXPECT_STATUS(Put(request), INVALID_ARGUMENT, "tokens: 33 given, whole blocks of 16 needed");
  request = Request(0, 2);
  request.set_data("short");
  EXPECT_STATUS(Put(request), INVALID_ARGUMENT,
                "data: 5 bytes given, 8192 needed: 2 blocks of 4096");
  request = Request(1, 1);
  request.clear_prefix();
  EXPECT_STATUS(Put(request), INVALID_ARGUMENT, "prefix: 0 given, 16 tokens needed");
  request = Request(0, 1);
  request.set_model_id(9);
  EXPECT_STATUS(Put(request), NOT_FOUND, "model_id");
  request = Request(0, 1);
  request.clear_data();
  EXPECT_STATUS(Put(request), INVALID_ARGUMENT, "data: 0 bytes given");
  request.set_position(0xFFFFFFFF);
  request.set_data(BlockData(1));
  EXPECT_STATUS(Put(request), INVALID_ARGUMENT, "prefix: 0 given");
  EXPECT_EQ(server_.cache().Stats().put_blocks, 0u);
}

TEST_F(PutInlineTest, TooLargeForTheTierChangesNothing) {
  EXPECT_STATUS(Put(Request(0, 33)), RESOURCE_EXHAUSTED, "HOST");
  EXPECT_EQ(server_.cache().Stats().reserved_blocks, 0u);
  EXPECT_EQ(HeldSlots(), 0u);
}

TEST_F(PutInlineTest, OnALease) {
  TestWorker worker(server_);
  const uint64_t lease = worker.Lookup(model_, {});
  v1::PutRequest request = Request(0, 2);
  request.set_session_id(worker.session());
  request.set_lease_id(lease);
  ASSERT_GRPC_OK(Put(request));
  EXPECT_EQ(state_.lease_id(), lease);
  EXPECT_EQ(state_.end(), 2u);
  EXPECT_STATUS(Put(request), ABORTED, "position");  // a retry publishes nothing twice
  EXPECT_EQ(server_.cache().GetLease(worker.session(), lease)->reserved_blocks, 0u);
  std::string data;
  ASSERT_GRPC_OK(Download(2, data));
  EXPECT_EQ(data, BlockData(2));
}

TEST_F(PutInlineTest, KeepsBlocksThatTheWorkerReservedItself) {
  TestWorker worker(server_);
  const uint64_t lease = worker.Lookup(model_, {});
  worker.Reserve(lease, 0, 1, v1::TIER_HOST);
  v1::PutRequest request = Request(0, 33);
  request.set_session_id(worker.session());
  request.set_lease_id(lease);
  EXPECT_STATUS(Put(request), RESOURCE_EXHAUSTED, "HOST");
  EXPECT_EQ(server_.cache().GetLease(worker.session(), lease)->reserved_blocks, 1u);
  // The daemon writes slots of its own, never those that a call of the client's can free.
  request = Request(0, 2);
  request.set_session_id(worker.session());
  request.set_lease_id(lease);
  ASSERT_GRPC_OK(Put(request));
  EXPECT_EQ(state_.end(), 2u);
  EXPECT_EQ(state_.reserved_blocks(), 1u);
}

TEST_F(PutInlineTest, BringsItsPrefixUpFromNvme) {
  ASSERT_GRPC_OK(Put(Request(0, 3)));
  server_.mover().AwaitIdle();
  server_.cache().Evict(Tier::kGpu, 0, ~uint64_t{0});
  server_.cache().Evict(Tier::kHost, 0, ~uint64_t{0});
  ASSERT_EQ(server_.cache().Stats().tiers[1].blocks, 0u);
  ASSERT_EQ(server_.cache().Stats().tiers[2].blocks, 3u);
  ASSERT_GRPC_OK(Put(Request(3, 1)));
  std::string data;
  ASSERT_GRPC_OK(Download(4, data));
  EXPECT_EQ(data, BlockData(4));
}

TEST_F(PutInlineTest, CancelledWhileItWaits) {
  ASSERT_GRPC_OK(Put(Request(0, 3)));
  server_.mover().AwaitIdle();
  server_.cache().Evict(Tier::kHost, 0, ~uint64_t{0});
  server_.mover().Pause(true);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(50));
  EXPECT_EQ(server_.kv().Put(&context, Request(3, 1), &state_).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(Eventually([&] { return server_.cache().Stats().sessions == 0; }));
  server_.mover().Pause(false);
  ASSERT_GRPC_OK(Put(Request(3, 1)));
}

TEST_F(PutInlineTest, BytesOfPutsUnderWayAreBounded) {
  ASSERT_GRPC_OK(Put(Request(0, 3)));
  server_.mover().AwaitIdle();
  server_.cache().Evict(Tier::kHost, 0, ~uint64_t{0});
  server_.mover().Pause(true);
  std::thread waits([&] {
    grpc::ClientContext context;
    v1::LeaseState state;
    EXPECT_TRUE(server_.kv().Put(&context, Request(3, 20), &state).ok());
  });
  EXPECT_TRUE(Eventually([&] { return server_.cache().Stats().sessions == 1; }));
  EXPECT_STATUS(Put(Request(0, 50, 2)), RESOURCE_EXHAUSTED,
                "of Puts under way, allowed are 278528 in all");
  server_.mover().Pause(false);
  waits.join();
  // All of it may be taken again, and then HOST is what refuses.
  EXPECT_TRUE(Eventually([&] {
    return Put(Request(0, 50, 2)).error_message().find("HOST") != std::string::npos;
  }));
}

}  // namespace
}  // namespace larder
