// SessionState: what a Session and its leases share: the stream, the mappings, and whether
// both are still good. Internal to client/.
//
// Thread safety: thread-safe.
//
// Invariants:
//   1. Health goes from OK to an error once and stays there.
//   2. One thread reads the stream; it is joined by Close, which only ~Session calls.
//   3. The mappings live as long as this object; what is open of devices' memory until the session
//      is lost, and as long as one of its leases.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "client/rpc.h"
#include "client/session.h"
#include "storage/handover.h"

namespace larder {
inline namespace client {

class SessionState {
 public:
  // Attaches and maps. Errors are those of Attach, and those of the hand-over.
  static absl::StatusOr<std::shared_ptr<SessionState>> Open(std::shared_ptr<Rpc> rpc,
                                                            std::string_view worker,
                                                            const SessionOptions& options);
  ~SessionState();
  SessionState(const SessionState&) = delete;
  SessionState& operator=(const SessionState&) = delete;

  // Lets releases arrive, ends the stream and joins its reader. Idempotent; one caller.
  void Close();

  uint64_t id() const { return id_; }
  uint64_t boot_id() const { return boot_id_; }
  Group group() const { return {handover_socket_, boot_id_, id_}; }
  bool draining() const { return draining_.load(std::memory_order_relaxed); }
  absl::Status Health() const ABSL_LOCKS_EXCLUDED(mutex_);
  const Rpc& rpc() const { return *rpc_; }
  // Empty where it is not mapped, or is a device's memory.
  std::span<std::byte> ArenaBytes(uint32_t arena) const;
  absl::StatusOr<DeviceArena> DeviceArenaOf(uint32_t arena) const;
  bool HasDeviceArenas() const { return has_device_arenas_; }
  // For a lease to hold; null: the session is lost.
  std::shared_ptr<DeviceArenas> devices() const ABSL_LOCKS_EXCLUDED(mutex_);

  // A unary call of this session: not sent when the session is lost.
  template <typename Request, typename Response>
  absl::StatusOr<Response> Call(
      grpc::Status (v1::KvCache::Stub::*method)(grpc::ClientContext*, const Request&, Response*),
      const Request& request, std::string_view name, absl::Duration timeout) {
    AwaitReleases();
    if (absl::Status health = Health(); !health.ok()) return health;
    absl::StatusOr<Response> response = rpc_->Call(rpc_->kv(), method, request, name, timeout);
    if (response.ok()) return response;
    return Explain(response.status());
  }

  // Sends a Release whose answer nobody needs, and does not wait for it.
  void ReleaseSoon(const v1::ReleaseRequest& request) ABSL_LOCKS_EXCLUDED(releases_mutex_);
  // Returns when they have arrived, or after a second: what comes next may need their room.
  void AwaitReleases() ABSL_LOCKS_EXCLUDED(releases_mutex_);

  // A restarted daemon does not know this session (NOT_FOUND, or another session's
  // PERMISSION_DENIED): when the stream has ended too, says that instead.
  absl::Status Explain(const absl::Status& error);

 private:
  SessionState(std::shared_ptr<Rpc> rpc, std::string_view worker);

  absl::Status WaitUntilAttached();
  absl::Status MapArenas();
  void ReadEvents();
  void Lose(absl::Status why) ABSL_LOCKS_EXCLUDED(mutex_);
  void AwaitReleasesLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(releases_mutex_);

  // Constant once Open has returned.
  const std::shared_ptr<Rpc> rpc_;
  uint64_t id_ = 0;
  uint64_t boot_id_ = 0;
  std::string handover_socket_;
  HandoverArenas handover_;
  bool has_device_arenas_ = false;

  // Self-synchronised.
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<v1::AttachEvent>> stream_;
  absl::Notification attached_;  // or failed: see Health
  absl::Notification lost_;
  std::atomic<bool> draining_ = false;
  std::thread reader_;

  mutable absl::Mutex mutex_;
  absl::Status health_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<DeviceArenas> devices_ ABSL_GUARDED_BY(mutex_);  // null: lost, or not mapped yet

  struct SentRelease {
    grpc::ClientContext context;
    v1::ReleaseResponse response;
    grpc::Status status;
    std::unique_ptr<grpc::ClientAsyncResponseReader<v1::ReleaseResponse>> reader;
  };
  absl::Mutex releases_mutex_;
  grpc::CompletionQueue releases_queue_ ABSL_GUARDED_BY(releases_mutex_);
  std::vector<std::unique_ptr<SentRelease>> releases_ ABSL_GUARDED_BY(releases_mutex_);
};

}  // namespace client
}  // namespace larder
