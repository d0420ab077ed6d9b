#include "storage/handover_socket.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "storage/errno_status.h"

namespace larder {
namespace {

absl::StatusOr<UniqueFd> NewSocket() {
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return ErrnoStatus("hand-over socket: socket", errno);
  return fd;
}

// Removes a socket file that nobody listens on; OK as well when there is none.
absl::Status RemoveStale(const std::string& path, const UnixAddress& address) {
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0) {
    if (errno == ENOENT) return absl::OkStatus();
    return ErrnoStatus(absl::StrCat("hand-over socket ", path), errno);
  }
  if (!S_ISSOCK(info.st_mode)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "hand-over socket ", path, ": something else than a socket is there; remove it"));
  }
  auto probe = NewSocket();
  if (!probe.ok()) return probe.status();
  // ECONNREFUSED is the one answer that proves that nobody listens.
  if (::connect(probe->get(), address.get(), address.length) == 0 || errno != ECONNREFUSED) {
    return absl::FailedPreconditionError(
        absl::StrCat("hand-over socket ", path, ": a live process listens there; stop it first"));
  }
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) {
    return ErrnoStatus(absl::StrCat("hand-over socket ", path, ": removing a stale one"), errno);
  }
  return absl::OkStatus();
}

absl::Status Bind(int fd, const std::string& path, const UnixAddress& address) {
  if (::bind(fd, address.get(), address.length) == 0) return absl::OkStatus();
  if (errno == EADDRINUSE) {
    return absl::FailedPreconditionError(
        absl::StrCat("hand-over socket ", path, ": a live process listens there; stop it first"));
  }
  return ErrnoStatus(absl::StrCat("hand-over socket ", path, ": bind"), errno);
}

absl::Status BindFile(int fd, const std::string& path, mode_t mode, const UnixAddress& address,
                      int backlog) {
  // Two daemons that start at once take turns from probing to listening, on the folder's lock.
  std::string folder = std::filesystem::path(path).parent_path().string();
  if (folder.empty()) folder.push_back('.');
  UniqueFd lock(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!lock || ::flock(lock.get(), LOCK_EX) != 0) {
    return ErrnoStatus(absl::StrCat("hand-over socket ", path, ": folder ", folder), errno);
  }
  if (absl::Status status = RemoveStale(path, address); !status.ok()) return status;
  // The file is never wider than `mode`: bind takes the socket's own mode, less the umask.
  if (::fchmod(fd, mode) != 0) return ErrnoStatus("hand-over socket: fchmod", errno);
  if (absl::Status status = Bind(fd, path, address); !status.ok()) return status;
  if (::chmod(path.c_str(), mode) != 0) {
    return ErrnoStatus(absl::StrCat("hand-over socket ", path, ": chmod"), errno);
  }
  if (::listen(fd, backlog) != 0) return ErrnoStatus("hand-over socket: listen", errno);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<UnixAddress> MakeUnixAddress(const std::string& path) {
  UnixAddress out;
  constexpr size_t kLengthMax = sizeof(out.address.sun_path) - 1;
  if (path.empty() || path.size() > kLengthMax || path == "@") {
    return absl::InvalidArgumentError(absl::StrCat("hand-over socket: path '", path, "' is ",
                                                   path.size(), " bytes, must be 1 to ",
                                                   kLengthMax));
  }
  out.address.sun_family = AF_UNIX;
  path.copy(out.address.sun_path, path.size());
  const bool abstract = path[0] == '@';
  if (abstract) out.address.sun_path[0] = '\0';
  // An abstract name ends with its length, a path with its zero byte.
  out.length =
      static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size() + (abstract ? 0 : 1));
  return out;
}

absl::StatusOr<UniqueFd> ListenAt(const std::string& path, mode_t mode, int backlog) {
  auto address = MakeUnixAddress(path);
  if (!address.ok()) return address.status();
  auto fd = NewSocket();
  if (!fd.ok()) return fd.status();
  absl::Status status;
  if (path[0] == '@') {
    status = Bind(fd->get(), path, *address);
    if (status.ok() && ::listen(fd->get(), backlog) != 0) {
      status = ErrnoStatus("hand-over socket: listen", errno);
    }
  } else {
    status = BindFile(fd->get(), path, mode, *address, backlog);
  }
  if (!status.ok()) return status;
  return fd;
}

}  // namespace larder
