// Draining: nothing new is granted, what is under way goes on.
#include <grpc/grpc.h>
#include <grpcpp/health_check_service_interface.h>
#include <gtest/gtest.h>

#include "test_server.h"

namespace larder {
namespace {

TEST(Drain, WorkersAreToldAndNothingNewIsGranted) {
  TestServer server;
  const uint64_t model = OpenSmallModel(server);
  TestWorker worker(server);
  const uint64_t lease = worker.Publish(model, 2);
  const v1::ReserveResponse reserved = worker.Reserve(lease, 2, 1, v1::TIER_HOST);
  server.rpc().Drain(absl::Seconds(7));

  const std::optional<v1::AttachEvent> event = worker.Next();
  ASSERT_TRUE(event.has_value());
  EXPECT_EQ(event->draining().grace_ms(), 7000u);

  v1::LookupPrefixRequest lookup;
  v1::LookupPrefixResponse found;
  lookup.set_session_id(worker.session());
  lookup.set_model_id(model);
  {
    grpc::ClientContext context;
    EXPECT_STATUS(server.kv().LookupPrefix(&context, lookup, &found), UNAVAILABLE, "draining");
  }
  {
    grpc::ClientContext context;
    lookup.set_peek(true);
    EXPECT_TRUE(server.kv().LookupPrefix(&context, lookup, &found).ok()) << "grants nothing";
  }
  {
    grpc::ClientContext context;
    v1::ReserveRequest request;
    v1::ReserveResponse response;
    request.set_session_id(worker.session());
    request.set_lease_id(lease);
    request.set_position(2);
    request.set_count(1);
    EXPECT_STATUS(server.kv().Reserve(&context, request, &response), UNAVAILABLE, "draining");
  }
  {
    grpc::ClientContext context;
    const auto stream = server.kv().Attach(&context, v1::AttachRequest());
    v1::AttachEvent none;
    EXPECT_FALSE(stream->Read(&none));
    EXPECT_STATUS(stream->Finish(), UNAVAILABLE, "draining");
  }
  {
    grpc::ClientContext context;
    v1::DownloadRequest request;
    request.mutable_blocks()->set_model_id(model);
    const auto stream = server.kv().Download(&context, request);
    v1::DownloadChunk none;
    EXPECT_FALSE(stream->Read(&none));
    EXPECT_STATUS(stream->Finish(), UNAVAILABLE, "draining");
  }
  const auto tokens = Tokens(3);
  EXPECT_EQ(worker.Put(lease, 2, {tokens.begin() + 32, tokens.end()}).end(), 3u)
      << "what was reserved may be published";
  worker.Release(lease);
  {
    grpc::ClientContext context;
    v1::Status status;
    ASSERT_TRUE(server.inspector().GetStatus(&context, {}, &status).ok());
    EXPECT_TRUE(status.draining());
  }
  EXPECT_FALSE(server.sessions().AwaitNoStreams(absl::Now() + absl::Milliseconds(20)));
  worker.Detach();
  EXPECT_TRUE(server.sessions().AwaitNoStreams(absl::Now() + absl::Seconds(5)));
}

TEST(Drain, StopEndsStreamsOfWorkersThatStay) {
  TestServer server;
  TestWorker worker(server);
  server.rpc().Drain(absl::ZeroDuration());
  EXPECT_TRUE(worker.Next().has_value()) << "draining";
  server.rpc().Stop(absl::Now() + absl::Seconds(1));
  EXPECT_EQ(worker.Next(), std::nullopt);
  EXPECT_EQ(server.cache().Stats().sessions, 0u);
}

// Taking gRPC down waits for its poller of sockets that were full, which sleeps for up to 10 s.
TEST(Drain, GrpcStaysWhenItsLastObjectGoes) {
  { TestServer server; }
  EXPECT_TRUE(grpc_is_initialized());
}

TEST(Drain, StopCancelsCallsThatWait) {
  TestServer server;
  const uint64_t model = OpenSmallModel(server);
  TestWorker worker(server);
  server.mover().Pause(true);
  const uint64_t lease = worker.Publish(model, 2);
  std::thread flush([&] {
    grpc::ClientContext context;
    v1::FlushRequest request;
    v1::LeaseState state;
    request.set_session_id(worker.session());
    request.set_lease_id(lease);
    EXPECT_FALSE(server.kv().Flush(&context, request, &state).ok());
  });
  EXPECT_TRUE(Eventually([&] { return server.mover().raises() > 0; })) << "it waits";
  server.rpc().Stop(absl::Now());
  flush.join();
}

}  // namespace
}  // namespace larder
