// Daemon: the composition root. Puts arenas, NVME store, mover, cache, hand-over, gRPC and
// metrics together, and takes them apart in order.
//
// Thread safety: Start, Drain and the destructor are called by one thread.
//
// Invariants:
//   1. When Start returns, everything answers: blocks of the NVME tier are known again.
//   2. What reads blocks stops before what moves them, that before the cache, and memory goes
//      last.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/config.h"
#include "storage/io_backend.h"

namespace larder {

// What a test's daemon has between itself and the world; nothing in larderd.
struct DaemonHooks {
  // Wraps the NVMe tier's file, as NvmeStore::Options::wrap_io.
  std::function<std::unique_ptr<IoBackend>(std::unique_ptr<IoBackend>)> wrap_nvme_io = nullptr;
  // GpuTier::Options::patience.
  absl::Duration gpu_patience = absl::Seconds(10);
};

class Daemon {
 public:
  // Errors name the setting that must change.
  static absl::StatusOr<std::unique_ptr<Daemon>> Start(const Config& config,
                                                       DaemonHooks hooks = {});
  ~Daemon();
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;

  // "unix:/run/larder/larderd.sock (GPU none, HOST 1 GiB, NVME none)"
  std::string Summary() const;

  // Grants nothing new, waits for workers and moves until the drain timeout, stops serving.
  void Drain();

 private:
  class Impl;
  explicit Daemon(std::unique_ptr<Impl> impl);
  const std::unique_ptr<Impl> impl_;
};

// Starts, says so on stdout, serves until SIGTERM or SIGINT, drains. A second signal exits at
// once. Returns the exit code: 0 after draining, 1 when the daemon could not start.
int RunDaemon(const Config& config, DaemonHooks hooks = {});

}  // namespace larder
