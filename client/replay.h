// Replay: a trace run against a daemon by several worker processes, as inference workers
// would.
//
//   parent                 reads the trace, starts the workers, adds up what they tell
//     |-- worker 0         requests 0, N, 2N ...     pipe: a WorkerLine each
//     |-- worker 1         requests 1, N+1 ...
//
// Thread safety: free functions; single-threaded processes, but for gRPC's own threads.
//
// Invariants:
//   1. The parent never touches gRPC: a process that forks has no threads of it.
//   2. A worker dies with its parent.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/commands.h"
#include "client/prompt_flags.h"
#include "client/replay_record.h"

namespace larder::cli {

struct ReplayFlags {
  std::string trace;
  uint64_t workers = 4;
  uint64_t skip = 0;
  uint64_t limit = std::numeric_limits<uint64_t>::max();
  uint64_t hold_ms = 2;      // a lease is held so long after its last Put
  uint64_t flush_every = 0;  // every so many requests of a worker its lease is flushed; 0: never
  v1::Tier prefetch_tier = v1::TIER_UNSPECIFIED;
  absl::Duration reconnect_timeout = absl::Seconds(30);
  bool verify = false;
  bool respawn = false;
  ModelFlags model;

  // Set in worker processes only.
  uint64_t as_worker = std::numeric_limits<uint64_t>::max();
  uint64_t resume_at = 0;  // TraceRequest::index
};

// A worker process: replays its share and writes WorkerLines to stdout. Answers an ExitCode.
int RunReplayWorker(const Invocation& invocation, const ReplayFlags& flags);

// Whether a request is worker `worker`'s.
inline bool IsShareOf(uint64_t index, const ReplayFlags& flags, uint64_t worker) {
  return (index - flags.skip) % flags.workers == worker;
}

// What happened to the worker processes themselves.
struct WorkerFates {
  uint64_t killed = 0;  // ended by a signal
  uint64_t respawned = 0;
  uint64_t killed_in_last = 0;  // with --respawn: in their last request, nothing is left to do
  std::vector<WorkerFailed> failed;
};

// Runs the workers to their end and hands each line on. `argv` is this process's own;
// `requests_end` is one past the last TraceRequest::index.
absl::StatusOr<WorkerFates> RunWorkers(const std::vector<std::string>& argv,
                                       const ReplayFlags& flags, uint64_t requests_end,
                                       const std::function<void(const WorkerLine&)>& on_line);

}  // namespace larder::cli
