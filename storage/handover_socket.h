// Addresses and listening sockets of the hand-over: unix stream sockets by path, or in the
// abstract namespace when the path starts with '@'.
//
// Thread safety: pure functions.
#pragma once

#include <sys/socket.h>
#include <sys/types.h>
#include <sys/un.h>

#include <string>

#include "absl/status/statusor.h"
#include "storage/unique_fd.h"

namespace larder {

struct UnixAddress {
  sockaddr_un address{};
  socklen_t length = 0;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address); }
};

// INVALID_ARGUMENT: empty, or longer than sockaddr_un holds.
absl::StatusOr<UnixAddress> MakeUnixAddress(const std::string& path);

// A listening, non-blocking, close-on-exec socket at `path` with this mode. A socket file
// that nobody listens on is replaced. FAILED_PRECONDITION when somebody does, or when the
// path is no socket.
absl::StatusOr<UniqueFd> ListenAt(const std::string& path, mode_t mode, int backlog);

}  // namespace larder
