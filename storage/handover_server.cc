#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "storage/errno_status.h"
#include "storage/handover.h"
#include "storage/handover_holders.h"
#include "storage/handover_loop.h"
#include "storage/handover_socket.h"

namespace larder {
namespace {

static_assert(std::endian::native == std::endian::little, "the wire structs are little-endian");

enum Kind : uint32_t { kListener = 0, kConnection = 1, kProcess = 2 };

// How long the listener rests when no descriptor is left to accept with.
constexpr absl::Duration kAcceptPause = absl::Milliseconds(100);
constexpr int kAcceptsAtOnce = 64;

bool Readable(int fd) {
  pollfd p{fd, POLLIN, 0};
  return ::poll(&p, 1, 0) == 1;
}

// Identity of a socket file, to remove no other daemon's.
struct FileId {
  dev_t device = 0;
  ino_t inode = 0;
  friend bool operator==(const FileId&, const FileId&) = default;
};
FileId IdOf(const std::string& path) {
  struct stat info;
  if (path[0] == '@' || ::lstat(path.c_str(), &info) != 0) return {};
  return {info.st_dev, info.st_ino};
}

}  // namespace

// Everything but holders_ belongs to the thread, once it runs.
class HandoverServer::Impl {
 public:
  Impl(Options options, AuthorizeFn authorize, GoneFn gone)
      : options_(std::move(options)), authorize_(std::move(authorize)), gone_(std::move(gone)) {}

  ~Impl() {
    if (!thread_.joinable()) return;
    loop_.Stop();
    thread_.join();
    if (file_id_.inode != 0 && IdOf(options_.socket_path) == file_id_) {
      ::unlink(options_.socket_path.c_str());
    }
  }

  absl::Status Start();
  std::optional<Peer> PeerOf(uint64_t session) { return holders_.PeerOf(session); }
  bool AnyHolder() const { return holders_.Any(); }

 private:
  struct Connection {
    UniqueFd fd;
    bool open = false;  // answered; false: the request is being read
    size_t received = 0;
    wire::HandoverRequest request;
    EventLoop::Timer timeout;
    uint64_t foreign = 0;  // the process that this connection stands in for, or 0
  };
  struct Process {
    int64_t pid = 0;
    UniqueFd pidfd;
    absl::flat_hash_set<uint64_t> sessions;
  };

  void OnEvent(EventLoop::Tag tag, uint32_t events);
  void OnTimer(EventLoop::Tag tag);
  void Accept();
  void Admit(UniqueFd fd);
  void ReadRequest(uint64_t id, Connection& connection);
  void Serve(uint64_t id, Connection& connection);
  uint64_t FindOrAddProcess(PeerProcess peer);
  bool Hold(uint64_t process_id, uint64_t session);
  void Let(uint64_t process_id, uint64_t session);
  bool SendArenas(const Connection& connection);
  void SendStatus(int fd, wire::HandoverStatus status);
  void Close(uint64_t id);
  void ProcessGone(uint64_t id);

  const Options options_;
  const AuthorizeFn authorize_;
  const GoneFn gone_;

  SessionHolders holders_;  // thread-safe
  EventLoop loop_;
  UniqueFd listener_;
  FileId file_id_;
  uint64_t next_id_ = 1;
  absl::flat_hash_map<uint64_t, Connection> connections_;
  absl::flat_hash_map<uint64_t, Process> processes_;
  absl::flat_hash_map<int64_t, uint64_t> process_by_pid_;  // those with a pidfd and a pid
  std::thread thread_;
};

absl::Status HandoverServer::Impl::Start() {
  if (options_.arenas.size() > wire::kHandoverArenasMax) {
    return absl::InvalidArgumentError(absl::StrCat("hand-over: ", options_.arenas.size(),
                                                   " arenas, must be at most ",
                                                   wire::kHandoverArenasMax));
  }
  if (absl::Status status = loop_.Open(); !status.ok()) return status;
  auto listener = ListenAt(options_.socket_path, options_.mode, options_.connections_max);
  if (!listener.ok()) return listener.status();
  listener_ = *std::move(listener);
  file_id_ = IdOf(options_.socket_path);
  if (auto status = loop_.Add(listener_.get(), EPOLLIN, {kListener, 0}); !status.ok()) {
    return status;
  }
  thread_ = std::thread([this] {
    loop_.Run([this](EventLoop::Tag tag, uint32_t events) { OnEvent(tag, events); },
              [this](EventLoop::Tag tag) { OnTimer(tag); });
  });
  return absl::OkStatus();
}

void HandoverServer::Impl::OnEvent(EventLoop::Tag tag, uint32_t events) {
  if (tag.kind == kListener) return Accept();
  if (tag.kind == kProcess) return ProcessGone(tag.id);
  const auto it = connections_.find(tag.id);
  if (it == connections_.end()) return;
  if (it->second.open) {
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) Close(tag.id);
  } else {
    ReadRequest(tag.id, it->second);
  }
}

