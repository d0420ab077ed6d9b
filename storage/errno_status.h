// Converts errno where it enters: UNAVAILABLE "what: text (errno n)".
#pragma once

#include <cstring>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace larder {

// "No space left on device (errno 28)".
inline std::string ErrnoText(int error) {
  char buffer[128];
  // The GNU variant, which returns the text.
  return absl::StrCat(::strerror_r(error, buffer, sizeof(buffer)), " (errno ", error, ")");
}

inline absl::Status ErrnoStatus(absl::string_view what, int error) {
  return absl::UnavailableError(absl::StrCat(what, ": ", ErrnoText(error)));
}

}  // namespace larder
