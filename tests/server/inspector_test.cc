#include <gtest/gtest.h>

#include "test_server.h"

namespace larder {
namespace {

class InspectorTest : public testing::Test {
 protected:
  template <typename Request, typename Response>
  grpc::Status Call(grpc::Status (v1::Inspector::Stub::*method)(grpc::ClientContext*,
                                                                const Request&, Response*),
                    const Request& request, Response& response) {
    grpc::ClientContext context;
    return (server_.inspector().*method)(&context, request, &response);
  }

  TestServer server_;
  const uint64_t model_ = OpenSmallModel(server_);
};

TEST_F(InspectorTest, StatusHasEveryTier) {
  v1::Status status;
  ASSERT_GRPC_OK(Call(&v1::Inspector::Stub::GetStatus, {}, status));
  EXPECT_EQ(status.version(), "test");
  EXPECT_EQ(status.boot_id(), 77u);
  ASSERT_EQ(status.tiers_size(), 3);
  EXPECT_EQ(status.tiers(0).tier(), v1::TIER_GPU);
  EXPECT_EQ(status.tiers(0).bytes_total(), 8u * kBlockBytes);
  EXPECT_EQ(status.tiers(2).bytes_total(), 64u * kBlockBytes);
  EXPECT_EQ(status.models(), 1u);
  EXPECT_FALSE(status.draining());
}

TEST_F(InspectorTest, ModelsAndSessions) {
  TestWorker worker(server_, "w7");
  server_.Map(worker.session(), 4242);
  const uint64_t lease = worker.Publish(model_, 2);
  v1::ListModelsResponse models;
  ASSERT_GRPC_OK(Call(&v1::Inspector::Stub::ListModels, {}, models));
  ASSERT_EQ(models.models_size(), 1);
  EXPECT_EQ(models.models(0).model().model_id(), model_);
  EXPECT_EQ(models.models(0).tree_blocks(), 2u);

  v1::ListSessionsRequest request;
  v1::ListSessionsResponse sessions;
  ASSERT_GRPC_OK(Call(&v1::Inspector::Stub::ListSessions, request, sessions));
  ASSERT_EQ(sessions.sessions_size(), 1);
  EXPECT_EQ(sessions.sessions(0).worker(), "w7");
  EXPECT_EQ(sessions.sessions(0).pid(), 4242);
  EXPECT_EQ(sessions.sessions(0).lease_count(), 1u);
  EXPECT_EQ(sessions.sessions(0).leases_size(), 0);
  request.set_leases(true);
  ASSERT_GRPC_OK(Call(&v1::Inspector::Stub::ListSessions, request, sessions));
  ASSERT_EQ(sessions.sessions(0).leases_size(), 1);
  EXPECT_EQ(sessions.sessions(0).leases(0).lease_id(), lease);
  EXPECT_EQ(sessions.sessions(0).leases(0).end(), 2u);
  server_.Unmap(worker.session());
}

TEST_F(InspectorTest, Explain) {
  TestWorker worker(server_);
  worker.Publish(model_, 2);
  v1::ExplainRequest request;
  v1::ExplainResponse response;
  request.set_model_id(model_);
  std::vector<uint32_t> tokens = Tokens(3);
  tokens.push_back(1);
  request.mutable_tokens()->Add(tokens.begin(), tokens.end());
  ASSERT_GRPC_OK(Call(&v1::Inspector::Stub::Explain, request, response));
  EXPECT_EQ(response.asked_blocks(), 3u);
  EXPECT_EQ(response.matched_blocks(), 2u);
  EXPECT_EQ(response.ignored_tail_tokens(), 1u);
  EXPECT_FALSE(response.stopped_because().empty());
  ASSERT_GE(response.segments_size(), 1);
  EXPECT_TRUE(response.segments(0).host());
  request.set_model_id(8);
  EXPECT_STATUS(Call(&v1::Inspector::Stub::Explain, request, response), NOT_FOUND, "model_id");
}

TEST_F(InspectorTest, TopPrefixes) {
  TestWorker worker(server_);
  worker.Publish(model_, 2);
  for (int i = 0; i < 3; ++i) worker.Release(worker.Lookup(model_, Tokens(2)));
  v1::TopPrefixesRequest request;
  v1::TopPrefixesResponse response;
  ASSERT_GRPC_OK(Call(&v1::Inspector::Stub::TopPrefixes, request, response));
  ASSERT_EQ(response.prefixes_size(), 1);
  EXPECT_EQ(response.prefixes(0).head_size(), 16);
  EXPECT_EQ(response.prefixes(0).head(0), Tokens(1)[0]);
  request.set_count(1001);
  EXPECT_STATUS(Call(&v1::Inspector::Stub::TopPrefixes, request, response), INVALID_ARGUMENT,
                "count: 1001 given, at most 1000");
  request.set_count(1);
  request.set_model_id(5);
  EXPECT_STATUS(Call(&v1::Inspector::Stub::TopPrefixes, request, response), NOT_FOUND, "model_id");
}

TEST_F(InspectorTest, EvictDropsWhatIsNotPinned) {
  TestWorker worker(server_);
  worker.Publish(model_, 2);
  worker.Release(worker.Publish(model_, 3, /*seed=*/2));
  server_.mover().AwaitIdle();
  v1::EvictRequest request;
  v1::EvictResponse response;
  request.set_tier(v1::TIER_HOST);
  ASSERT_GRPC_OK(Call(&v1::Inspector::Stub::Evict, request, response));
  EXPECT_EQ(response.evicted_blocks(), 3u);
  EXPECT_EQ(response.kept_blocks(), 2u);
  request.set_tier(static_cast<v1::Tier>(7));
  EXPECT_STATUS(Call(&v1::Inspector::Stub::Evict, request, response), INVALID_ARGUMENT,
                "tier: 7 given");
  request.set_tier(v1::TIER_UNSPECIFIED);
  request.set_model_id(6);
  EXPECT_STATUS(Call(&v1::Inspector::Stub::Evict, request, response), NOT_FOUND, "model_id");
}

TEST_F(InspectorTest, Echo) {
  v1::EchoRequest request;
  v1::EchoResponse response;
  request.set_payload("hello");
  request.set_response_bytes(1000);
  ASSERT_GRPC_OK(Call(&v1::Inspector::Stub::Echo, request, response));
  EXPECT_EQ(response.payload().size(), 1000u);
  request.set_response_bytes((64 << 20) + 1);
  EXPECT_STATUS(Call(&v1::Inspector::Stub::Echo, request, response), INVALID_ARGUMENT,
                "response_bytes: 67108865 given");
}

}  // namespace
}  // namespace larder
