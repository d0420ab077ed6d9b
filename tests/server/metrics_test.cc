#include "server/metrics.h"

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <prometheus/text_serializer.h>
#include <sys/socket.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "storage/unique_fd.h"
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

// Connects and asks for nothing.
UniqueFd ConnectTo(int port) {
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  const int result =
      ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address));
  EXPECT_EQ(result, 0);
  return fd;
}

TEST(MetricsServer, AnswersBesideConnectionsThatAskForNothing) {
  TestServer server;
  const auto served = MetricsServer::Start(
      "127.0.0.1:0", std::make_shared<Metrics>(server.cache(), server.calls(), nullptr, "t"));
  ASSERT_TRUE(served.ok()) << served.status();
  const std::string url = (*served)->url();
  const int port = std::atoi(url.c_str() + url.rfind(':') + 1);
  std::vector<UniqueFd> silent;
  for (int i = 0; i < 6; ++i) silent.push_back(ConnectTo(port));  // more than it has threads
  const UniqueFd scrape = ConnectTo(port);
  // Prometheus waits for 10 s; a connection's standard timeout would be 30 s.
  const timeval patience{.tv_sec = 10, .tv_usec = 0};
  ::setsockopt(scrape.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  const std::string request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";
  ASSERT_EQ(::send(scrape.get(), request.data(), request.size(), 0), ssize_t(request.size()));
  char answer[15] = {};
  EXPECT_EQ(::recv(scrape.get(), answer, sizeof(answer), MSG_WAITALL), ssize_t(sizeof(answer)));
  EXPECT_EQ(std::string(answer, sizeof(answer)), "HTTP/1.1 200 OK");
}

}  // namespace
}  // namespace larder
