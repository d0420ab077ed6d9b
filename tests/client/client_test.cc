// The client without a daemon, and what a session does when its daemon hangs, ends or restarts.
#include "client/client.h"

#include <grpc/grpc.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <string>
#include <thread>

#include "absl/time/clock.h"
#include "fake_daemon.h"

namespace larder {
namespace {

constexpr absl::Duration kTimeout = absl::Milliseconds(500);
const uint32_t kTokens[] = {1, 2, 3, 4, 5, 6, 7, 8};

// True as soon as `condition` holds, false after 5 seconds.
template <typename Condition>
bool Eventually(Condition condition) {
  const absl::Time deadline = absl::Now() + absl::Seconds(5);
  while (!condition()) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(absl::Milliseconds(2));
  }
  return true;
}

class ClientTest : public testing::Test {
 protected:
  ClientTest() {
    std::string pattern = testing::TempDir() + "larder_client_XXXXXX";
    directory_ = mkdtemp(pattern.data());
    StartDaemon(1);
  }
  ~ClientTest() override {
    daemon_.reset();
    std::filesystem::remove_all(directory_);
  }

  void StartDaemon(uint64_t boot_id) {
    daemon_ = std::make_unique<FakeDaemon>(directory_, boot_id);
  }

  absl::StatusOr<Client> Connect() {
    return Client::Connect(daemon_->address(),
                           {.call_timeout = kTimeout, .connect_timeout = kTimeout});
  }

  std::string directory_;
  std::unique_ptr<FakeDaemon> daemon_;
};

TEST(Connect, RefusesNonsense) {
  for (const char* address : {"unix:", "larderd", "unix-abstract:", ":80", "host:"}) {
    const absl::Status status = Client::Connect(address).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << address << ": " << status;
    EXPECT_NE(status.message().find(address), absl::string_view::npos) << status;
  }
}

TEST(Connect, WithoutADaemonIsUnavailableAtOnce) {
  const absl::Time start = absl::Now();
  const absl::Status status = Client::Connect("unix:/nowhere/larderd.sock").status();
  EXPECT_EQ(status, absl::UnavailableError("no larderd answers at unix:/nowhere/larderd.sock"));
  EXPECT_LT(absl::Now() - start, absl::Seconds(2));
}

TEST(DefaultAddress, IsTheEnvironments) {
  unsetenv("LARDER_ADDRESS");
  EXPECT_EQ(DefaultAddress(), "unix:/run/larder/larderd.sock");
  setenv("LARDER_ADDRESS", "unix:/tmp/x.sock", 1);
  EXPECT_EQ(DefaultAddress(), "unix:/tmp/x.sock");
  unsetenv("LARDER_ADDRESS");
}

// gRPC that is taken down with its last object waits for a poller of its own, up to 10 s.
TEST_F(ClientTest, GrpcStays) {
  EXPECT_TRUE(Connect().ok());
  daemon_.reset();
  EXPECT_TRUE(grpc_is_initialized());
}

TEST_F(ClientTest, SessionMapsTheArenas) {
  absl::StatusOr<Client> client = Connect();
  ASSERT_TRUE(client.ok()) << client.status();
  absl::StatusOr<Session> session = client->NewSession("test");
  ASSERT_TRUE(session.ok()) << session.status();
  EXPECT_EQ(session->boot_id(), 1u);
  EXPECT_EQ(session->id(), 1000u);
  EXPECT_TRUE(session->Alive());
  EXPECT_FALSE(session->Draining());
  EXPECT_TRUE(session->Arena(0).empty());
  EXPECT_TRUE(session->Arena(99).empty());
  ASSERT_EQ(session->Arena(1).size(), FakeDaemon::kArenaBytes);
  daemon_->arena()[5000] = std::byte{42};
  EXPECT_EQ(session->Arena(1)[5000], std::byte{42});
}

TEST_F(ClientTest, SessionWithoutMappings) {
  absl::StatusOr<Client> client = Connect();
  ASSERT_TRUE(client.ok());
  absl::StatusOr<Session> session = client->NewSession("test", {.map_arenas = false});
  ASSERT_TRUE(session.ok()) << session.status();
  EXPECT_TRUE(session->Arena(1).empty());
}

TEST_F(ClientTest, AttachErrorsAreTheDaemons) {
  daemon_->AnswerError("Attach", grpc::Status(grpc::RESOURCE_EXHAUSTED, "too many sessions"));
  absl::StatusOr<Client> client = Connect();
  ASSERT_TRUE(client.ok());
  EXPECT_EQ(client->NewSession("test").status(), absl::ResourceExhaustedError("too many sessions"));
}

TEST_F(ClientTest, EveryWaitHasADeadline) {
  absl::StatusOr<Client> client = Connect();
  ASSERT_TRUE(client.ok());
  absl::StatusOr<Session> session = client->NewSession("test");
  ASSERT_TRUE(session.ok()) << session.status();
  daemon_->HangCalls();
  const absl::Time start = absl::Now();
  const absl::Status lookup = session->Lookup(FakeDaemon::Model(), kTokens).status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(lookup)) << lookup;
  EXPECT_NE(lookup.message().find("LookupPrefix"), absl::string_view::npos) << lookup;
  const absl::Status attach = client->NewSession("another").status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(attach)) << attach;
  EXPECT_LT(absl::Now() - start, 6 * kTimeout);
  EXPECT_TRUE(session->Alive()) << "a slow call does not lose the session";
}

