#include "kernels/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace larder::kernels {
namespace {

constexpr std::chrono::microseconds kSpin{50};

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

int AllowedCpus() {
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());
}

// Returns when `epoch` is no longer `seen`: looks for kSpin, then sleeps.
void AwaitChange(const std::atomic<uint32_t>& epoch, uint32_t seen) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  while (epoch.load(std::memory_order_acquire) == seen) {
    for (int i = 0; i < 16; ++i) Pause();
    if (std::chrono::steady_clock::now() >= deadline) {
      epoch.wait(seen, std::memory_order_acquire);
    }
  }
}

}  // namespace

ThreadPool::ThreadPool(int threads) : threads_(std::max(threads > 0 ? threads : AllowedCpus(), 1)) {
  for (int worker = 1; worker < threads_; ++worker) {
    workers_.emplace_back([this, worker] { Work(worker); });
  }
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(int64_t count, Call call, const void* context) {
  if (count == 1 || threads_ == 1) {
    for (int64_t i = 0; i < count; ++i) call(context, i, 0);
    return;
  }
  if (count <= 0) return;
  call_ = call;
  context_ = context;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  gate_.store(kOpen, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  Drain(0);
  gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
  // Those inside run their last index. Yields now and then: they may need this CPU for it.
  for (int i = 1; gate_.load(std::memory_order_acquire) != 0; ++i) {
    if (i % 1024 == 0) std::this_thread::yield();
    Pause();
  }
}

void ThreadPool::Work(int worker) {
  uint32_t seen = 0;
  while (true) {
    AwaitChange(epoch_, seen);
    if (stopping_) return;
    seen = epoch_.load(std::memory_order_acquire);
    if (!Join()) continue;
    Drain(worker);
    gate_.fetch_sub(1, std::memory_order_release);
  }
}

bool ThreadPool::Join() {
  uint32_t gate = gate_.load(std::memory_order_relaxed);
  while ((gate & kOpen) != 0) {
    if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire)) return true;
  }
  return false;
}

void ThreadPool::Drain(int worker) {
  const int64_t count = count_;
  for (int64_t i = next_.fetch_add(1, std::memory_order_relaxed); i < count;
       i = next_.fetch_add(1, std::memory_order_relaxed)) {
    call_(context_, i, worker);
  }
}

}  // namespace larder::kernels
