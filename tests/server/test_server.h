// TestServer: both services over a real cache, in this process.
//
// 8 GPU blocks in each of two ranks, 32 HOST and 64 NVME blocks of 4 KiB; no socket, no thread
// that a test did not ask for, except the mover's.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "server/rpc/rpc_server.h"
#include "test_mover.h"

namespace larder {

inline constexpr uint32_t kBlockTokens = 16;
inline constexpr uint32_t kBlockBytes = 4096;

// A spec whose blocks have kBlockBytes.
v1::ModelSpec SmallSpec(const std::string& name = "small");

// `blocks` whole blocks of tokens; equal seeds share every prefix.
std::vector<uint32_t> Tokens(uint32_t blocks, uint32_t seed = 1);
// The bytes that tests put for block `position` of that path.
std::string BlockData(uint32_t blocks, uint32_t seed = 1, uint32_t position = 0);

class TestServer {
 public:
  explicit TestServer(bool nvme = true);
  ~TestServer();

  v1::KvCache::Stub& kv() { return *kv_; }
  v1::Inspector::Stub& inspector() { return *inspector_; }
  std::shared_ptr<grpc::Channel> channel() { return channel_; }
  TestMover& mover() { return *mover_; }
  Cache& cache() { return *cache_; }
  Sessions& sessions() { return *sessions_; }
  RpcServer& rpc() { return *rpc_; }
  CallStats& calls() { return calls_; }
  // Rank `rank`'s part of a block of which each shard has kBlockBytes.
  std::byte* At(const v1::Run& run, int i, uint32_t rank = 0) {
    if (run.tier() == v1::TIER_GPU) return context_->gpus[rank].data() + run.offsets(i);
    return context_->host.data() + run.offsets(i) + rank * kBlockBytes;
  }

  // Plays the hand-over: a process has the arenas, or is gone.
  void Map(SessionId session, int64_t pid);
  void Unmap(SessionId session);

 private:
  std::optional<Sessions::Peer> PeerOf(SessionId session);

  std::vector<std::byte> memory_;
  CacheLink link_;
  CallStats calls_;
  std::unique_ptr<Clock> clock_;
  std::unique_ptr<TestMover> mover_;
  std::unique_ptr<Cache> cache_;
  std::unique_ptr<Sessions> sessions_;
  std::unique_ptr<RpcContext> context_;
  std::unique_ptr<RpcServer> rpc_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::KvCache::Stub> kv_;
  std::unique_ptr<v1::Inspector::Stub> inspector_;

  absl::Mutex mu_;
  std::map<SessionId, int64_t> pids_ ABSL_GUARDED_BY(mu_);
};

// An attached worker; detaches when it dies.
class TestWorker {
 public:
  explicit TestWorker(TestServer& server, const std::string& name = "worker");
  ~TestWorker();

  uint64_t session() const { return session_; }
  const v1::AttachEvent& attached() const { return attached_; }
  // The next event; nullopt: the stream has ended.
  std::optional<v1::AttachEvent> Next();
  // Ends the stream from this side.
  grpc::Status Detach();

  // Calls that must succeed.
  uint64_t Lookup(uint64_t model, const std::vector<uint32_t>& tokens, uint32_t* matched = nullptr);
  v1::ReserveResponse Reserve(uint64_t lease, uint32_t position, uint32_t count,
                              v1::Tier tier = v1::TIER_UNSPECIFIED);
  v1::LeaseState Put(uint64_t lease, uint32_t position, const std::vector<uint32_t>& tokens);
  void Release(uint64_t lease);
  // Publishes a path by writing BlockData in place; returns the lease on it.
  uint64_t Publish(uint64_t model, uint32_t blocks, uint32_t seed = 1,
                   v1::Tier tier = v1::TIER_HOST);

 private:
  TestServer& server_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<v1::AttachEvent>> stream_;
  v1::AttachEvent attached_;
  uint64_t session_ = 0;
};

uint64_t OpenSmallModel(TestServer& server, const std::string& name = "small");

// Waits (a few seconds at most) until `condition` holds.
template <typename Condition>
[[nodiscard]] bool Eventually(Condition&& condition) {
  for (int i = 0; i < 1000; ++i) {
    if (condition()) return true;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return false;
}

#define EXPECT_STATUS(expression, expected_code, part)                                           \
  do {                                                                                           \
    const grpc::Status status_ = (expression);                                                   \
    EXPECT_EQ(status_.error_code(), grpc::StatusCode::expected_code) << status_.error_message(); \
    EXPECT_NE(status_.error_message().find(part), std::string::npos)                             \
        << "got: " << status_.error_message();                                                   \
  } while (false)

#define ASSERT_GRPC_OK(expression)                        \
  do {                                                    \
    const grpc::Status status_ = (expression);            \
    ASSERT_TRUE(status_.ok()) << status_.error_message(); \
  } while (false)

}  // namespace larder