void HandoverServer::Impl::OnTimer(EventLoop::Tag tag) {
  if (tag.kind == kListener) {
    // Failing again, it would rest for ever; a failed Add is tried again later.
    if (!loop_.Add(listener_.get(), EPOLLIN, {kListener, 0}).ok()) loop_.After(kAcceptPause, tag);
    return;
  }
  if (tag.kind == kProcess) return ProcessGone(tag.id);
  const auto it = connections_.find(tag.id);
  if (it == connections_.end()) return;
  it->second.timeout = loop_.NoTimer();  // it has fired
  SendStatus(it->second.fd.get(), wire::kHandoverBadRequest);
  Close(tag.id);
}

void HandoverServer::Impl::Accept() {
  for (int i = 0; i < kAcceptsAtOnce; ++i) {
    UniqueFd fd(::accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (fd) {
      Admit(std::move(fd));
    } else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
      loop_.Remove(listener_.get());
      loop_.After(kAcceptPause, {kListener, 0});
      return;
    } else if (errno != EINTR && errno != ECONNABORTED) {
      return;
    }
  }
}

void HandoverServer::Impl::Admit(UniqueFd fd) {
  if (connections_.size() >= static_cast<size_t>(options_.connections_max)) {
    return SendStatus(fd.get(), wire::kHandoverBusy);
  }
  const uint64_t id = next_id_++;
  if (!loop_.Add(fd.get(), EPOLLIN, {kConnection, id}).ok()) {
    return SendStatus(fd.get(), wire::kHandoverBusy);
  }
  Connection& connection = connections_[id];
  connection.fd = std::move(fd);
  connection.timeout = loop_.After(options_.request_timeout, {kConnection, id});
}

void HandoverServer::Impl::ReadRequest(uint64_t id, Connection& connection) {
  char* const to = reinterpret_cast<char*>(&connection.request);
  const ssize_t n = ::recv(connection.fd.get(), to + connection.received,
                           sizeof(connection.request) - connection.received, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n > 0) {
    connection.received += static_cast<size_t>(n);
    if (connection.received < sizeof(connection.request)) return;
    return Serve(id, connection);
  }
  SendStatus(connection.fd.get(), wire::kHandoverBadRequest);
  Close(id);
}

// One whole request. Every way out but the last answers with an error and closes.
void HandoverServer::Impl::Serve(uint64_t id, Connection& connection) {
  const auto refuse = [&](wire::HandoverStatus status) {
    SendStatus(connection.fd.get(), status);
    Close(id);
  };
  const uint64_t session = connection.request.session_id;
  if (connection.request.magic != wire::kHandoverMagic) return refuse(wire::kHandoverBadRequest);
  if (connection.request.boot_id != options_.boot_id) return refuse(wire::kHandoverUnknownSession);
  auto peer = options_.probe(connection.fd.get());
  if (!peer.ok()) return refuse(wire::kHandoverBusy);
  const bool foreign = !peer->pidfd;
  const uint64_t process_id = FindOrAddProcess(*std::move(peer));
  if (process_id == 0) return refuse(wire::kHandoverBusy);
  // Noted first, asked then: invariant 1.
  const bool is_new = Hold(process_id, session);
  if (!authorize_(session)) {
    if (is_new) Let(process_id, session);
    return refuse(wire::kHandoverUnknownSession);
  }
  holders_.Sent(session);
  if (foreign) connection.foreign = process_id;
  loop_.Cancel(std::exchange(connection.timeout, loop_.NoTimer()));
  connection.open = true;
  // What the client says from here on stays in its socket buffer; only its end is of interest.
  const bool watched = loop_.Change(connection.fd.get(), EPOLLRDHUP, {kConnection, id}).ok();
  if (!watched || !SendArenas(connection)) Close(id);
}

