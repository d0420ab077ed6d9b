// EventLoop: epoll and timers under tags. What the hand-over server waits with.
//
// Thread safety: one thread runs it; Stop may be called from any.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "storage/unique_fd.h"

namespace larder {

class EventLoop {
 public:
  using Clock = std::chrono::steady_clock;
  // What woke: the owner's kind and id. Ids are never used again, so an event that comes
  // late finds nobody.
  struct Tag {
    uint32_t kind = 0;
    uint64_t id = 0;  // below 2^56
  };
  using Timers = std::multimap<Clock::time_point, Tag>;
  using Timer = Timers::iterator;
  using EventFn = std::function<void(Tag, uint32_t events)>;
  using TimerFn = std::function<void(Tag)>;

  absl::Status Open();

  // Until Stop. Functions may add, change and remove what they like.
  void Run(const EventFn& on_event, const TimerFn& on_timer);
  void Stop();

  absl::Status Add(int fd, uint32_t events, Tag tag) { return Control(1, fd, events, tag); }
  absl::Status Change(int fd, uint32_t events, Tag tag) { return Control(3, fd, events, tag); }
  void Remove(int fd) { (void)Control(2, fd, 0, {}); }

  Timer After(absl::Duration delay, Tag tag) {
    return timers_.emplace(Clock::now() + absl::ToChronoNanoseconds(delay), tag);
  }
  Timer NoTimer() { return timers_.end(); }
  // Ends a timer that has not fired; NoTimer() is ignored.
  void Cancel(Timer timer) {
    if (timer != timers_.end()) timers_.erase(timer);
  }

 private:
  absl::Status Control(int operation, int fd, uint32_t events, Tag tag);
  int TimeoutMs() const;
  void FireTimers(const TimerFn& on_timer);

  UniqueFd epoll_;
  UniqueFd wake_;
  Timers timers_;
};

}  // namespace larder
