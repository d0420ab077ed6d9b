#include "server/gpu_reader.h"

#include <algorithm>
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
}

void GpuReader::Read(uint32_t rank, std::byte* from, std::span<std::byte> to, Copier::DoneFn done) {
  LARDER_CHECK(to.size() <= kReadBytesMax);
  Job job{rank, from, to, std::move(done)};
  std::byte* buffer = nullptr;
  {
    absl::MutexLock lock(&mu_);
    LARDER_CHECK(!stopped_);
    if (free_.empty()) {
      waiting_.push_back(std::move(job));
      return;
    }
    buffer = free_.back();
    free_.pop_back();
  }
  Start(buffer, std::move(job));
}

void GpuReader::Stop() {
  std::deque<Job> waiting;
  {
    absl::MutexLock lock(&mu_);
    stopped_ = true;
    waiting.swap(waiting_);
  }
  for (Job& job : waiting) job.done(absl::CancelledError("the daemon stops"));
}

void GpuReader::Start(std::byte* buffer, Job job) {
  Copier::Batch batch = {{job.rank, job.from, buffer, job.to.size()}};
  copier_.Copy(Copier::Direction::kToHost, std::move(batch),
               [this, buffer, job = std::move(job)](absl::Status status) {
                 Done(buffer, job, std::move(status));
               });
}

void GpuReader::Done(std::byte* buffer, const Job& job, absl::Status status) {
  if (status.ok()) std::copy_n(buffer, job.to.size(), job.to.data());
  Job next;
  {
    absl::MutexLock lock(&mu_);
    if (waiting_.empty()) {
      free_.push_back(buffer);
    } else {
      next = std::move(waiting_.front());
      waiting_.pop_front();
    }
  }
  job.done(std::move(status));
  if (next.done != nullptr) Start(buffer, std::move(next));
}

}  // namespace larder
