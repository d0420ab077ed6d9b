// Threads that share out loops, and wait between them.
//
// Thread safety: one thread at a time calls ParallelFor; f runs on all of them at once.
//
// 1. ParallelFor returns when every index has been run exactly once; what f wrote is then
//    visible to the caller.
// 2. The calling thread works too, as worker 0: a pool of one thread starts none.
// 3. Which worker runs which index is not fixed, so results must not depend on it.
// 4. Nothing is allocated per call.
// 5. Between loops a worker looks for the next one for about 50 us, then sleeps: a decode step has
//    several short loops a layer, and waking a thread on another CPU costs 35 to 40 us.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace larder::kernels {

class ThreadPool {
 public:
  // At least one thread; 0 means one for each CPU that this process may run on.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // f(int64_t index, int worker) for each index in [0, count). Workers count from 0 and are fewer
  // than threads(). f must not throw and not call ParallelFor.
  template <typename F>
  void ParallelFor(int64_t count, F&& f) {
    using Fn = std::remove_reference_t<F>;
    Run(
        count,
        [](const void* context, int64_t index, int worker) {
          (*static_cast<Fn*>(const_cast<void*>(context)))(index, worker);
        },
        std::addressof(f));
  }

 private:
  using Call = void (*)(const void* context, int64_t index, int worker);

  void Run(int64_t count, Call call, const void* context);
  void Work(int worker);
  bool Join();
  void Drain(int worker);

  const int threads_;

  // The loop under way. Written by the caller while the gate is shut and nobody inside.
  Call call_ = nullptr;
  const void* context_ = nullptr;
  int64_t count_ = 0;

  alignas(64) std::atomic<uint32_t> epoch_ = 0;  // loops begun; what workers wait for
  std::atomic<bool> stopping_ = false;
  // kOpen while the loop may be joined, plus the workers inside it. A worker that wakes too late
  // finds the gate shut, so that the caller never waits for a thread to wake up.
  static constexpr uint32_t kOpen = 1u << 31;
  alignas(64) std::atomic<uint32_t> gate_ = 0;
  alignas(64) std::atomic<int64_t> next_ = 0;  // first index that nobody has taken

  std::vector<std::thread> workers_;  // last: they use all of the above
};

}  // namespace larder::kernels
