#include "client/session_state.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"

namespace larder {
inline namespace client {
namespace {

// How long an answer that smells of a restart waits for the end of the stream, which
// travels on the connection that broke first and is therefore already under way.
constexpr absl::Duration kStreamEndGrace = absl::Milliseconds(200);
// A destructor must not hold up its thread for a whole call timeout.
constexpr absl::Duration kReleaseTimeoutMax = absl::Seconds(1);
// Releases under way before the next one waits for them.
constexpr size_t kReleasesMax = 64;

}  // namespace

SessionState::SessionState(std::shared_ptr<Rpc> rpc, std::string_view worker)
    : rpc_(std::move(rpc)) {
  v1::AttachRequest request;
  request.set_worker(std::string(worker));
  stream_ = rpc_->kv().Attach(&context_, request);
  reader_ = std::thread([this] { ReadEvents(); });
}

SessionState::~SessionState() {
  Close();
  absl::MutexLock lock(&releases_mutex_);
  AwaitReleasesLocked();  // of leases that outlived the Session
  releases_queue_.Shutdown();
  void* tag = nullptr;
  bool ok = false;
  while (releases_queue_.Next(&tag, &ok)) {
  }
}

absl::StatusOr<std::shared_ptr<SessionState>> SessionState::Open(std::shared_ptr<Rpc> rpc,
                                                                 std::string_view worker,
                                                                 const SessionOptions& options) {
  rpc->AwaitConnection();
  std::shared_ptr<SessionState> state(new SessionState(std::move(rpc), worker));
  if (absl::Status attached = state->WaitUntilAttached(); !attached.ok()) return attached;
  if (options.map_arenas) {
    if (absl::Status mapped = state->MapArenas(); !mapped.ok()) return state->Explain(mapped);
  }
  return state;
}

absl::Status SessionState::WaitUntilAttached() {
  if (!attached_.WaitForNotificationWithTimeout(rpc_->call_timeout())) {
    return absl::DeadlineExceededError(absl::StrCat("Attach at ", rpc_->address(),
                                                    " did not complete within ",
                                                    absl::FormatDuration(rpc_->call_timeout())));
  }
  return Health();
}

absl::Status SessionState::MapArenas() {
  absl::StatusOr<HandoverArenas> handover =
      ConnectHandover(handover_socket_, boot_id_, id_, rpc_->call_timeout());
  if (!handover.ok()) {
    return absl::Status(handover.status().code(), absl::StrCat("hand-over at ", handover_socket_,
                                                               ": ", handover.status().message()));
  }
  handover_ = *std::move(handover);
  auto devices = std::make_shared<DeviceArenas>(handover_.descriptions, boot_id_);
  has_device_arenas_ = !devices->empty();
  absl::MutexLock lock(&mutex_);
  if (health_.ok()) devices_ = std::move(devices);
  return absl::OkStatus();
}

std::span<std::byte> SessionState::ArenaBytes(uint32_t arena) const {
  if (arena >= handover_.arenas.size() || handover_.arenas[arena] == nullptr) return {};
  return handover_.arenas[arena]->host_bytes();
}

std::shared_ptr<DeviceArenas> SessionState::devices() const {
  absl::MutexLock lock(&mutex_);
  return devices_;
}

absl::StatusOr<DeviceArena> SessionState::DeviceArenaOf(uint32_t arena) const {
  const std::shared_ptr<DeviceArenas> open = devices();
  if (absl::Status health = Health(); !health.ok()) return health;
  if (open == nullptr) return absl::NotFoundError("this session was given no arenas");
  return open->Open(arena);
}

void SessionState::ReadEvents() {
  v1::AttachEvent event;
  while (stream_->Read(&event)) {
    if (event.has_attached() && !attached_.HasBeenNotified()) {
      id_ = event.attached().session_id();
      boot_id_ = event.attached().boot_id();
      handover_socket_ = event.attached().handover_socket();
      attached_.Notify();
    } else if (event.has_draining()) {
      draining_.store(true, std::memory_order_relaxed);
    }
  }
  const grpc::Status end = stream_->Finish();
  if (!attached_.HasBeenNotified()) {
    Lose(end.ok() ? absl::UnavailableError("Attach ended without a session")
                  : rpc_->ToStatus(end, "Attach", rpc_->call_timeout()));
    attached_.Notify();
    return;
  }
  Lose(absl::UnavailableError(
      absl::StrFormat("session %016x is lost: %s", id_,
                      end.ok() ? "the daemon ended it"
                               : absl::StrCat("its stream broke (", end.error_message(), ")"))));
}

void SessionState::Lose(absl::Status why) {
  std::shared_ptr<DeviceArenas> closed;  // last and without the lock; or later, with a lease
  {
    absl::MutexLock lock(&mutex_);
    health_ = std::move(why);
    closed = std::move(devices_);
  }
  lost_.Notify();
}

absl::Status SessionState::Health() const {
  absl::MutexLock lock(&mutex_);
  return health_;
}

absl::Status SessionState::Explain(const absl::Status& error) {
  const bool suspicious = absl::IsNotFound(error) || absl::IsPermissionDenied(error) ||
                          absl::IsUnavailable(error) || absl::IsFailedPrecondition(error) ||
                          absl::IsCancelled(error);
  if (!suspicious || !lost_.WaitForNotificationWithTimeout(kStreamEndGrace)) return error;
  return Health();
}

void SessionState::ReleaseSoon(const v1::ReleaseRequest& request) {
  if (!Health().ok()) return;
  absl::MutexLock lock(&releases_mutex_);
  if (releases_.size() == kReleasesMax) AwaitReleasesLocked();
  SentRelease& sent = *releases_.emplace_back(std::make_unique<SentRelease>());
  sent.context.set_deadline(
      absl::ToChronoTime(absl::Now() + std::min(rpc_->call_timeout(), kReleaseTimeoutMax)));
  sent.reader = rpc_->kv().AsyncRelease(&sent.context, request, &releases_queue_);
  sent.reader->Finish(&sent.response, &sent.status, &sent);
}

void SessionState::AwaitReleases() {
  absl::MutexLock lock(&releases_mutex_);
  AwaitReleasesLocked();
}

void SessionState::AwaitReleasesLocked() {
  void* tag = nullptr;
  bool ok = false;
  for (size_t i = 0; i < releases_.size(); ++i) releases_queue_.Next(&tag, &ok);
  releases_.clear();
}

void SessionState::Close() {
  if (!reader_.joinable()) return;
  AwaitReleases();  // once the stream has ended, they would come too late
  context_.TryCancel();
  reader_.join();
}

}  // namespace client
}  // namespace larder
