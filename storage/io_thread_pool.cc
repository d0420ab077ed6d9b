// IoBackend with pread and pwrite in a few threads. The way for every kernel and file system,
// and where OpenIo chooses one.

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "storage/errno_status.h"
#include "storage/io_backend.h"
#include "storage/io_queue.h"
#include "storage/io_transfer.h"

namespace larder {
namespace {

class ThreadPoolIo final : public IoBackend {
 public:
  ThreadPoolIo(UniqueFd file, const IoOptions& options)
      : file_(std::move(file)),
        direct_(options.direct),
        name_(options.name),
        queue_(LimitsOf(options.threads)) {
    for (int i = 0; i < std::max(options.threads, 1); ++i)
      threads_.emplace_back([this] { Work(); });
  }

  ~ThreadPoolIo() override {
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
    }
    changed_.SignalAll();
    for (std::thread& thread : threads_) thread.join();
  }

  void Read(uint64_t offset, std::span<std::byte> to, DoneFn done) override {
    Queue({offset, to.data(), to.size(), false, std::move(done)});
  }
  void Write(uint64_t offset, std::span<const std::byte> from, DoneFn done) override {
    // Only read from: a job has one pointer for both directions.
    Queue({offset, const_cast<std::byte*>(from.data()), from.size(), true, std::move(done)});
  }
  absl::Status Sync() override {
    if (::fdatasync(file_.get()) == 0) return absl::OkStatus();
    return ErrnoStatus(absl::StrCat(name_, ": fdatasync"), errno);
  }

 private:
  // One thread is left for writes, so that they make progress beside reads.
  static IoQueue::Limits LimitsOf(int threads) {
    const auto count = static_cast<uint32_t>(std::max(threads, 1));
    return {.reads = std::max(count - 1, 1u), .writes = count};
  }

  void Queue(IoJob job) {
    absl::MutexLock lock(&mu_);
    queue_.Push(std::move(job));
    if (queue_.MayStart()) changed_.Signal();
  }

  // False: stopping, and nothing is left that no other thread will start.
  bool Next(IoJob& job) {
    absl::MutexLock lock(&mu_);
    while (true) {
      if (std::optional<IoJob> next = queue_.Next()) {
        job = *std::move(next);
        return true;
      }
      if (stopping_ && queue_.empty()) return false;
      changed_.Wait(&mu_);
    }
  }

  void Work() {
    IoJob job;
    while (Next(job)) {
      IoTransfer transfer(std::move(job), direct_);
      while (!transfer.Advance(Call(transfer))) {
      }
      {
        absl::MutexLock lock(&mu_);
        queue_.Done(transfer.write(), transfer.bytes());
        if (queue_.MayStart() || stopping_) changed_.SignalAll();
      }
      transfer.Finish(name_);
    }
  }

  int64_t Call(IoTransfer& transfer) const {
    const std::span<const iovec> parts = transfer.Left();
    const auto call = transfer.write() ? ::pwritev : ::preadv;
    const ssize_t n = call(file_.get(), parts.data(), static_cast<int>(parts.size()),
                           static_cast<off_t>(transfer.offset()));
    return n < 0 ? -errno : n;
  }

  const UniqueFd file_;
  const bool direct_;
  const std::string name_;

  absl::Mutex mu_;
  absl::CondVar changed_;
  IoQueue queue_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;

  std::vector<std::thread> threads_;  // last: they use all of the above
};

}  // namespace

std::unique_ptr<IoBackend> MakeThreadPoolIo(UniqueFd file, const IoOptions& options) {
  return std::make_unique<ThreadPoolIo>(std::move(file), options);
}

OpenedIo OpenIo(UniqueFd file, const IoOptions& options) {
  std::string why;
  if (options.best != IoWay::kThreads) {
    absl::StatusOr<OpenedIo> uring = MakeUringIo(file, options);
    if (uring.ok()) return *std::move(uring);
    why = absl::StrCat("; ", absl::string_view(uring.status().message()));
  }
  std::string how = absl::StrCat("pread in ", options.threads, " threads", why);
  return {MakeThreadPoolIo(std::move(file), options), std::move(how)};
}

}  // namespace larder
