#include "test_mover.h"

#include <cstring>
#include <utility>

namespace larder {

TestMover::TestMover(std::vector<std::span<std::byte>> gpus, std::span<std::byte> host,
                     CacheLink& link)
    : gpus_(std::move(gpus)), host_(host), link_(link), thread_([this] { Run(); }) {}

TestMover::~TestMover() {
  {
    absl::MutexLock lock(&mu_);
    stop_ = true;
  }
  thread_.join();
}

absl::Status TestMover::Submit(const MoveJob& job) {
  absl::MutexLock lock(&mu_);
  jobs_.push_back(job);
  return absl::OkStatus();
}

void TestMover::Erase(Slot nvme_slot, uint32_t) {
  absl::MutexLock lock(&mu_);
  nvme_.erase(nvme_slot.number());
}

void TestMover::Pause(bool paused) {
  absl::MutexLock lock(&mu_);
  paused_ = paused;
}

void TestMover::FailFrom(Tier tier, absl::Status status) {
  absl::MutexLock lock(&mu_);
  failures_[tier] = std::move(status);
}

void TestMover::AwaitIdle() {
  absl::MutexLock lock(&mu_);
  mu_.Await(absl::Condition(this, &TestMover::Idle));
}

absl::Status TestMover::Copy(const MoveJob& job) {
  if (const auto it = failures_.find(job.from.tier); it != failures_.end() && !it->second.ok()) {
    return it->second;
  }
  const auto host = [this](SlotRef ref) { return host_.data() + ref.slot.offset(); };
  if (job.to.tier == Tier::kNvme) {
    const std::byte* const from = host(job.from);
    nvme_[job.to.slot.number()].assign(from, from + job.bytes);
    return absl::OkStatus();
  }
  if (job.from.tier == Tier::kNvme) {
    const std::vector<std::byte>& from = nvme_[job.from.slot.number()];
    if (from.size() != job.bytes) return absl::DataLossError("not the block asked for");
    std::memcpy(host(job.to), from.data(), job.bytes);
    return absl::OkStatus();
  }
  const uint32_t part = job.bytes / job.shards;
  for (uint32_t rank = 0; rank < job.shards; ++rank) {
    const auto at = [&](SlotRef ref) {
      return ref.tier == Tier::kHost ? host(ref) + rank * part
                                     : gpus_[rank].data() + ref.slot.offset();
    };
    std::memcpy(at(job.to), at(job.from), part);
  }
  return absl::OkStatus();
}

void TestMover::Run() {
  mu_.Lock();
  while (true) {
    mu_.Await(absl::Condition(this, &TestMover::Wake));
    if (stop_) break;
    const MoveJob job = jobs_.front();
    jobs_.pop_front();
    running_ = true;
    absl::Status status = Copy(job);
    mu_.Unlock();
    link_.OnMoveDone(job.id, std::move(status));
    mu_.Lock();
    running_ = false;
  }
  mu_.Unlock();
}

}  // namespace larder
