// InThreads: a call for each of many items, by a few threads, in about their order.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <span>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

namespace larder::bench {

// One of the calls' errors, or OK.
inline absl::Status InThreads(int threads, std::span<const uint32_t> items,
                              const std::function<absl::Status(uint32_t)>& call) {
  std::atomic<size_t> next = 0;
  absl::Mutex mu;
  absl::Status result;
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t) {
    running.emplace_back([&] {
      for (size_t i = next++; i < items.size(); i = next++) {
        absl::Status status = call(items[i]);
        if (status.ok()) continue;
        const absl::MutexLock lock(&mu);
        result.Update(status);
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  return result;
}

}  // namespace larder::bench
