#include "server/metrics.h"

#include <gtest/gtest.h>
#include <prometheus/text_serializer.h>

#include "test_server.h"

namespace larder {
namespace {

TEST(Metrics, SayWhatHappened) {
  TestServer server;
  const uint64_t model = OpenSmallModel(server);
  TestWorker worker(server);
  worker.Release(worker.Publish(model, 2));
  worker.Lookup(model, Tokens(3));
  grpc::ClientContext context;
  v1::ReleaseRequest release;
  v1::ReleaseResponse released;
  release.set_session_id(worker.session());
  release.set_lease_id(1);
  EXPECT_FALSE(server.kv().Release(&context, release, &released).ok());

  const Metrics metrics(server.cache(), server.calls(), nullptr, "1.2.3");
  const std::string text = prometheus::TextSerializer().Serialize(metrics.Collect());
  for (const char* part :
       {"larder_build_info{version=\"1.2.3\"} 1", "larder_tier_bytes{tier=\"gpu\",state=\"total\"}",
        "larder_tier_hits_total{tier=\"host\"} 2", "larder_lookup_blocks_total{result=\"hit\"} 2",
        "larder_lookup_blocks_total{result=\"miss\"} 3",
        "larder_put_blocks_total{result=\"new\"} 2", "larder_sessions{state=\"live\"} 1",
        "larder_sessions{state=\"lost\"} 0", "larder_leases 1", "larder_exhausted_total 0",
        "larder_corrupt_blocks_total 0", "larder_calls_total{method=\"Release\",code=\"OK\"} 1",
        "larder_calls_total{method=\"Release\",code=\"NOT_FOUND\"} 1",
        "larder_call_seconds_count{method=\"LookupPrefix\"} 2",
        "larder_call_seconds_bucket{method=\"LookupPrefix\",le=\"+Inf\"} 2"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " not in\n" << text;
  }
  EXPECT_EQ(text.find("larder_nvme_degraded"), std::string::npos) << "no store, no such metric";
}

TEST(MetricsServer, RefusesAnAddressThatCannotBeHad) {
  TestServer server;
  auto metrics = std::make_shared<Metrics>(server.cache(), server.calls(), nullptr, "t");
  const auto first = MetricsServer::Start("127.0.0.1:0", metrics);
  ASSERT_TRUE(first.ok()) << first.status();
  const std::string url = (*first)->url();
  const std::string address = url.substr(7, url.rfind('/') - 7);
  const auto second = MetricsServer::Start(address, metrics);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(second.status().message().find(address), absl::string_view::npos);
}

}  // namespace
}  // namespace larder
