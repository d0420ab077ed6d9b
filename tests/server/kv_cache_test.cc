// The unary calls: what they do, and every way to get them wrong.
#include <gtest/gtest.h>

#include "test_server.h"

namespace larder {
namespace {

class KvCacheTest : public testing::Test {
 protected:
  template <typename Request, typename Response>
  grpc::Status Call(grpc::Status (v1::KvCache::Stub::*method)(grpc::ClientContext*, const Request&,
                                                              Response*),
                    const Request& request, Response& response) {
    grpc::ClientContext context;
    return (server_.kv().*method)(&context, request, &response);
  }
  grpc::Status Open(const v1::ModelSpec& spec) {
    v1::OpenModelRequest request;
    v1::Model model;
    *request.mutable_spec() = spec;
    return Call(&v1::KvCache::Stub::OpenModel, request, model);
  }
  v1::PutRequest PutOf(uint64_t session, uint64_t lease, uint32_t position, uint32_t blocks) {
    v1::PutRequest request;
    request.set_session_id(session);
    request.set_lease_id(lease);
    request.set_position(position);
    const std::vector<uint32_t> tokens = Tokens(blocks);
    request.mutable_tokens()->Add(tokens.begin(), tokens.end());
    return request;
  }
  v1::ReserveRequest ReserveOf(uint64_t session, uint64_t lease, uint32_t position,
                               uint32_t count) {
    v1::ReserveRequest request;
    request.set_session_id(session);
    request.set_lease_id(lease);
    request.set_position(position);
    request.set_count(count);
    return request;
  }

