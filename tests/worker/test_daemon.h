// TestDaemon: a FakeDaemon in a temporary directory, a client of it, and shorthand for answers.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "client/client.h"
#include "client/worker/cache_session.h"
#include "fake_daemon.h"

namespace larder::worker {

inline constexpr uint64_t kBlockBytes = FakeDaemon::kBlockBytes;
inline constexpr uint32_t kBlockTokens = FakeDaemon::kBlockTokens;

class TestDaemon {
 public:
  TestDaemon();
  ~TestDaemon();
  TestDaemon(const TestDaemon&) = delete;
  TestDaemon& operator=(const TestDaemon&) = delete;

  FakeDaemon& fake() { return *daemon_; }
  // As a SIGKILL; what is mapped stays mapped.
  void Kill() { daemon_.reset(); }
  void Restart() { daemon_ = std::make_unique<FakeDaemon>(directory_, ++boots_); }

  CacheOptions options() const;

  // A lease on `host` blocks in HOST, at the arena's start, and then `nvme` blocks on NVMe.
  Lease LookUp(uint32_t host, uint32_t nvme = 0);
  void AnswerLookup(uint32_t host, uint32_t nvme = 0);
  // Room for `count` blocks at `position`; each stands 16 blocks behind its position.
  void AnswerReserve(uint32_t position, uint32_t count);
  void AnswerState(uint32_t end, uint32_t reserved);
  // The bytes of the block that AnswerLookup puts at `position`.
  std::byte* HostBlock(uint32_t position) { return fake().arena().data() + position * kBlockBytes; }

 private:
  std::string directory_;
  std::string address_;
  uint64_t boots_ = 0;
  std::unique_ptr<FakeDaemon> daemon_;
  std::optional<Client> client_;
  std::optional<Session> session_;
};

}  // namespace larder::worker
