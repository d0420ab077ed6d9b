// SessionHolders: which sessions' arenas are held by some process. The part of the hand-over
// server that others may ask.
//
// Thread safety: thread-safe. Note, Sent and Drop are called by the server's thread only.
//
// Invariant: Drop returns true at most once a session, and exactly for those that were sent
// the arenas or that PeerOf named meanwhile.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "storage/handover.h"

namespace larder {

class SessionHolders {
 public:
  // One more process is about to hold the arenas of this session.
  void Note(uint64_t session, HandoverServer::Peer peer) {
    absl::MutexLock lock(&mu_);
    Entry& entry = sessions_[session];
    if (entry.holders++ == 0) entry.peer = peer;
  }

  // The arenas are being sent.
  void Sent(uint64_t session) {
    absl::MutexLock lock(&mu_);
    sessions_[session].promised = true;
  }

  // One process less. True: it was the last one and GoneFn is owed.
  bool Drop(uint64_t session) {
    absl::MutexLock lock(&mu_);
    const auto it = sessions_.find(session);
    if (it == sessions_.end() || --it->second.holders > 0) return false;
    const bool owed = it->second.promised;
    sessions_.erase(it);
    return owed;
  }

  bool Any() const {
    absl::MutexLock lock(&mu_);
    return !sessions_.empty();
  }

  // Naming a peer promises a GoneFn.
  std::optional<HandoverServer::Peer> PeerOf(uint64_t session) {
    absl::MutexLock lock(&mu_);
    const auto it = sessions_.find(session);
    if (it == sessions_.end()) return std::nullopt;
    it->second.promised = true;
    return it->second.peer;
  }

 private:
  struct Entry {
    HandoverServer::Peer peer;
    int holders = 0;
    bool promised = false;
  };

  mutable absl::Mutex mu_;
  absl::flat_hash_map<uint64_t, Entry> sessions_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder
