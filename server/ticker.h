// Ticker: calls a function now and then on a thread of its own.
//
// Thread safety: constructed and destroyed by one thread; the function runs on another.
//
// Invariants:
//   1. The function does not run after the destructor has returned.
#pragma once

#include <functional>
#include <thread>
#include <utility>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"

namespace larder {

class Ticker {
 public:
  Ticker(absl::Duration period, std::function<void()> tick)
      : thread_([this, period, tick = std::move(tick)] {
          while (!stop_.WaitForNotificationWithTimeout(period)) tick();
        }) {}
  ~Ticker() {
    stop_.Notify();
    thread_.join();
  }
  Ticker(const Ticker&) = delete;
  Ticker& operator=(const Ticker&) = delete;

 private:
  absl::Notification stop_;
  std::thread thread_;
};

}  // namespace larder
