// The hand-over socket: who gets the arenas, who is refused, and when a session is gone.

#include "storage/handover.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <map>
#include <set>
#include <thread>

#include "absl/strings/match.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "storage/handover_socket.h"
#include "tests/storage/child_process.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using ::larder::testing::ChildParameter;
using ::larder::testing::ChildProcess;
using ::larder::testing::Say;
using ::larder::testing::TempDir;

constexpr uint64_t kBoot = 0xb007;
constexpr uint64_t kBytes = 1 << 20;

// What the server told about sessions.
class GoneLog {
 public:
  void Add(uint64_t session) {
    absl::MutexLock lock(&mu_);
    ++counts_[session];
    changed_.SignalAll();
  }
  void WaitFor(uint64_t session) {
    absl::MutexLock lock(&mu_);
    while (counts_[session] == 0) changed_.Wait(&mu_);
  }
  int Count(uint64_t session) {
    absl::MutexLock lock(&mu_);
    return counts_[session];
  }

 private:
  absl::Mutex mu_;
  absl::CondVar changed_;
  std::map<uint64_t, int> counts_ ABSL_GUARDED_BY(mu_);
};

class Handover : public ::testing::Test {
 protected:
  Handover() {
    auto arena = Arena::Create({"handover", kBytes, false, 0});
    LARDER_CHECK(arena.ok(), "arena");
    arena_ = *std::move(arena);
    options_.socket_path = folder_.path() + "/socket";
    options_.boot_id = kBoot;
    options_.request_timeout = absl::Milliseconds(200);
    options_.foreign_grace = absl::Milliseconds(20);
    HandoverServer::ArenaExport host;
    host.description.arena = 1;
    host.description.tier = 2;
    host.description.bytes = kBytes;
    host.fd = arena_->fd();
    HandoverServer::ArenaExport device;
    device.description.arena = 0;
    device.description.kind = wire::kCudaIpc;
    options_.arenas = {device, host};
  }

