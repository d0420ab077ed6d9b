#include "server/listen.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "storage/unique_fd.h"

namespace larder {
namespace {

constexpr size_t kUnixPathMax = sizeof(sockaddr_un{}.sun_path) - 1;

bool IsLoopback(const std::string& host) {
  if (host == "localhost") return true;
  in_addr v4{};
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return ntohl(v4.s_addr) >> 24 == 127;
  in6_addr v6{};
  return inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

absl::StatusOr<ListenAddress> ParseUnix(ListenAddress::Kind kind, absl::string_view name) {
  if (kind == ListenAddress::Kind::kUnix && (name.empty() || name[0] != '/')) {
    return absl::InvalidArgumentError("a unix socket needs an absolute path: unix:/path");
  }
  if (name.empty() || name.size() > kUnixPathMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("the name of a unix socket has 1 to ", kUnixPathMax, " bytes"));
  }
  // gRPC would listen at another name than the one that is looked at here.
  if (name.find('%') != absl::string_view::npos) {
    return absl::InvalidArgumentError("gRPC reads a % in the name of a unix socket as an escape");
  }
  ListenAddress address;
  address.kind = kind;
  address.name = std::string(name);
  return address;
}

// Nothing that gRPC or the metrics' server would read in another way, as they do a comma, a space
// before the port, or an IPv6 address without brackets, whose end they take for a part of it.
absl::StatusOr<ListenAddress> ParseTcp(absl::string_view text) {
  const size_t colon = text.rfind(':');
  absl::string_view host = text.substr(0, colon);
  const bool brackets = absl::ConsumePrefix(&host, "[") && absl::ConsumeSuffix(&host, "]");
  const bool whole =
      !host.empty() && host.find_first_of(brackets ? "[], " : "[],: ") == absl::string_view::npos;
  const absl::string_view port =
      colon == absl::string_view::npos ? absl::string_view() : text.substr(colon + 1);
  ListenAddress address;
  address.kind = ListenAddress::Kind::kTcp;
  if (!whole || port.find_first_not_of("0123456789") != absl::string_view::npos ||
      !absl::SimpleAtoi(port, &address.port) || address.port > 65535) {
    return absl::InvalidArgumentError(
        "allowed are unix:/path, unix-abstract:name and host:port with a port of 0 to 65535");
  }
  address.name = std::string(host);
  address.loopback = IsLoopback(address.name);
  return address;
}

// True when a process accepts connections at `path`.
bool SomebodyListens(const std::string& path) {
  const UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  const int result =
      ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address));
  return result == 0 || errno == EAGAIN || errno == EINPROGRESS;
}

}  // namespace

absl::StatusOr<ListenAddress> ParseListenAddress(std::string_view given) {
  absl::string_view text(given.data(), given.size());
  if (absl::ConsumePrefix(&text, "unix-abstract:")) {
    return ParseUnix(ListenAddress::Kind::kUnixAbstract, text);
  }
  if (absl::ConsumePrefix(&text, "unix:")) {
    absl::ConsumePrefix(&text, "//");
    return ParseUnix(ListenAddress::Kind::kUnix, text);
  }
  return ParseTcp(text);
}

absl::Status PrepareSocketFile(const std::string& path) {
  const std::string folder = path.substr(0, std::max<size_t>(1, path.rfind('/')));
  if (::access(folder.c_str(), W_OK | X_OK) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, ": the folder ", folder, ": ", std::strerror(errno)));
  }
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0) return absl::OkStatus();
  if (!S_ISSOCK(info.st_mode)) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": exists and is not a socket"));
  }
  if (SomebodyListens(path)) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, ": another process is listening there; stop it or choose another path"));
  }
  if (::unlink(path.c_str()) != 0) {
    return absl::FailedPreconditionError(absl::StrCat(path, ": ", std::strerror(errno)));
  }
  return absl::OkStatus();
}

}  // namespace larder
