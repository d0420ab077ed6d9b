#include "client/read_file.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iostream>

#include "absl/strings/str_cat.h"

namespace larder::cli {
namespace {

constexpr uint64_t kChunkBytes = 1 << 20;

}  // namespace

absl::StatusOr<std::string> ReadFile(std::string_view flag, const std::string& path,
                                     uint64_t bytes_max) {
  const auto bad = [&](std::string_view why) {
    return absl::InvalidArgumentError(absl::StrCat(absl::string_view(flag.data(), flag.size()),
                                                   ": \"", path, "\"",
                                                   absl::string_view(why.data(), why.size())));
  };
  std::ifstream file;
  errno = 0;
  if (path != "-") file.open(path, std::ios::binary);
  if (!file) return bad(absl::StrCat(": ", std::strerror(errno)));
  std::istream& stream = path == "-" ? std::cin : file;
  std::string text;
  while (stream) {
    // By read, which reports what an iterator throws: a directory opens, and cannot be read.
    const uint64_t chunk = std::min(kChunkBytes, bytes_max + 1 - text.size());
    const size_t before = text.size();
    text.resize(before + chunk);
    stream.read(text.data() + before, static_cast<std::streamsize>(chunk));
    text.resize(before + static_cast<size_t>(stream.gcount()));
    if (text.size() > bytes_max) {
      return bad(absl::StrCat(" has more bytes than the ", bytes_max, " that are allowed"));
    }
  }
  if (stream.bad()) return bad(absl::StrCat(": ", std::strerror(errno)));
  return text;
}

}  // namespace larder::cli
