// TestMover: a Mover over plain memory that a test can stop, and make fail.
//
// Thread safety: thread-safe. Completions come on its own thread.
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <span>
#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "server/cache_link.h"
#include "storage/mover.h"

namespace larder {

class TestMover final : public Mover {
 public:
  // GPU, by rank, and HOST are given; NVME is a map of its own.
  TestMover(std::vector<std::span<std::byte>> gpus, std::span<std::byte> host, CacheLink& link);
  ~TestMover() override;

  absl::Status Submit(const MoveJob& job) override;
  void Raise(MoveId) override { ++raises_; }
  void Erase(Slot nvme_slot, uint32_t) override;

  // While paused, jobs are taken and not done.
  void Pause(bool paused);
  // From now on every job from this tier ends with this status; OK: as usual.
  void FailFrom(Tier tier, absl::Status status);
  // How often somebody began to wait for a move under way.
  uint64_t raises() const { return raises_; }
  // Waits until nothing is queued or running.
  void AwaitIdle();

 private:
  void Run();
  absl::Status Copy(const MoveJob& job) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool Wake() const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return stop_ || (!paused_ && !jobs_.empty());
  }
  bool Idle() const ABSL_SHARED_LOCKS_REQUIRED(mu_) { return jobs_.empty() && !running_; }

  const std::vector<std::span<std::byte>> gpus_;
  const std::span<std::byte> host_;
  CacheLink& link_;
  std::atomic<uint64_t> raises_ = 0;

  absl::Mutex mu_;
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  bool paused_ ABSL_GUARDED_BY(mu_) = false;
  bool running_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<MoveJob> jobs_ ABSL_GUARDED_BY(mu_);
  std::map<uint32_t, std::vector<std::byte>> nvme_ ABSL_GUARDED_BY(mu_);
  std::map<Tier, absl::Status> failures_ ABSL_GUARDED_BY(mu_);

  std::thread thread_;
};

}  // namespace larder
