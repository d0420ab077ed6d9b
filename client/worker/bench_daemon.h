// Daemon: a larderd of the experiment's own, which may be killed and started again.
//
// Thread safety: one thread at a time.
//
// Invariants:
//   1. It listens on a unix socket in a temporary directory, which goes with it.
//   2. It does not outlive this process, however that ends.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "larder/v1/types.pb.h"

namespace larder::worker::bench {

struct DaemonOptions {
  std::string program;    // a larderd
  std::string directory;  // where temporary directories go; on the drive that plays NVMe
  std::string gpu;        // its --gpu; empty: without a GPU tier
  uint64_t bytes = 0;     // of each tier, at least; rounded up
};

class Daemon {
 public:
  // INVALID_ARGUMENT when the directory or the program is not good.
  static absl::StatusOr<std::unique_ptr<Daemon>> Start(const DaemonOptions& options);
  ~Daemon();
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;

  // SIGKILL in the middle of whatever it does, then a new one on what is on NVMe.
  absl::Status KillAndRestart();

  // Waits until every cached block of `tokens` is on NVMe.
  absl::Status Flush(const v1::ModelSpec& spec, std::span<const uint32_t> tokens) const;
  // Drops all copies in the tier. FAILED_PRECONDITION when some stay held.
  absl::Status Evict(v1::Tier tier) const;

  const std::string& address() const { return address_; }

 private:
  explicit Daemon(const DaemonOptions& options) : options_(options) {}
  std::vector<std::string> Arguments() const;
  absl::Status Spawn();
  void Kill();

  const DaemonOptions options_;
  std::string directory_;
  std::string address_;
  pid_t pid_ = -1;
};

}  // namespace larder::worker::bench
