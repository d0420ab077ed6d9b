#include "storage/cuda_copy_engine.h"

#include <sys/prctl.h>

#include <algorithm>
#include <string>
#include <utility>

namespace larder {
namespace {

// How long the thread sleeps while copies are under way: 75 us with the slack below, 125 us with
// the kernel's standard slack. A batch of 4 MiB takes 75 us at 55 GB/s, and two more are behind it.
constexpr std::chrono::microseconds kPoll{50};
constexpr unsigned long kTimerSlackNs = 1000;  // NOLINT: prctl's type
// Of a device that is lost; its last batches are in no hurry.
constexpr std::chrono::microseconds kPollLost{10000};

constexpr unsigned kNonBlocking = 0x1;    // CU_STREAM_*: not ordered with the null stream
constexpr unsigned kDisableTiming = 0x2;  // CU_EVENT_*

}  // namespace

CudaOr<std::unique_ptr<CudaCopyEngine>> CudaCopyEngine::Start(std::shared_ptr<CudaDevice> device,
                                                              Options options) {
  std::unique_ptr<CudaCopyEngine> engine(new CudaCopyEngine(std::move(device), std::move(options)));
  if (CudaStatus status = engine->OpenLanes(); !status.ok()) return status;
  engine->thread_ = std::thread([e = engine.get()] { e->Run(); });
  return engine;
}

CudaCopyEngine::~CudaCopyEngine() {
  Stop();
  if (thread_.joinable()) thread_.join();
  CloseLanes();
}

void CudaCopyEngine::Stop() {
  {
    const std::lock_guard lock(mu_);
    stopping_ = true;
  }
  changed_.notify_one();
}

CudaStatus CudaCopyEngine::OpenLanes() {
  const CudaDriver& driver = device_->driver();
  const CudaDevice::Current current(*device_);
  if (!current.status().ok()) return current.status();
  lanes_.resize(2 * static_cast<size_t>(options_.streams_each_way));
  for (size_t i = 0; i < lanes_.size(); ++i) {
    Lane& lane = lanes_[i];
    lane.direction = i < lanes_.size() / 2 ? kToDevice : kToHost;
    CudaStatus s = driver.Status(driver.StreamCreate(&lane.stream, kNonBlocking), "cuStreamCreate");
    if (!s.ok()) return s;
    s = driver.Status(driver.EventCreate(&lane.event, kDisableTiming), "cuEventCreate");
    if (!s.ok()) return s;
  }
  return {};
}

void CudaCopyEngine::CloseLanes() {
  if (device_->abandoned()) return;
  const CudaDriver& driver = device_->driver();
  const CudaDevice::Current current(*device_);
  for (const Lane& lane : lanes_) {
    if (lane.event != nullptr) driver.EventDestroy(lane.event);
    if (lane.stream != nullptr) driver.StreamDestroy(lane.stream);
  }
}

void CudaCopyEngine::Copy(Direction direction, Batch batch, DoneFn done) {
  {
    const std::lock_guard lock(mu_);
    queued_[direction].push_back({std::move(batch), std::move(done)});
  }
  changed_.notify_one();
}

CudaCopyEngine::Batch CudaCopyEngine::Coalesce(const Batch& batch) {
  Batch merged;
  for (const Piece& piece : batch) {
    if (!merged.empty() && merged.back().device + merged.back().bytes == piece.device &&
        merged.back().host + merged.back().bytes == piece.host) {
      merged.back().bytes += piece.bytes;
    } else {
      merged.push_back(piece);
    }
  }
  return merged;
}

bool CudaCopyEngine::Busy() const {
  return std::any_of(lanes_.begin(), lanes_.end(),
                     [](const Lane& lane) { return lane.done != nullptr; });
}

// 1. Ends are seen. 2. Free streams take what is queued. 3. Only then is it told who is done,
// which may take longer than the copies.
void CudaCopyEngine::Run() {
  ::prctl(PR_SET_TIMERSLACK, kTimerSlackNs);
  const CudaDevice::Current current(*device_);
  if (!current.status().ok()) Lose(current.status());
  while (true) {
    std::vector<Finished> finished;
    Poll(finished);
    const bool stopping = Refill();
    if (!lost_.ok() || stopping) FailQueued(finished);
    FailStalled(finished);
    for (Finished& each : finished) each.done(each.status);
    if (!finished.empty()) continue;  // whoever was told may have handed over more
    std::unique_lock lock(mu_);
    const bool queued = !queued_[kToHost].empty() || !queued_[kToDevice].empty();
    if (Busy()) {
      changed_.wait_for(lock, lost_.ok() ? kPoll : kPollLost);
    } else if (!queued && stopping_) {
      return;
    } else if (!queued) {
      changed_.wait(lock);
    }
  }
}

// True: the engine is to stop.
bool CudaCopyEngine::Refill() {
  if (!lost_.ok()) return false;
  for (Lane& lane : lanes_) {
    if (lane.done != nullptr) continue;
    Work work;
    {
      const std::lock_guard lock(mu_);
      if (stopping_) return true;
      if (queued_[lane.direction].empty()) continue;
      work = std::move(queued_[lane.direction].front());
      queued_[lane.direction].pop_front();
    }
    Issue(lane, std::move(work));
  }
  return false;
}

void CudaCopyEngine::Issue(Lane& lane, Work work) {
  const CudaDriver& driver = device_->driver();
  if (!Busy()) progress_ = Clock::now();
  lane.done = std::move(work.done);
  lane.failure = lost_;
  for (const Piece& piece : Coalesce(work.batch)) {
    if (!lane.failure.ok()) break;
    lane.failure =
        lane.direction == kToDevice
            ? driver.Status(
                  driver.MemcpyHtoDAsync(piece.device, piece.host, piece.bytes, lane.stream),
                  "cuMemcpyHtoDAsync")
            : driver.Status(
                  driver.MemcpyDtoHAsync(piece.host, piece.device, piece.bytes, lane.stream),
                  "cuMemcpyDtoHAsync");
  }
  // Also after a failure: the pieces before it may be under way. Where even this fails, so do
  // the questions for the event, and the context is dead.
  const CudaStatus recorded =
      driver.Status(driver.EventRecord(lane.event, lane.stream), "cuEventRecord");
  if (lane.failure.ok()) lane.failure = recorded;
  if (!lane.failure.ok()) Lose(lane.failure);
}

void CudaCopyEngine::Poll(std::vector<Finished>& finished) {
  const CudaDriver& driver = device_->driver();
  for (Lane& lane : lanes_) {
    if (lane.done == nullptr) continue;
    const int code = driver.EventQuery(lane.event);
    if (code == kCudaNotReady) continue;
    CudaStatus status = driver.Status(code, "copy");
    if (!lane.failure.ok()) status = lane.failure;
    if (!status.ok()) Lose(status);
    lane.settles = code != 0 && lane.direction == kToHost;
    if (lane.settles) continue;
    progress_ = Clock::now();
    finished.push_back({std::exchange(lane.done, nullptr), std::move(status)});
  }
}

void CudaCopyEngine::Lose(const CudaStatus& why) {
  if (!lost_.ok()) return;
  lost_ = why;
  progress_ = Clock::now();
  options_.on_lost(why);
}

void CudaCopyEngine::FailQueued(std::vector<Finished>& finished) {
  const CudaStatus why = lost_.ok() ? CudaStatus{kCudaStopped, "the copy engine stops"} : lost_;
  const std::lock_guard lock(mu_);
  for (std::deque<Work>& queue : queued_) {
    for (Work& work : queue) finished.push_back({std::move(work.done), why});
    queue.clear();
  }
}

// Invariants 4 and 5, and the end of the destructor's patience.
void CudaCopyEngine::FailStalled(std::vector<Finished>& finished) {
  const auto quiet = Clock::now() - progress_;
  for (Lane& lane : lanes_) {
    if (lane.done == nullptr || !lane.settles || quiet < options_.settle) continue;
    lane.settles = false;
    finished.push_back({std::exchange(lane.done, nullptr), lost_});
  }
  if (!Busy() || quiet < options_.stall_limit) return;
  Lose({kCudaTimeout, "no copy has ended for " + std::to_string(options_.stall_limit.count()) +
                          " ms: the device hangs"});
  bool stopping;
  {
    const std::lock_guard lock(mu_);
    stopping = stopping_;
  }
  device_->Abandon();
  for (Lane& lane : lanes_) {
    if (lane.done == nullptr || (lane.direction == kToHost && !stopping)) continue;
    finished.push_back({std::exchange(lane.done, nullptr), lost_});
  }
}

}  // namespace larder