TEST_F(ClientTest, DrainingIsSeen) {
  absl::StatusOr<Client> client = Connect();
  ASSERT_TRUE(client.ok());
  absl::StatusOr<Session> session = client->NewSession("test");
  ASSERT_TRUE(session.ok());
  daemon_->Drain();
  EXPECT_TRUE(Eventually([&] { return session->Draining(); }));
  EXPECT_TRUE(session->Alive());
}

TEST_F(ClientTest, CutStreamLosesTheSession) {
  absl::StatusOr<Client> client = Connect();
  ASSERT_TRUE(client.ok());
  absl::StatusOr<Session> session = client->NewSession("test");
  ASSERT_TRUE(session.ok());
  daemon_->CutStreams();
  ASSERT_TRUE(Eventually([&] { return !session->Alive(); }));
  EXPECT_TRUE(absl::IsUnavailable(session->Health())) << session->Health();
  const int calls = daemon_->Calls("LookupPrefix");
  EXPECT_EQ(session->Lookup(FakeDaemon::Model(), kTokens).status(), session->Health());
  EXPECT_EQ(daemon_->Calls("LookupPrefix"), calls) << "nothing is sent on a lost session";
  EXPECT_TRUE(client->NewSession("again").ok());
}

// What a lease gave out before the daemon died stays mapped and as it was; nothing is given out
// after it, and the same Client works with the next daemon.
TEST_F(ClientTest, RestartIsANewBootAndTheOldSessionStaysLost) {
  absl::StatusOr<Client> client = Connect();
  ASSERT_TRUE(client.ok());
  absl::StatusOr<Session> session = client->NewSession("test");
  ASSERT_TRUE(session.ok());
  v1::LookupPrefixResponse found;
  found.set_lease_id(7);
  found.set_matched_tokens(4);
  *found.add_runs() = FakeDaemon::HostRun(0, {8192});
  daemon_->AnswerLookup(found);
  daemon_->arena()[8192] = std::byte{9};
  absl::StatusOr<Lease> lease = session->Lookup(FakeDaemon::Model(), kTokens);
  ASSERT_TRUE(lease.ok()) << lease.status();
  absl::StatusOr<std::span<const std::byte>> block = lease->Block(0);
  ASSERT_TRUE(block.ok()) << block.status();

  daemon_.reset();
  ASSERT_TRUE(Eventually([&] { return !session->Alive(); }));
  EXPECT_TRUE(absl::IsUnavailable(lease->Block(0).status()));
  EXPECT_TRUE(absl::IsUnavailable(lease->Prefetch().status()));
  EXPECT_TRUE(absl::IsUnavailable(lease->Reserve(1)));
  EXPECT_TRUE(absl::IsUnavailable(lease->Put(kTokens).status()));
  EXPECT_TRUE(absl::IsUnavailable(client->NewSession("too early").status()));
  EXPECT_EQ(block->front(), std::byte{9}) << "still mapped";

  StartDaemon(2);
  absl::StatusOr<Session> next = absl::UnavailableError("not yet");
  ASSERT_TRUE(Eventually([&] {
    next = client->NewSession("test");
    return next.ok();
  })) << next.status();
  EXPECT_EQ(next->boot_id(), 2u);
  EXPECT_FALSE(session->Alive());
  EXPECT_TRUE(absl::IsUnavailable(lease->Truncate(0).status()));
}

