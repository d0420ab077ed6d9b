// Flags: those that several subcommands share, and strict parsers for their values.
//
// Thread safety: values.
//
// Invariants:
//   1. A value that is not allowed is refused with the key, the value and what is allowed.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "larder/v1/types.pb.h"

namespace CLI {  // its own header takes longer to compile than all of ours
class App;
class Option;
}  // namespace CLI

namespace larder::cli {

inline constexpr size_t kTokensMax = 1'048'576;  // of one prompt; the daemon's bound

// Numbers, sizes and durations as options; their errors are CLI::ValidationError.
CLI::Option* AddNumber(CLI::App& app, const std::string& name, uint64_t& value, uint64_t min,
                       uint64_t max, const std::string& help);
CLI::Option* AddReal(CLI::App& app, const std::string& name, double& value, double min, double max,
                     const std::string& help);
// Bytes as storage/units.h reads them, at least `min`.
CLI::Option* AddBytes(CLI::App& app, const std::string& name, uint64_t& value, uint64_t min,
                      const std::string& help);
CLI::Option* AddDuration(CLI::App& app, const std::string& name, absl::Duration& value,
                         const std::string& help);
CLI::Option* AddId(CLI::App& app, const std::string& name, uint64_t& value,
                   const std::string& help);
CLI::Option* AddDType(CLI::App& app, const std::string& name, v1::DType& value,
                      const std::string& help);
// gpu or host, and with `nvme` also nvme.
CLI::Option* AddTier(CLI::App& app, const std::string& name, v1::Tier& value, bool nvme,
                     const std::string& help);

// A whole number of digits only, from `min` to `max`.
absl::StatusOr<uint64_t> ParseNumber(std::string_view text, uint64_t min, uint64_t max);
// A decimal number from `min` to `max`.
absl::StatusOr<double> ParseReal(std::string_view text, double min, double max);
// "250ms", "5s", "1m30s", or a bare number of seconds; more than 0, at most 24h.
absl::StatusOr<absl::Duration> ParseDuration(std::string_view text);
absl::StatusOr<uint64_t> ParseId(std::string_view text);  // 1 to 16 hex digits

// Token ids separated by commas, spaces or line ends. `source` is for messages: a flag, or a
// file's name, to which the line is added.
absl::StatusOr<std::vector<uint32_t>> ParseTokens(std::string_view text, std::string_view source,
                                                  bool lines);

}  // namespace larder::cli
