#include <sys/socket.h>
#include <sys/time.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "storage/arena_cuda.h"
#include "storage/errno_status.h"
#include "storage/handover.h"
#include "storage/handover_socket.h"

namespace larder {
namespace {

struct Answer {
  wire::HandoverReply reply;
  std::vector<UniqueFd> fds;
};

absl::Status TimedOut(const std::string& path) {
  return absl::DeadlineExceededError(
      absl::StrCat("hand-over socket ", path, ": no answer in time"));
}

// Bounds the next call on this socket by what is left.
absl::Status Arm(int fd, int option, absl::Time deadline, const std::string& path) {
  const absl::Duration left = deadline - absl::Now();
  if (left <= absl::ZeroDuration()) return TimedOut(path);
  // A zero timeval would mean "for ever".
  const timeval value = absl::ToTimeval(std::max(left, absl::Milliseconds(1)));
  if (::setsockopt(fd, SOL_SOCKET, option, &value, sizeof(value)) != 0) {
    return ErrnoStatus("hand-over: SO_SNDTIMEO", errno);
  }
  return absl::OkStatus();
}

absl::Status CallFailed(const std::string& path, absl::string_view call) {
  if (errno == EAGAIN || errno == EINPROGRESS) return TimedOut(path);
  return ErrnoStatus(absl::StrCat("hand-over socket ", path, ": ", call), errno);
}

absl::StatusOr<UniqueFd> Connect(const std::string& path, absl::Time deadline) {
  auto address = MakeUnixAddress(path);
  if (!address.ok()) return address.status();
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!fd) return ErrnoStatus("hand-over: socket", errno);
  if (auto status = Arm(fd.get(), SO_SNDTIMEO, deadline, path); !status.ok()) return status;
  int result;
  do {
    result = ::connect(fd.get(), address->get(), address->length);
  } while (result != 0 && errno == EINTR);
  if (result != 0) return CallFailed(path, "connect");
  return fd;
}

// Appends the descriptors of one message.
void TakeFds(msghdr& message, std::vector<UniqueFd>& fds) {
  for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
      fds.emplace_back(fd);
    }
  }
}

absl::StatusOr<Answer> Receive(int fd, const std::string& path, absl::Time deadline) {
  Answer answer;
  auto* const to = reinterpret_cast<char*>(&answer.reply);
  size_t received = 0;
  while (received < sizeof(answer.reply)) {
    if (auto status = Arm(fd, SO_RCVTIMEO, deadline, path); !status.ok()) return status;
    iovec part{to + received, sizeof(answer.reply) - received};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * wire::kHandoverArenasMax)];
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    const ssize_t n = ::recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return CallFailed(path, "recvmsg");
    if (n == 0) {
      return absl::UnavailableError(
          absl::StrCat("hand-over socket ", path, ": closed before it answered"));
    }
    TakeFds(message, answer.fds);
    received += static_cast<size_t>(n);
  }
  return answer;
}

absl::Status StatusOfReply(const wire::HandoverReply& reply, uint64_t session_id) {
  if (reply.magic != wire::kHandoverMagic || reply.arena_count > wire::kHandoverArenasMax) {
    return absl::InternalError("hand-over: the answer is not a HandoverReply");
  }
  switch (reply.status) {
    case wire::kHandoverOk:
      return absl::OkStatus();
    case wire::kHandoverBadRequest:
      return absl::InvalidArgumentError("hand-over: the daemon calls this a bad request");
    case wire::kHandoverUnknownSession:
      return absl::NotFoundError(
          absl::StrCat("hand-over: session_id ", session_id, " is no live session of this boot"));
    case wire::kHandoverBusy:
      return absl::ResourceExhaustedError("hand-over: the daemon has too many connections");
    default:
      return absl::InternalError(absl::StrCat("hand-over: status is ", reply.status));
  }
}

// A device that is not here, or no driver: the session goes on without that arena, and `why` says
// so. A descriptor that cannot be mapped is a failure of the hand-over.
absl::Status MapOne(const wire::HandoverArena& description, uint64_t boot_id,
                    std::span<UniqueFd>& fds, std::unique_ptr<Arena>& arena, absl::Status& why) {
  if (description.kind == wire::kCudaIpc) {
    auto opened = CudaArena::Import(description, boot_id);
    why = opened.status();
    if (opened.ok()) arena = *std::move(opened);
    return absl::OkStatus();
  }
  if (description.kind != wire::kMemfd) {
    why = absl::UnimplementedError(
        absl::StrCat("hand-over: kind is ", description.kind, ", known are 0 and 1"));
    return absl::OkStatus();
  }
  if (fds.empty()) {
    return absl::InternalError("hand-over: descriptors and arenas do not match");
  }
  auto mapped = Arena::Map(fds.front().Release(), description.bytes);
  fds = fds.subspan(1);
  if (mapped.ok()) arena = *std::move(mapped);
  return mapped.status();
}

absl::StatusOr<HandoverArenas> MapAll(Answer answer, uint64_t boot_id, UniqueFd connection) {
  HandoverArenas out;
  std::span<UniqueFd> fds(answer.fds);
  for (uint32_t i = 0; i < answer.reply.arena_count; ++i) {
    const wire::HandoverArena& description = answer.reply.arenas[i];
    const uint32_t number = description.arena;
    if (number >= wire::kHandoverArenasMax) {
      return absl::InternalError(absl::StrCat("hand-over: arena is ", number, ", must be below ",
                                              wire::kHandoverArenasMax));
    }
    out.descriptions.push_back(description);
    if (out.arenas.size() <= number) {
      out.arenas.resize(number + 1);
      out.why.resize(number + 1);
    }
    if (out.arenas[number] != nullptr || !out.why[number].ok()) {
      return absl::InternalError(absl::StrCat("hand-over: arena ", number, " is there twice"));
    }
    absl::Status mapped = MapOne(description, boot_id, fds, out.arenas[number], out.why[number]);
    if (!mapped.ok()) return mapped;
  }
  out.connection = std::move(connection);
  return out;
}

}  // namespace

absl::StatusOr<HandoverArenas> ConnectHandover(const std::string& path, uint64_t boot_id,
                                               uint64_t session_id, absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  auto connection = Connect(path, deadline);
  if (!connection.ok()) return connection.status();
  const wire::HandoverRequest request{wire::kHandoverMagic, boot_id, session_id};
  // 24 bytes into an empty socket buffer are never cut. A daemon that is busy has answered
  // and closed already; then its answer tells more than this error.
  const ssize_t sent = ::send(connection->get(), &request, sizeof(request), MSG_NOSIGNAL);
  if (sent != sizeof(request) && errno != EPIPE && errno != ECONNRESET) {
    return CallFailed(path, "send");
  }
  auto answer = Receive(connection->get(), path, deadline);
  if (!answer.ok()) return answer.status();
  if (auto status = StatusOfReply(answer->reply, session_id); !status.ok()) return status;
  return MapAll(*std::move(answer), boot_id, *std::move(connection));
}

}  // namespace larder
