#include "server/rpc/sessions.h"

#include <random>
#include <utility>

#include "absl/strings/str_cat.h"

namespace larder {

absl::Status Sessions::CheckAdmits() const {
  if (!draining()) return absl::OkStatus();
  return absl::UnavailableError("draining: the daemon is about to stop and grants nothing new");
}

absl::StatusOr<SessionId> Sessions::Open(std::string worker, std::weak_ptr<SessionStream> stream) {
  if (absl::Status status = CheckAdmits(); !status.ok()) return status;
  absl::StatusOr<SessionId> session = cache_.OpenSession(std::move(worker));
  if (!session.ok()) return session;
  {
    absl::MutexLock lock(&mu_);
    if (!draining()) {
      entries_[*session] = Entry{.stream = std::move(stream), .live = true};
      ++streams_;
      return session;
    }
  }
  cache_.EndSession(*session);
  return CheckAdmits();
}

absl::StatusOr<Sessions::Hold> Sessions::OpenHold() {
  std::random_device random;
  const SessionId secret = uint64_t{random()} << 32 | random();
  const absl::StatusOr<SessionId> session = cache_.OpenSession("larderd", secret);
  if (!session.ok()) return session.status();
  absl::MutexLock lock(&mu_);
  ++holds_;
  return Hold(*this, *session);
}

void Sessions::EndHold(SessionId session) {
  cache_.EndSession(session);
  absl::MutexLock lock(&mu_);
  --holds_;  // last, so that who awaits this finds the cache already told
}

void Sessions::StreamEnded(SessionId session) {
  {
    absl::MutexLock lock(&mu_);
    const auto it = entries_.find(session);
    --streams_;
    if (it == entries_.end()) return;
    it->second.live = false;
  }
  cache_.LoseSession(session);
  // Addresses are refused from here on (IsLive), so nobody who has none can still get them.
  if (!peer_of_(session).has_value()) ProcessGone(session);
}

void Sessions::ProcessGone(SessionId session) {
  std::shared_ptr<SessionStream> stream;
  {
    absl::MutexLock lock(&mu_);
    const auto it = entries_.find(session);
    if (it == entries_.end()) return;
    it->second.unreachable = true;
    if (it->second.live) stream = it->second.stream.lock();
    it->second.live = false;
  }
  if (stream != nullptr) {
    stream->Close(absl::UnavailableError("the process that mapped the arenas is gone"));
  }
  EndIfUnused(session);
}

void Sessions::EndIfUnused(SessionId session) {
  {
    absl::MutexLock lock(&mu_);
    const auto it = entries_.find(session);
    if (it == entries_.end()) return;
    const Entry& entry = it->second;
    if (entry.live || !entry.unreachable) return;
    entries_.erase(it);
  }
  cache_.LoseSession(session);
  cache_.EndSession(session);
}

bool Sessions::IsLive(SessionId session) const {
  absl::ReaderMutexLock lock(&mu_);
  const auto it = entries_.find(session);
  return it != entries_.end() && it->second.live;
}

std::vector<std::shared_ptr<SessionStream>> Sessions::OpenStreams() const {
  std::vector<std::shared_ptr<SessionStream>> streams;
  absl::ReaderMutexLock lock(&mu_);
  for (const auto& [id, entry] : entries_) {
    if (!entry.live) continue;
    if (auto stream = entry.stream.lock()) streams.push_back(std::move(stream));
  }
  return streams;
}

void Sessions::Drain(absl::Duration grace) {
  {
    absl::MutexLock lock(&mu_);
    draining_.store(true, std::memory_order_release);
  }
  for (const auto& stream : OpenStreams()) stream->SendDraining(grace);
}

bool Sessions::AwaitNoStreams(absl::Time deadline) {
  absl::ReaderMutexLock lock(&mu_);
  return mu_.AwaitWithDeadline(absl::Condition(this, &Sessions::NoStreams), deadline);
}

bool Sessions::AwaitNoHolds(absl::Time deadline) {
  absl::ReaderMutexLock lock(&mu_);
  return mu_.AwaitWithDeadline(absl::Condition(this, &Sessions::NoHolds), deadline);
}

void Sessions::CloseStreams(const absl::Status& why) {
  for (const auto& stream : OpenStreams()) stream->Close(why);
}

}  // namespace larder