// A restarted daemon answers NOT_FOUND to a session of the one before. That is told from a lease
// or model that is not there by whether the stream has ended too.
TEST_F(ClientTest, UnknownSessionIsALostOne) {
  absl::StatusOr<Client> client = Connect();
  ASSERT_TRUE(client.ok());
  absl::StatusOr<Session> session = client->NewSession("test");
  ASSERT_TRUE(session.ok());
  daemon_->AnswerError("LookupPrefix", grpc::Status(grpc::NOT_FOUND, "model_id: no such model"));
  EXPECT_EQ(session->Lookup(FakeDaemon::Model(), kTokens).status(),
            absl::NotFoundError("model_id: no such model"));
  EXPECT_TRUE(session->Alive());
  daemon_->CutStreams();
  const absl::Status lookup = session->Lookup(FakeDaemon::Model(), kTokens).status();
  EXPECT_TRUE(absl::IsUnavailable(lookup)) << lookup;
  EXPECT_EQ(lookup, session->Health());
}

TEST_F(ClientTest, SessionOutlivesItsClient) {
  absl::StatusOr<Session> session = absl::UnknownError("none yet");
  {
    absl::StatusOr<Client> client = Connect();
    ASSERT_TRUE(client.ok());
    session = client->NewSession("test");
  }
  ASSERT_TRUE(session.ok());
  EXPECT_TRUE(session->Alive());
  EXPECT_TRUE(session->Lookup(FakeDaemon::Model(), {}).ok());
}

TEST_F(ClientTest, MovedFromSessionHoldsNothing) {
  absl::StatusOr<Client> client = Connect();
  ASSERT_TRUE(client.ok());
  absl::StatusOr<Session> session = client->NewSession("test");
  ASSERT_TRUE(session.ok());
  const Session moved = *std::move(session);
  EXPECT_TRUE(moved.Alive());
  EXPECT_TRUE(absl::IsFailedPrecondition(session->Health()));  // NOLINT(bugprone-use-after-move)
  EXPECT_TRUE(absl::IsFailedPrecondition(session->Lookup(FakeDaemon::Model(), kTokens).status()));
}

TEST_F(ClientTest, ManyThreadsShareASession) {
  absl::StatusOr<Client> client = Connect();
  ASSERT_TRUE(client.ok());
  absl::StatusOr<Session> session = client->NewSession("test");
  ASSERT_TRUE(session.ok());
  v1::LookupPrefixResponse found;
  found.set_lease_id(7);
  daemon_->AnswerLookup(found);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int n = 0; n < 20; ++n) {
        EXPECT_TRUE(session->Lookup(FakeDaemon::Model(), kTokens).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(daemon_->Calls("LookupPrefix"), 80);
  { const Session ended = *std::move(session); }
  EXPECT_EQ(daemon_->Calls("Release"), 80) << "they have arrived when the session ends";
}

}  // namespace
}  // namespace larder
