// ReadFile: a file that a flag names, whole and bounded.
//
// Thread safety: a function.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace larder::cli {

// The bytes of `path`; "-" is stdin. INVALID_ARGUMENT names the flag, the path, and why it
// cannot be read, or that it has more than `bytes_max`.
absl::StatusOr<std::string> ReadFile(std::string_view flag, const std::string& path,
                                     uint64_t bytes_max);

}  // namespace larder::cli
