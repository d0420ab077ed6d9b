#include "server/rpc/connections.h"

#include <dirent.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cstddef>
#include <cstdlib>
#include <memory>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace larder {
namespace {

std::string PortName(int port) { return absl::StrCat(":", port); }

// Where the connection was accepted, as RpcServer::Start has it; of TCP the port alone. Empty:
// not a connected socket, or the side that connected and has no name.
std::string AcceptedAt(int fd) {
  sockaddr_storage peer;
  socklen_t size = sizeof(peer);
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &size) != 0) return "";
  union {
    sockaddr any;
    sockaddr_un local;
    sockaddr_in v4;
    sockaddr_in6 v6;
  } name{};
  size = sizeof(name);
  if (::getsockname(fd, &name.any, &size) != 0) return "";
  if (name.any.sa_family == AF_INET) return PortName(ntohs(name.v4.sin_port));
  if (name.any.sa_family == AF_INET6) return PortName(ntohs(name.v6.sin6_port));
  if (name.any.sa_family != AF_UNIX || size <= offsetof(sockaddr_un, sun_path)) return "";
  const char* const path = name.local.sun_path;
  if (path[0] != '\0') return absl::StrCat("unix:", path);
  return absl::StrCat("unix-abstract:",
                      std::string(path + 1, size - offsetof(sockaddr_un, sun_path) - 1));
}

}  // namespace

int EndConnections(const std::vector<std::string>& addresses, const std::vector<int>& ports) {
  absl::flat_hash_set<std::string> names;
  for (size_t i = 0; i < addresses.size(); ++i) {
    const bool local = absl::StartsWith(addresses[i], "unix");
    names.insert(local ? addresses[i] : PortName(ports[i]));
  }
  const std::unique_ptr<DIR, int (*)(DIR*)> folder(::opendir("/proc/self/fd"), ::closedir);
  if (folder == nullptr) return 0;
  int ended = 0;
  while (const dirent* const entry = ::readdir(folder.get())) {
    const int fd = std::atoi(entry->d_name);  // of "." and "..": 0, which no name is accepted at
    if (names.contains(AcceptedAt(fd))) ended += ::shutdown(fd, SHUT_RDWR) == 0;
  }
  return ended;
}

}  // namespace larder
