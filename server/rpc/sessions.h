// Sessions: which sessions there are, and when nobody can be reading their blocks any more.
//
//                 stream ends            no process has the arenas, or it is gone
//   LIVE ------------------------> LOST ------------------------------------> ended
//     |                                                                         ^
//     +---- the process that has the arenas is gone ----------------------------+
//
// What the daemon itself reads or writes (Download, whose bytes gRPC may send after the client
// is gone; Put with data; Prefetch of a prefix) it holds in a session of its own, which has no
// stream and lives as long as its hold. Its id is random and told to nobody, so that no client
// can let go of what the daemon is reading.
//
// Thread safety: thread-safe. Cache, SessionStream and PeerFn are called without a lock held.
//
// Invariants:
//   1. Cache::EndSession is called once for a session, after Cache::LoseSession, and when no
//      process can be reading its blocks.
//   2. Once draining, no worker's session is opened.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/cache/cache.h"

namespace larder {

// The stream of a worker.
class SessionStream {
 public:
  virtual ~SessionStream() = default;
  // Tells the worker that the daemon stops after this time.
  virtual void SendDraining(absl::Duration grace) = 0;
  // Ends the stream with this error.
  virtual void Close(const absl::Status& why) = 0;
};

class Sessions {
 public:
  // The process that was given the arenas. nullopt: none was.
  struct Peer {
    int64_t pid = 0;  // 0: not visible from here
    bool foreign = false;
  };
  using PeerFn = std::function<std::optional<Peer>(SessionId)>;

  // Move-only: a session of the daemon's own, which ends with it.
  class Hold {
   public:
    Hold(Sessions& sessions, SessionId session) : sessions_(&sessions), session_(session) {}
    Hold(Hold&& other) noexcept
        : sessions_(std::exchange(other.sessions_, nullptr)), session_(other.session_) {}
    Hold& operator=(Hold&&) = delete;
    ~Hold() {
      if (sessions_ != nullptr) sessions_->EndHold(session_);
    }
    SessionId session() const { return session_; }

   private:
    Sessions* sessions_;
    SessionId session_;
  };

  Sessions(Cache& cache, PeerFn peer_of) : cache_(cache), peer_of_(std::move(peer_of)) {}
  Sessions(const Sessions&) = delete;
  Sessions& operator=(const Sessions&) = delete;

  // UNAVAILABLE while draining: says what may not start any more.
  absl::Status CheckAdmits() const;

  absl::StatusOr<SessionId> Open(std::string worker, std::weak_ptr<SessionStream> stream);
  // Also while draining: what a worker has begun goes on.
  absl::StatusOr<Hold> OpenHold();

  void StreamEnded(SessionId session);
  void ProcessGone(SessionId session);

  // True while the stream is open and the process is not known to be gone: addresses may be
  // given to it.
  bool IsLive(SessionId session) const;
  std::optional<Peer> PeerOf(SessionId session) const { return peer_of_(session); }

  void Drain(absl::Duration grace);
  bool draining() const { return draining_.load(std::memory_order_acquire); }
  // False: the deadline passed before the last stream ended.
  bool AwaitNoStreams(absl::Time deadline);
  // False: the deadline passed before the last hold was let go.
  bool AwaitNoHolds(absl::Time deadline);
  void CloseStreams(const absl::Status& why);

 private:
  struct Entry {
    std::weak_ptr<SessionStream> stream;
    bool live = false;         // has a stream, and it is open
    bool unreachable = false;  // no process has the arenas or will get them
  };

  void EndHold(SessionId session);
  // Forgets the session and ends it in the cache if its time has come.
  void EndIfUnused(SessionId session);
  std::vector<std::shared_ptr<SessionStream>> OpenStreams() const;
  bool NoStreams() const ABSL_SHARED_LOCKS_REQUIRED(mu_) { return streams_ == 0; }
  bool NoHolds() const ABSL_SHARED_LOCKS_REQUIRED(mu_) { return holds_ == 0; }

  Cache& cache_;
  const PeerFn peer_of_;
  std::atomic<bool> draining_ = false;  // set under mu_, so that Open and Drain have an order

  mutable absl::Mutex mu_;
  int streams_ ABSL_GUARDED_BY(mu_) = 0;
  int holds_ ABSL_GUARDED_BY(mu_) = 0;
  absl::flat_hash_map<SessionId, Entry> entries_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder
