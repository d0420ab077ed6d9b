#include "server/gpu_reader.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "storage/check.h"

namespace larder {
namespace {

constexpr uint64_t kBuffers = 4;

}  // namespace

absl::StatusOr<std::unique_ptr<GpuReader>> GpuReader::Create(Copier& copier,
                                                             std::shared_ptr<CudaDevice> device) {
  absl::StatusOr<std::unique_ptr<Arena>> buffers = Arena::Create({.name = "larder-gpu-reads",
                                                                  .bytes = kBuffers * kReadBytesMax,
                                                                  .huge_pages = false,
                                                                  .prefault_threads = 1});
  if (!buffers.ok()) return buffers.status();
  return std::unique_ptr<GpuReader>(new GpuReader(copier, std::move(device), *std::move(buffers)));
}

GpuReader::GpuReader(Copier& copier, std::shared_ptr<CudaDevice> device,
                     std::unique_ptr<Arena> buffers)
    : copier_(copier), buffers_(std::move(buffers)), registration_(std::move(device), *buffers_) {
  for (uint64_t i = 0; i < kBuffers; ++i) free_.push_back(buffers_->base() + i * kReadBytesMax);
  thread_ = std::thread([this] { Run(); });
}

GpuReader::~GpuReader() { Stop(); }

void GpuReader::Read(uint32_t rank, std::byte* from, std::span<std::byte> to, Copier::DoneFn done) {
  LARDER_CHECK(to.size() <= kReadBytesMax);
  {
    absl::MutexLock lock(&mu_);
    LARDER_CHECK(!stopped_);
    waiting_.push_back({rank, from, to, std::move(done)});
  }
  StartWaiting();
}

void GpuReader::StartWaiting() {
  std::byte* buffer = nullptr;
  Copier::Batch batch;
  {
    absl::MutexLock lock(&mu_);
    if (stopped_ || waiting_.empty() || free_.empty()) return;
    buffer = free_.back();
    free_.pop_back();
    Job& job = reading_[buffer] = std::move(waiting_.front());
    waiting_.pop_front();
    batch = {{job.rank, job.from, buffer, job.to.size()}};
  }
  copier_.Copy(Copier::Direction::kToHost, std::move(batch), [this, buffer](absl::Status status) {
    absl::MutexLock lock(&mu_);
    arrived_.emplace_back(buffer, std::move(status));
  });
}

void GpuReader::Run() {
  while (true) {
    std::byte* buffer = nullptr;
    absl::Status status;
    Job job;
    {
      absl::MutexLock lock(&mu_);
      const auto due = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
        return stopped_ || !arrived_.empty();
      };
      mu_.Await(absl::Condition(&due));
      if (stopped_) return;
      std::tie(buffer, status) = std::move(arrived_.front());
      arrived_.pop_front();
      job = std::move(reading_.extract(buffer).mapped());
    }
    if (status.ok()) std::copy_n(buffer, job.to.size(), job.to.data());
    {
      absl::MutexLock lock(&mu_);
      free_.push_back(buffer);
    }
    StartWaiting();
    job.done(std::move(status));
  }
}

void GpuReader::Stop() {
  {
    absl::MutexLock lock(&mu_);
    stopped_ = true;
  }
  if (thread_.joinable()) thread_.join();
  std::deque<Job> left;
  {
    absl::MutexLock lock(&mu_);
    left.swap(waiting_);
    for (auto& [buffer, job] : reading_) left.push_back(std::move(job));
    reading_.clear();
  }
  for (Job& job : left) job.done(absl::CancelledError("the daemon stops"));
}

}  // namespace larder
