// Replay records: what a replay worker tells its parent, one JSON object a line.
//
// Thread safety: values.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace larder::cli {

enum class Call : uint8_t {
  kAttach,
  kLookup,
  kPrefetch,
  kTruncate,
  kReserve,
  kPut,
  kFlush,
  kRelease
};
inline constexpr int kCallCount = 8;
std::string_view CallName(Call call);

// Bytes that went a way, and the time that took.
struct PathUse {
  uint64_t bytes = 0;
  uint64_t nanoseconds = 0;

  void Add(const PathUse& other) {
    bytes += other.bytes;
    nanoseconds += other.nanoseconds;
  }
  friend bool operator==(const PathUse&, const PathUse&) = default;
};

struct ErrorCount {
  uint64_t count = 0;
  std::string example;  // the first one's message

  friend bool operator==(const ErrorCount&, const ErrorCount&) = default;
};
using ErrorCounts = std::map<std::string, ErrorCount>;  // by "Call CODE"

void AddErrors(const ErrorCounts& more, ErrorCounts& errors);

// One request of the trace. Blocks: asked = served in each tier + computed.
struct RequestRecord {
  uint64_t index = 0;        // TraceRequest::index
  uint64_t boot_id = 0;      // of the daemon that it was made to
  bool interrupted = false;  // the daemon went away in the middle

  uint64_t asked = 0;
  std::array<uint64_t, 3> served{};  // by where the lookup found them: GPU, HOST, NVMe
  uint64_t computed = 0;
  uint64_t unreadable = 0;  // found by the lookup but not to be read; among the computed
  uint64_t put = 0;         // of the computed: published
  uint64_t exhausted = 0;   // reservations that got less than they asked for

  uint64_t bytes_verified = 0;
  uint64_t bytes_wrong = 0;
  PathUse prefetch;
  PathUse read;  // compared byte by byte with --verify, else checksummed
  PathUse fill;

  std::array<std::vector<uint32_t>, kCallCount> microseconds;  // of each call that was answered
  ErrorCounts errors;

  friend bool operator==(const RequestRecord&, const RequestRecord&) = default;
};

// The daemon was gone and this worker has a new session.
struct Reconnected {
  friend bool operator==(const Reconnected&, const Reconnected&) = default;
};

// The worker gives up.
struct WorkerFailed {
  absl::StatusCode code = absl::StatusCode::kUnknown;
  std::string message;
  friend bool operator==(const WorkerFailed&, const WorkerFailed&) = default;
};

using WorkerLine = std::variant<RequestRecord, Reconnected, WorkerFailed>;

std::string FormatLine(const WorkerLine& line);  // without the newline
// INVALID_ARGUMENT for anything that FormatLine does not write.
absl::StatusOr<WorkerLine> ParseLine(std::string_view line);

}  // namespace larder::cli