  TestServer server_;
  const uint64_t model_ = OpenSmallModel(server_);
  TestWorker worker_{server_};
  v1::LeaseState state_;
  v1::ReserveResponse reserved_;
};

TEST_F(KvCacheTest, OpenModelIsIdempotentAndApart) {
  EXPECT_EQ(OpenSmallModel(server_), model_);
  EXPECT_NE(OpenSmallModel(server_, "other"), model_);
  v1::ModelSpec wider = SmallSpec();
  wider.set_head_dim(64);
  EXPECT_TRUE(Open(wider).ok());
  EXPECT_EQ(server_.cache().Stats().models, 3u);
}

TEST_F(KvCacheTest, OpenModelRefusesBadSpecs) {
  v1::ModelSpec spec = SmallSpec();
  spec.set_layers(1025);
  EXPECT_STATUS(Open(spec), INVALID_ARGUMENT, "spec.layers: 1025 given");
  spec = SmallSpec("");
  EXPECT_STATUS(Open(spec), INVALID_ARGUMENT, "spec.name");
  spec = SmallSpec();
  spec.set_dtype(v1::DTYPE_UNSPECIFIED);
  EXPECT_STATUS(Open(spec), INVALID_ARGUMENT, "spec.dtype: 0 given");
  spec = SmallSpec();
  spec.set_block_tokens(0);
  EXPECT_STATUS(Open(spec), INVALID_ARGUMENT, "spec.block_tokens: 0 given");
  spec.set_block_tokens(1024);
  EXPECT_STATUS(Open(spec), RESOURCE_EXHAUSTED, "");
  v1::Model model;
  EXPECT_STATUS(Call(&v1::KvCache::Stub::OpenModel, v1::OpenModelRequest(), model),
                INVALID_ARGUMENT, "spec: missing");
  EXPECT_EQ(server_.cache().Stats().models, 1u);
}

TEST_F(KvCacheTest, LifeOfARequest) {
  const uint64_t first = worker_.Publish(model_, 3);
  worker_.Release(first);
  uint32_t matched = 0;
  std::vector<uint32_t> longer = Tokens(5);
  longer.push_back(1);  // a tail shorter than a block
  const uint64_t lease = worker_.Lookup(model_, longer, &matched);
  EXPECT_EQ(matched, 3 * kBlockTokens);
  worker_.Reserve(lease, 3, 2, v1::TIER_HOST);
  const v1::LeaseState state =
      worker_.Put(lease, 3, std::vector<uint32_t>(longer.begin() + 48, longer.begin() + 80));
  EXPECT_EQ(state.end(), 5u);
  EXPECT_EQ(state.reserved_blocks(), 0u);
  worker_.Release(lease);
  EXPECT_EQ(server_.cache().Stats().leases, 0u);
  EXPECT_EQ(server_.cache().Stats().reserved_blocks, 0u);
}

TEST_F(KvCacheTest, PeekNeedsNoSessionAndGrantsNothing) {
  worker_.Release(worker_.Publish(model_, 2));
  v1::LookupPrefixRequest request;
  v1::LookupPrefixResponse response;
  request.set_model_id(model_);
  request.set_peek(true);
  const auto tokens = Tokens(4);
  request.mutable_tokens()->Add(tokens.begin(), tokens.end());
  ASSERT_GRPC_OK(Call(&v1::KvCache::Stub::LookupPrefix, request, response));
  EXPECT_EQ(response.lease_id(), 0u);
  EXPECT_EQ(response.matched_tokens(), 2 * kBlockTokens);
  EXPECT_EQ(server_.cache().Stats().leases, 0u);
}

TEST_F(KvCacheTest, LookupErrors) {
  v1::LookupPrefixRequest request;
  v1::LookupPrefixResponse response;
  request.set_session_id(worker_.session());
  request.set_model_id(4711);
  EXPECT_STATUS(Call(&v1::KvCache::Stub::LookupPrefix, request, response), NOT_FOUND, "model_id");
  request.set_model_id(model_);
  request.set_session_id(5);
  EXPECT_STATUS(Call(&v1::KvCache::Stub::LookupPrefix, request, response), NOT_FOUND, "session_id");
  request.set_session_id(worker_.session());
  request.set_lease_id(99);
  EXPECT_STATUS(Call(&v1::KvCache::Stub::LookupPrefix, request, response), NOT_FOUND, "lease_id");
  request.clear_lease_id();
  request.mutable_tokens()->Resize((1 << 20) + 1, 7);
  EXPECT_STATUS(Call(&v1::KvCache::Stub::LookupPrefix, request, response), INVALID_ARGUMENT,
                "tokens: 1048577 given, at most 1048576");
  EXPECT_EQ(server_.cache().Stats().leases, 0u);
}

TEST_F(KvCacheTest, LeaseOfAnotherSession) {
  const uint64_t lease = worker_.Publish(model_, 2);
  TestWorker thief(server_, "thief");
  EXPECT_STATUS(
      Call(&v1::KvCache::Stub::Reserve, ReserveOf(thief.session(), lease, 2, 1), reserved_),
      PERMISSION_DENIED, "");
  EXPECT_STATUS(Call(&v1::KvCache::Stub::Put, PutOf(thief.session(), lease, 2, 1), state_),
                PERMISSION_DENIED, "");
  v1::TruncateRequest truncate;
  truncate.set_session_id(thief.session());
  truncate.set_lease_id(lease);
  EXPECT_STATUS(Call(&v1::KvCache::Stub::Truncate, truncate, state_), PERMISSION_DENIED, "");
  v1::ForkRequest fork;
  fork.set_session_id(thief.session());
  fork.set_lease_id(lease);
  EXPECT_STATUS(Call(&v1::KvCache::Stub::Fork, fork, state_), PERMISSION_DENIED, "");
  v1::ReleaseRequest release;
  v1::ReleaseResponse released;
  release.set_session_id(thief.session());
  release.set_lease_id(lease);
  EXPECT_STATUS(Call(&v1::KvCache::Stub::Release, release, released), PERMISSION_DENIED, "");
  EXPECT_EQ(server_.cache().GetLease(worker_.session(), lease)->end, 2u);
}

TEST_F(KvCacheTest, ReserveErrorsChangeNothing) {
  const uint64_t lease = worker_.Publish(model_, 2);
  const uint64_t me = worker_.session();
  const auto reserve = [&](uint32_t position, uint32_t count, v1::Tier tier) {
    v1::ReserveRequest request = ReserveOf(me, lease, position, count);
    request.set_tier(tier);
    return Call(&v1::KvCache::Stub::Reserve, request, reserved_);
  };
  EXPECT_STATUS(reserve(1, 1, v1::TIER_HOST), ABORTED, "position");
  EXPECT_STATUS(reserve(3, 1, v1::TIER_HOST), ABORTED, "position");
  EXPECT_STATUS(reserve(2, 0, v1::TIER_HOST), INVALID_ARGUMENT, "count: 0 given");
  EXPECT_STATUS(reserve(2, 65'537, v1::TIER_HOST), INVALID_ARGUMENT, "count: 65537 given");
  EXPECT_STATUS(reserve(2, 1, v1::TIER_NVME), INVALID_ARGUMENT, "tier: 3 given");
  EXPECT_STATUS(reserve(2, 65'536, v1::TIER_HOST), RESOURCE_EXHAUSTED, "HOST");
  EXPECT_EQ(server_.cache().Stats().reserved_blocks, 0u);
  EXPECT_EQ(server_.cache().Stats().exhausted, 1u);
  EXPECT_TRUE(reserve(2, 1, v1::TIER_HOST).ok()) << "still works";
}

TEST_F(KvCacheTest, ReserveAgainGivesTheSameBlocks) {
  const uint64_t lease = worker_.Lookup(model_, {});
  const v1::ReserveResponse first = worker_.Reserve(lease, 0, 3);
  const v1::ReserveResponse second = worker_.Reserve(lease, 0, 3);
  EXPECT_EQ(first.SerializeAsString(), second.SerializeAsString());
  EXPECT_EQ(server_.cache().Stats().reserved_blocks, 3u);
}

TEST_F(KvCacheTest, PutErrorsChangeNothing) {
  const uint64_t lease = worker_.Publish(model_, 2);
  const uint64_t me = worker_.session();
  EXPECT_STATUS(Call(&v1::KvCache::Stub::Put, PutOf(me, lease, 2, 1), state_), FAILED_PRECONDITION,
                "");
  worker_.Reserve(lease, 2, 1, v1::TIER_HOST);
  EXPECT_STATUS(Call(&v1::KvCache::Stub::Put, PutOf(me, lease, 1, 1), state_), ABORTED, "position");
  EXPECT_STATUS(Call(&v1::KvCache::Stub::Put, PutOf(me, lease, 2, 2), state_), FAILED_PRECONDITION,
                "");
  v1::PutRequest odd = PutOf(me, lease, 2, 1);
  odd.add_tokens(1);
  EXPECT_STATUS(Call(&v1::KvCache::Stub::Put, odd, state_), INVALID_ARGUMENT, "tokens: 17 given");
  EXPECT_STATUS(Call(&v1::KvCache::Stub::Put, PutOf(me, lease, 2, 0), state_), INVALID_ARGUMENT,
                "tokens: 0 given");
  EXPECT_EQ(server_.cache().GetLease(me, lease)->end, 2u);
  EXPECT_EQ(server_.cache().GetLease(me, lease)->reserved_blocks, 1u);
  EXPECT_TRUE(Call(&v1::KvCache::Stub::Put, PutOf(me, lease, 2, 1), state_).ok());
  EXPECT_STATUS(Call(&v1::KvCache::Stub::Put, PutOf(me, lease, 2, 1), state_), ABORTED, "");
}

TEST_F(KvCacheTest, TruncateForkRelease) {
  const uint64_t me = worker_.session();
  const uint64_t lease = worker_.Publish(model_, 4);
  v1::ForkRequest fork;
  fork.set_session_id(me);
  fork.set_lease_id(lease);
  ASSERT_GRPC_OK(Call(&v1::KvCache::Stub::Fork, fork, state_));
  EXPECT_EQ(state_.end(), 4u);
  EXPECT_NE(state_.lease_id(), lease);
  v1::TruncateRequest truncate;
  truncate.set_session_id(me);
  truncate.set_lease_id(lease);
  truncate.set_position(5);
  EXPECT_STATUS(Call(&v1::KvCache::Stub::Truncate, truncate, state_), INVALID_ARGUMENT, "5");
  truncate.set_position(1);
  ASSERT_GRPC_OK(Call(&v1::KvCache::Stub::Truncate, truncate, state_));
  EXPECT_EQ(state_.end(), 1u);
  v1::ReleaseRequest release;
  v1::ReleaseResponse released;
  release.set_session_id(me);
  release.set_lease_id(lease);
  ASSERT_GRPC_OK(Call(&v1::KvCache::Stub::Release, release, released));
  EXPECT_STATUS(Call(&v1::KvCache::Stub::Release, release, released), NOT_FOUND, "lease");
}

TEST_F(KvCacheTest, FlushWaitsUntilDurable) {
  const uint64_t lease = worker_.Publish(model_, 3);
  v1::FlushRequest request;
  request.set_session_id(worker_.session());
  request.set_lease_id(lease);
  ASSERT_GRPC_OK(Call(&v1::KvCache::Stub::Flush, request, state_));
  EXPECT_EQ(state_.durable_blocks(), 3u);
  request.set_lease_id(3);
  EXPECT_STATUS(Call(&v1::KvCache::Stub::Flush, request, state_), NOT_FOUND, "lease_id");
}

TEST_F(KvCacheTest, FlushHonoursItsDeadline) {
  server_.mover().Pause(true);
  const uint64_t lease = worker_.Publish(model_, 3);
  v1::FlushRequest request;
  request.set_session_id(worker_.session());
  request.set_lease_id(lease);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(50));
  EXPECT_EQ(server_.kv().Flush(&context, request, &state_).error_code(),
            grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(Eventually([&] {
    return server_.calls().Read(Method::kFlush).by_code[int(absl::StatusCode::kCancelled)] == 1;
  }));
  server_.mover().Pause(false);
  ASSERT_GRPC_OK(Call(&v1::KvCache::Stub::Flush, request, state_));
}

TEST_F(KvCacheTest, FlushEndsWhenItsLeaseIsReleased) {
  server_.mover().Pause(true);
  const uint64_t lease = worker_.Publish(model_, 3);
  std::thread flush([&] {
    v1::FlushRequest request;
    request.set_session_id(worker_.session());
    request.set_lease_id(lease);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    const grpc::Status status = server_.kv().Flush(&context, request, &state_);
    EXPECT_FALSE(status.ok());
    EXPECT_NE(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  });
  EXPECT_TRUE(Eventually([&] { return server_.mover().raises() > 0; })) << "it waits";
  worker_.Release(lease);
  flush.join();
}

TEST(FlushWithoutNvme, IsRefused) {
  TestServer server(/*nvme=*/false);
  const uint64_t model = OpenSmallModel(server);
  TestWorker worker(server);
  v1::FlushRequest request;
  v1::LeaseState state;
  request.set_session_id(worker.session());
  request.set_lease_id(worker.Publish(model, 1));
  grpc::ClientContext context;
  EXPECT_STATUS(server.kv().Flush(&context, request, &state), FAILED_PRECONDITION, "NVME");
}

}  // namespace
}  // namespace larder
