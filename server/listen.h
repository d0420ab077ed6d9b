// Where larderd listens: addresses, and the files of unix sockets.
//
// Thread safety: free functions; UnixSocketFile belongs to one thread.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace larder {

struct ListenAddress {
  enum class Kind { kUnix, kUnixAbstract, kTcp };
  Kind kind = Kind::kUnix;
  std::string name;  // path, abstract name, or host
  int port = 0;      // TCP; 0: any free one
  bool loopback = false;
};

// INVALID_ARGUMENT says what is allowed.
absl::StatusOr<ListenAddress> ParseListenAddress(std::string_view text);

// Makes way for a socket at `path`: removes the file of a daemon that is dead.
// FAILED_PRECONDITION: somebody listens there, the file is no socket, or its folder is missing
// or not writable.
absl::Status PrepareSocketFile(const std::string& path);

}  // namespace larder
