#include <sys/socket.h>
#include <sys/time.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
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

absl::StatusOr<std::unique_ptr<Arena>> MapNext(std::span<UniqueFd>& fds, uint64_t bytes) {
  if (fds.empty()) {
    return absl::InternalError("hand-over: descriptors and arenas do not match");
  }
  UniqueFd& fd = fds.front();
  fds = fds.subspan(1);
  return Arena::Map(fd.Release(), bytes);
}

absl::StatusOr<HandoverArenas> MapAll(Answer answer, UniqueFd connection) {
  HandoverArenas out;
  std::span<UniqueFd> fds(answer.fds);
  for (uint32_t i = 0; i < answer.reply.arena_count; ++i) {
    const wire::HandoverArena& description = answer.reply.arenas[i];
    const uint32_t number = description.arena;
    if (number >= wire::kHandoverArenasMax) {
      return absl::InternalError(absl::StrCat("hand-over: arena is ", number, ", must be below ",
                                              wire::kHandoverArenasMax));
    }
    const bool twice = std::any_of(out.descriptions.begin(), out.descriptions.end(),
                                   [&](const auto& other) { return other.arena == number; });
    if (twice) {
      return absl::InternalError(absl::StrCat("hand-over: arena ", number, " is there twice"));
    }
    out.descriptions.push_back(description);
    if (out.arenas.size() <= number) out.arenas.resize(number + 1);
    if (description.kind != wire::kMemfd) continue;  // has no descriptor
    auto mapped = MapNext(fds, description.bytes);
    if (!mapped.ok()) return mapped.status();
    out.arenas[number] = *std::move(mapped);
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
  return MapAll(*std::move(answer), *std::move(connection));
}

}  // namespace larder
