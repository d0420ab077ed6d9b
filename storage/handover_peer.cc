#include <sys/socket.h>
#include <sys/syscall.h>

#include <cerrno>

#include "storage/errno_status.h"
#include "storage/handover.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77  // Linux 6.5
#endif

namespace larder {
namespace {

// -1 with errno. Never a pid's later owner, and it sees through pid namespaces.
UniqueFd PeerPidfd(int socket) {
  int fd = -1;
  socklen_t length = sizeof(fd);
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &fd, &length) != 0) return UniqueFd();
  return UniqueFd(fd);
}

bool OutOfDescriptors(int error) { return error == EMFILE || error == ENFILE || error == ENOMEM; }

}  // namespace

absl::StatusOr<PeerProcess> ProbePeer(int socket) {
  struct ucred credentials {};
  socklen_t length = sizeof(credentials);
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) {
    return ErrnoStatus("hand-over: SO_PEERCRED", errno);
  }
  PeerProcess peer;
  peer.pid = credentials.pid;
  peer.pidfd = PeerPidfd(socket);
  if (peer.pidfd) return peer;
  // Any other answer comes from a kernel that knows the option: the process is gone.
  if (errno != ENOPROTOOPT) return ErrnoStatus("hand-over: SO_PEERPIDFD", errno);
  if (peer.pid == 0) return peer;
  peer.pidfd = UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, credentials.pid, 0)));
  if (!peer.pidfd && OutOfDescriptors(errno)) return ErrnoStatus("hand-over: pidfd_open", errno);
  return peer;
}

}  // namespace larder
