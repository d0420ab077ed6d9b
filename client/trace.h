// Traces: streams of requests to replay. One JSON object a line:
//   {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [..]}
// Each id names one block and everything before it, so two requests share a prefix exactly
// as far as their ids agree. Blank lines are skipped; other keys are ignored.
//
// Thread safety: values and free functions.
//
// Invariants:
//   1. Equal ids expand to equal tokens; different ids differ in their first token.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace larder {
inline namespace client {

struct TraceRequest {
  uint64_t index = 0;  // in the file, counted from 0, blank lines left out
  int64_t timestamp_ms = 0;
  uint32_t input_tokens = 0;   // 0 where the line does not say
  uint32_t output_tokens = 0;  // 0 where the line does not say
  std::vector<uint32_t> block_ids;

  friend bool operator==(const TraceRequest&, const TraceRequest&) = default;
};

struct TraceSelection {
  uint64_t skip = 0;  // leading requests left out
  uint64_t limit = std::numeric_limits<uint64_t>::max();
};

inline constexpr uint32_t kTraceBlocksMax = 65'536;  // ids in one request
inline constexpr uint64_t kTraceLineBytesMax = 4 << 20;

// One line. INVALID_ARGUMENT says what is wrong with it, without naming the line.
absl::StatusOr<TraceRequest> ParseTraceLine(std::string_view line);

// The selected requests of a file. NOT_FOUND or PERMISSION_DENIED when it cannot be opened;
// INVALID_ARGUMENT as "FILE:LINE: problem" for the first bad line up to the last one wanted.
absl::StatusOr<std::vector<TraceRequest>> ReadTrace(const std::string& path,
                                                    const TraceSelection& selection = {});

// Appends the `block_tokens` (at least 1) token ids that stand for one block id.
void AppendBlockTokens(uint32_t block_id, uint32_t block_tokens, std::vector<uint32_t>& tokens);

// All tokens of a request: block_ids.size() * block_tokens of them.
std::vector<uint32_t> ExpandTokens(std::span<const uint32_t> block_ids, uint32_t block_tokens);

}  // namespace client
}  // namespace larder