// The id of the process, watched from now on; 0 when it cannot be watched.
uint64_t HandoverServer::Impl::FindOrAddProcess(PeerProcess peer) {
  const bool shareable = peer.pidfd && peer.pid > 0;
  if (shareable) {
    const auto known = process_by_pid_.find(peer.pid);
    // A pid has a new owner only when the old one is gone.
    if (known != process_by_pid_.end() && !Readable(processes_[known->second].pidfd.get())) {
      return known->second;
    }
  }
  const uint64_t id = next_id_++;
  if (peer.pidfd && !loop_.Add(peer.pidfd.get(), EPOLLIN, {kProcess, id}).ok()) return 0;
  if (shareable) process_by_pid_[peer.pid] = id;
  Process& process = processes_[id];
  process.pid = peer.pid;
  process.pidfd = std::move(peer.pidfd);
  return id;
}

// False: this process holds the session's arenas already.
bool HandoverServer::Impl::Hold(uint64_t process_id, uint64_t session) {
  Process& process = processes_[process_id];
  if (!process.sessions.insert(session).second) return false;
  holders_.Note(session, {process.pid, !process.pidfd});
  return true;
}

void HandoverServer::Impl::Let(uint64_t process_id, uint64_t session) {
  Process& process = processes_[process_id];
  process.sessions.erase(session);
  const bool owed = holders_.Drop(session);
  if (process.sessions.empty()) ProcessGone(process_id);
  if (owed) gone_(session);
}

bool HandoverServer::Impl::SendArenas(const Connection& connection) {
  wire::HandoverReply reply;
  std::vector<int> fds;
  for (const ArenaExport& arena : options_.arenas) {
    reply.arenas[reply.arena_count++] = arena.description;
    if (arena.description.kind == wire::kMemfd) fds.push_back(arena.fd);
  }
  iovec part{&reply, sizeof(reply)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * wire::kHandoverArenasMax)] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
    std::memcpy(CMSG_DATA(header), fds.data(), sizeof(int) * fds.size());
  }
  // The first bytes on this socket: they fit its buffer or the peer is gone.
  return ::sendmsg(connection.fd.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof(reply);
}

void HandoverServer::Impl::SendStatus(int fd, wire::HandoverStatus status) {
  wire::HandoverReply reply;
  reply.status = status;
  // A courtesy: whether it arrives changes nothing here.
  (void)::send(fd, &reply, sizeof(reply), MSG_NOSIGNAL | MSG_DONTWAIT);
}

void HandoverServer::Impl::Close(uint64_t id) {
  const auto it = connections_.find(id);
  if (it == connections_.end()) return;
  loop_.Cancel(it->second.timeout);
  const uint64_t foreign = it->second.foreign;
  connections_.erase(it);
  if (foreign != 0) loop_.After(options_.foreign_grace, {kProcess, foreign});
}

// Also for a process that turned out to hold nothing.
void HandoverServer::Impl::ProcessGone(uint64_t id) {
  const auto it = processes_.find(id);
  if (it == processes_.end()) return;
  const Process process = std::move(it->second);
  processes_.erase(it);
  const auto by_pid = process_by_pid_.find(process.pid);
  if (by_pid != process_by_pid_.end() && by_pid->second == id) process_by_pid_.erase(by_pid);
  for (const uint64_t session : process.sessions) {
    if (holders_.Drop(session)) gone_(session);
  }
}

HandoverServer::HandoverServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HandoverServer::~HandoverServer() = default;

absl::StatusOr<std::unique_ptr<HandoverServer>> HandoverServer::Start(Options options,
                                                                      AuthorizeFn authorize,
                                                                      GoneFn gone) {
  auto impl = std::make_unique<Impl>(std::move(options), std::move(authorize), std::move(gone));
  if (absl::Status status = impl->Start(); !status.ok()) return status;
  return std::unique_ptr<HandoverServer>(new HandoverServer(std::move(impl)));
}

bool HandoverServer::AnyHolder() const { return impl_->AnyHolder(); }

std::optional<HandoverServer::Peer> HandoverServer::PeerOf(uint64_t session_id) const {
  return impl_->PeerOf(session_id);
}

}  // namespace larder