  // Sessions 1 to 9 live; GoneFn ends them.
  void Start() {
    auto server = HandoverServer::Start(
        options_,
        [this](uint64_t session) {
          if (on_authorize_) on_authorize_(session);
          return session >= 1 && session <= 9 && gone_.Count(session) == 0;
        },
        [this](uint64_t session) { gone_.Add(session); });
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  UniqueFd RawConnect() {
    auto address = MakeUnixAddress(options_.socket_path);
    UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    EXPECT_EQ(::connect(fd.get(), address->get(), address->length), 0);
    return fd;
  }
  // Waits for the answer and for the end of the connection.
  static uint32_t StatusThenEnd(const UniqueFd& fd) {
    wire::HandoverReply reply;
    EXPECT_EQ(::recv(fd.get(), &reply, sizeof(reply), MSG_WAITALL),
              static_cast<ssize_t>(sizeof(reply)));
    char more;
    EXPECT_LE(::recv(fd.get(), &more, 1, 0), 0);
    return reply.status;
  }
  std::unique_ptr<ChildProcess> StartMapper(uint64_t session) {
    return std::make_unique<ChildProcess>(
        "HandoverChild.DISABLED_Maps",
        std::map<std::string, std::string>{{"SOCKET", options_.socket_path},
                                           {"SESSION", std::to_string(session)}});
  }

  TempDir folder_;
  std::unique_ptr<Arena> arena_;
  HandoverServer::Options options_;
  std::function<void(uint64_t)> on_authorize_;
  GoneLog gone_;
  std::unique_ptr<HandoverServer> server_;
};

// A worker: maps the arena, adds one to its first byte, waits to be killed.
TEST(HandoverChild, DISABLED_Maps) {
  auto got =
      ConnectHandover(ChildParameter("SOCKET"), kBoot, std::stoull(ChildParameter("SESSION")));
  ASSERT_TRUE(got.ok()) << got.status();
  std::byte* const base = got->arenas[1]->base();
  base[0] = static_cast<std::byte>(static_cast<int>(base[0]) + 1);
  Say("mapped");
  ::pause();
}

TEST_F(Handover, GivesArenasToALiveSession) {
  Start();
  EXPECT_EQ(server_->PeerOf(3), std::nullopt);
  auto got = ConnectHandover(options_.socket_path, kBoot, 3);
  ASSERT_TRUE(got.ok()) << got.status();
  ASSERT_EQ(got->arenas.size(), 2u);
  EXPECT_EQ(got->arenas[0], nullptr);  // no shared memory
  EXPECT_EQ(got->descriptions[0].kind, wire::kCudaIpc);
  ASSERT_NE(got->arenas[1], nullptr);
  EXPECT_EQ(got->descriptions[1].bytes, kBytes);
  got->arenas[1]->base()[77] = std::byte{5};
  EXPECT_EQ(arena_->base()[77], std::byte{5});
  const auto peer = server_->PeerOf(3);
  ASSERT_TRUE(peer.has_value());
  EXPECT_EQ(peer->pid, ::getpid());
  EXPECT_FALSE(peer->foreign);
}

TEST_F(Handover, EndOfConnectionProvesNothingAboutAProcess) {
  Start();
  { auto got = ConnectHandover(options_.socket_path, kBoot, 3); }
  auto again = ConnectHandover(options_.socket_path, kBoot, 3);
  ASSERT_TRUE(again.ok()) << again.status();
  again->connection.Reset();
  // By the time of this answer the server has seen both ends.
  auto other = ConnectHandover(options_.socket_path, kBoot, 4);
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_TRUE(server_->PeerOf(3).has_value());
  EXPECT_EQ(gone_.Count(3), 0);
}

TEST_F(Handover, KilledProcessIsGoneOnceAndItsBytesStay) {
  Start();
  auto child = StartMapper(5);
  ASSERT_EQ(child->ReadLine(), "mapped");
  EXPECT_EQ(arena_->base()[0], std::byte{1});
  ASSERT_TRUE(server_->PeerOf(5).has_value());
  EXPECT_EQ(server_->PeerOf(5)->pid, child->pid());
  EXPECT_EQ(gone_.Count(5), 0);
  child->Kill();
  gone_.WaitFor(5);
  EXPECT_EQ(server_->PeerOf(5), std::nullopt);
  EXPECT_TRUE(absl::IsNotFound(ConnectHandover(options_.socket_path, kBoot, 5).status()));
  server_.reset();
  EXPECT_EQ(gone_.Count(5), 1);
}

TEST_F(Handover, SessionOfTwoProcessesIsGoneWithTheLast) {
  Start();
  auto first = StartMapper(5);
  ASSERT_EQ(first->ReadLine(), "mapped");
  auto second = StartMapper(5);
  ASSERT_EQ(second->ReadLine(), "mapped");
  auto witness = StartMapper(6);
  ASSERT_EQ(witness->ReadLine(), "mapped");
  EXPECT_EQ(arena_->base()[0], std::byte{3});
  first->Kill();
  witness->Kill();
  gone_.WaitFor(6);  // later than the end of `first`
  EXPECT_EQ(gone_.Count(5), 0);
  second->Kill();
  gone_.WaitFor(5);
  server_.reset();
  EXPECT_EQ(gone_.Count(5), 1);
}

TEST_F(Handover, ForeignPeerIsGoneSomeTimeAfterItsConnection) {
  options_.probe = [](int) { return PeerProcess{}; };
  Start();
  auto got = ConnectHandover(options_.socket_path, kBoot, 7);
  ASSERT_TRUE(got.ok()) << got.status();
  ASSERT_TRUE(server_->PeerOf(7).has_value());
  EXPECT_TRUE(server_->PeerOf(7)->foreign);
  auto second = ConnectHandover(options_.socket_path, kBoot, 7);
  ASSERT_TRUE(second.ok()) << second.status();
  const absl::Time closed = absl::Now();
  got->connection.Reset();
  second->connection.Reset();
  gone_.WaitFor(7);
  EXPECT_GE(absl::Now() - closed, options_.foreign_grace);
  EXPECT_EQ(server_->PeerOf(7), std::nullopt);
}

TEST_F(Handover, PeerThatCannotBeWatchedIsRefused) {
  options_.probe = [](int) -> absl::StatusOr<PeerProcess> {
    return absl::UnavailableError("gone");
  };
  Start();
  EXPECT_FALSE(ConnectHandover(options_.socket_path, kBoot, 7).ok());
  EXPECT_EQ(server_->PeerOf(7), std::nullopt);
}

TEST_F(Handover, RefusesUnknownSessionsAndBoots) {
  Start();
  auto unknown = ConnectHandover(options_.socket_path, kBoot, 10);
  EXPECT_TRUE(absl::IsNotFound(unknown.status())) << unknown.status();
  EXPECT_TRUE(absl::StrContains(unknown.status().message(), "10"));
  auto other_boot = ConnectHandover(options_.socket_path, kBoot + 1, 1);
  EXPECT_TRUE(absl::IsNotFound(other_boot.status())) << other_boot.status();
  EXPECT_EQ(server_->PeerOf(10), std::nullopt);
  EXPECT_EQ(server_->PeerOf(1), std::nullopt);
  server_.reset();
  EXPECT_EQ(gone_.Count(10), 0);
}

// A session lost in the very moment: whoever was told of a peer is told of its end.
TEST_F(Handover, PeerThatWasNamedBeforeARefusalIsGoneOnce) {
  on_authorize_ = [this](uint64_t session) {
    if (session != 10) return;
    EXPECT_TRUE(server_->PeerOf(10).has_value());
  };
  Start();
  EXPECT_TRUE(absl::IsNotFound(ConnectHandover(options_.socket_path, kBoot, 10).status()));
  gone_.WaitFor(10);
  EXPECT_EQ(server_->PeerOf(10), std::nullopt);
  server_.reset();
  EXPECT_EQ(gone_.Count(10), 1);
}

TEST_F(Handover, GarbageAndWrongMagicAreBadRequests) {
  Start();
  for (size_t bytes : {24, 4096, 100000}) {
    UniqueFd fd = RawConnect();
    const std::string garbage(bytes, 'x');
    (void)::send(fd.get(), garbage.data(), garbage.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    EXPECT_EQ(StatusThenEnd(fd), wire::kHandoverBadRequest);
  }
  UniqueFd fd = RawConnect();
  const wire::HandoverRequest request{wire::kHandoverMagic + 1, kBoot, 1};
  ASSERT_EQ(::send(fd.get(), &request, sizeof(request), 0), static_cast<ssize_t>(sizeof(request)));
  EXPECT_EQ(StatusThenEnd(fd), wire::kHandoverBadRequest);
  EXPECT_EQ(server_->PeerOf(1), std::nullopt);
}

TEST_F(Handover, CutRequestIsABadRequest) {
  Start();
  UniqueFd fd = RawConnect();
  ASSERT_EQ(::send(fd.get(), "short", 5, 0), 5);
  ::shutdown(fd.get(), SHUT_WR);
  EXPECT_EQ(StatusThenEnd(fd), wire::kHandoverBadRequest);
}

TEST_F(Handover, SlowClientHoldsNobodyUpAndTimesOut) {
  Start();
  UniqueFd silent = RawConnect();
  UniqueFd slow = RawConnect();
  const wire::HandoverRequest request{wire::kHandoverMagic, kBoot, 1};
  ASSERT_EQ(::send(slow.get(), &request, 10, 0), 10);
  EXPECT_TRUE(ConnectHandover(options_.socket_path, kBoot, 2).ok());
  EXPECT_EQ(StatusThenEnd(slow), wire::kHandoverBadRequest);
  EXPECT_EQ(StatusThenEnd(silent), wire::kHandoverBadRequest);
}

TEST_F(Handover, RequestInPiecesIsWhole) {
  Start();
  UniqueFd fd = RawConnect();
  const wire::HandoverRequest request{wire::kHandoverMagic, kBoot, 1};
  for (size_t i = 0; i < sizeof(request); ++i) {
    ASSERT_EQ(::send(fd.get(), reinterpret_cast<const char*>(&request) + i, 1, 0), 1);
  }
  wire::HandoverReply reply;
  ASSERT_EQ(::recv(fd.get(), &reply, sizeof(reply), MSG_WAITALL),
            static_cast<ssize_t>(sizeof(reply)));
  EXPECT_EQ(reply.status, wire::kHandoverOk);
}

TEST_F(Handover, ConnectionsAreBounded) {
  options_.connections_max = 2;
  Start();
  auto first = ConnectHandover(options_.socket_path, kBoot, 1);
  auto second = ConnectHandover(options_.socket_path, kBoot, 2);
  ASSERT_TRUE(first.ok() && second.ok());
  for (int i = 0; i < 100; ++i) {
    auto third = ConnectHandover(options_.socket_path, kBoot, 3);
    ASSERT_TRUE(absl::IsResourceExhausted(third.status())) << third.status();
  }
  EXPECT_EQ(server_->PeerOf(3), std::nullopt);
  first->connection.Reset();
  // Every round trip is an occasion for the server to notice.
  absl::Status status;
  do {
    status = ConnectHandover(options_.socket_path, kBoot, 3).status();
  } while (absl::IsResourceExhausted(status));
  EXPECT_TRUE(status.ok()) << status;
}

TEST_F(Handover, ManyClientsAtOnce) {
  Start();
  std::vector<std::thread> clients;
  std::atomic<int> ok{0};
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([&, i] {
      for (int n = 0; n < 20; ++n) {
        ok += ConnectHandover(options_.socket_path, kBoot, 1 + i).ok();
        RawConnect();
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(ok, 160);
}

TEST_F(Handover, ReplacesAStaleSocketAndRemovesItsOwn) {
  {
    auto stale = ListenAt(options_.socket_path, 0600, 1);
    ASSERT_TRUE(stale.ok());
  }  // closed, the file stays
  Start();
  struct stat info;
  ASSERT_EQ(::stat(options_.socket_path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, options_.mode);
  EXPECT_TRUE(ConnectHandover(options_.socket_path, kBoot, 1).ok());
  server_.reset();
  EXPECT_NE(::stat(options_.socket_path.c_str(), &info), 0);
}

TEST_F(Handover, RefusesALiveSocketAndOtherFiles) {
  Start();
  auto second = HandoverServer::Start(
      options_, [](uint64_t) { return true; }, [](uint64_t) {});
  EXPECT_TRUE(absl::IsFailedPrecondition(second.status())) << second.status();
  EXPECT_TRUE(ConnectHandover(options_.socket_path, kBoot, 1).ok()) << "the first one still serves";
  options_.socket_path = folder_.path() + "/file";
  std::ofstream(options_.socket_path) << "precious";
  auto third = HandoverServer::Start(
      options_, [](uint64_t) { return true; }, [](uint64_t) {});
  EXPECT_TRUE(absl::IsFailedPrecondition(third.status())) << third.status();
  EXPECT_EQ(std::filesystem::file_size(options_.socket_path), 8u);
}

TEST_F(Handover, ServesTheAbstractNamespace) {
  options_.socket_path = "@larder-test-" + std::to_string(::getpid());
  Start();
  EXPECT_TRUE(ConnectHandover(options_.socket_path, kBoot, 1).ok());
  auto second = HandoverServer::Start(
      options_, [](uint64_t) { return true; }, [](uint64_t) {});
  EXPECT_TRUE(absl::IsFailedPrecondition(second.status())) << second.status();
}

TEST_F(Handover, ClientNamesWhatIsWrong) {
  auto nobody = ConnectHandover(folder_.path() + "/none", kBoot, 1);
  EXPECT_TRUE(absl::IsUnavailable(nobody.status())) << nobody.status();
  auto too_long = ConnectHandover(std::string(200, 'p'), kBoot, 1);
  EXPECT_TRUE(absl::IsInvalidArgument(too_long.status())) << too_long.status();
  auto mute = ListenAt(options_.socket_path, 0600, 8);  // accepts and never answers
  auto unanswered = ConnectHandover(options_.socket_path, kBoot, 1, absl::Milliseconds(30));
  EXPECT_TRUE(absl::IsDeadlineExceeded(unanswered.status())) << unanswered.status();
  options_.arenas.resize(wire::kHandoverArenasMax + 1);
  auto many = HandoverServer::Start(
      options_, [](uint64_t) { return true; }, [](uint64_t) {});
  EXPECT_TRUE(absl::IsInvalidArgument(many.status())) << many.status();
}

}  // namespace
}  // namespace larder
