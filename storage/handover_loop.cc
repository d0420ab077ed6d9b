#include "storage/handover_loop.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "storage/check.h"
#include "storage/errno_status.h"

namespace larder {
namespace {

constexpr int kKindShift = 56;
constexpr uint32_t kWakeKind = 0xff;

static_assert(EPOLL_CTL_ADD == 1 && EPOLL_CTL_DEL == 2 && EPOLL_CTL_MOD == 3);

uint64_t Pack(EventLoop::Tag tag) { return uint64_t{tag.kind} << kKindShift | tag.id; }
EventLoop::Tag Unpack(uint64_t data) {
  return {static_cast<uint32_t>(data >> kKindShift), data & ((uint64_t{1} << kKindShift) - 1)};
}

}  // namespace

absl::Status EventLoop::Open() {
  epoll_ = UniqueFd(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_) return ErrnoStatus("hand-over: epoll_create1", errno);
  wake_ = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake_) return ErrnoStatus("hand-over: eventfd", errno);
  return Add(wake_.get(), EPOLLIN, {kWakeKind, 0});
}

absl::Status EventLoop::Control(int operation, int fd, uint32_t events, Tag tag) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = Pack(tag);
  if (::epoll_ctl(epoll_.get(), operation, fd, &event) == 0) return absl::OkStatus();
  return ErrnoStatus("hand-over: epoll_ctl", errno);
}

void EventLoop::Stop() {
  const uint64_t one = 1;
  LARDER_CHECK(::write(wake_.get(), &one, sizeof(one)) == sizeof(one), "eventfd");
}

int EventLoop::TimeoutMs() const {
  if (timers_.empty()) return -1;
  const auto left = timers_.begin()->first - Clock::now();
  // Rounded up, so that a timer is due when the wait ends.
  const auto ms = std::chrono::ceil<std::chrono::milliseconds>(left).count();
  return static_cast<int>(std::clamp<int64_t>(ms, 0, 60'000));
}

void EventLoop::FireTimers(const TimerFn& on_timer) {
  const Clock::time_point now = Clock::now();
  while (!timers_.empty() && timers_.begin()->first <= now) {
    const Tag tag = timers_.begin()->second;
    timers_.erase(timers_.begin());
    on_timer(tag);
  }
}

void EventLoop::Run(const EventFn& on_event, const TimerFn& on_timer) {
  std::array<epoll_event, 64> events;
  while (true) {
    const int count =
        ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), TimeoutMs());
    LARDER_CHECK(count >= 0 || errno == EINTR, "epoll_wait");
    for (int i = 0; i < count; ++i) {
      const Tag tag = Unpack(events[i].data.u64);
      if (tag.kind == kWakeKind) return;
      on_event(tag, events[i].events);
    }
    FireTimers(on_timer);
  }
}

}  // namespace larder
