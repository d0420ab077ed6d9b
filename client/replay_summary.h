// Replay summary: what all workers' records add up to, as a table and as JSON.
//
// Thread safety: none.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "client/commands.h"
#include "client/json.h"
#include "client/replay.h"
#include "client/replay_record.h"

namespace larder::cli {

// The q-th quantile (0 to 1) of ascending samples, by nearest rank; 0 of nothing.
uint32_t Quantile(const std::vector<uint32_t>& sorted, double q);

class ReplaySummary {
 public:
  ReplaySummary(uint64_t requests_wanted, bool verified)
      : requests_wanted_(requests_wanted), verified_(verified) {}

  void Add(const WorkerLine& line);
  // Once, after the last Add and before what follows.
  void Finish(const WorkerFates& fates, absl::Duration elapsed);

  uint64_t requests() const { return total_.requests; }
  uint64_t bytes_wrong() const { return total_.bytes_wrong; }

  // kFailed for wrong bytes, for requests left undone, and for errors that neither a daemon
  // that went away nor a full tier explains; what a worker gave up with; else kOk.
  ExitCode exit_code() const;

  std::string Table() const;
  Json ToJson() const;

 private:
  // Of one life of the daemon, and of all.
  struct Phase {
    uint64_t boot_id = 0;
    uint64_t requests = 0;
    uint64_t interrupted = 0;
    uint64_t asked = 0;
    std::array<uint64_t, 3> served{};
    uint64_t computed = 0;
    uint64_t unreadable = 0;
    uint64_t put = 0;
    uint64_t exhausted = 0;
    uint64_t bytes_verified = 0;
    uint64_t bytes_wrong = 0;

    void Add(const RequestRecord& record);
    Json ToJson() const;
  };

  Phase& PhaseOf(uint64_t boot_id);
  std::string PhaseTable() const;
  std::string CallTable() const;
  std::string PathTable() const;
  std::string Notes() const;
  uint64_t undone() const;

  const uint64_t requests_wanted_;
  const bool verified_;
  Phase total_;
  std::vector<Phase> phases_;  // in order of appearance
  uint64_t reconnects_ = 0;
  PathUse prefetch_;
  PathUse read_;
  PathUse fill_;
  std::array<std::vector<uint32_t>, kCallCount> microseconds_;  // ascending after Finish
  ErrorCounts errors_;
  WorkerFates fates_;
  absl::Duration elapsed_;
};

}  // namespace larder::cli
