// IoBackend with pread and pwrite in a few threads. The variant for every kernel and file
// system.

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "storage/check.h"
#include "storage/errno_status.h"
#include "storage/io_backend.h"
#include "storage/types.h"

namespace larder {
namespace {

constexpr uint64_t kPage = kSlotGranule;
// A misaligned buffer is copied through a bounce buffer of this size, a piece at a time.
constexpr uint64_t kBounceBytes = 256 << 10;

struct FreeDeleter {
  void operator()(std::byte* p) const { std::free(p); }
};
using PageBuffer = std::unique_ptr<std::byte[], FreeDeleter>;

PageBuffer AllocatePages(uint64_t bytes) {
  auto* const p = static_cast<std::byte*>(std::aligned_alloc(kPage, bytes));
  LARDER_CHECK(p != nullptr, "out of memory for an I/O thread's bounce buffer");
  return PageBuffer(p);
}

bool IsAligned(const std::byte* p) { return reinterpret_cast<uintptr_t>(p) % kPage == 0; }

using VectorCall = ssize_t (*)(int, const iovec*, int, off_t);

// Repeats a positional call until all parts are done. 0, an errno, or -1: the file ended.
int Transfer(VectorCall call, int fd, uint64_t offset, iovec* parts, int count) {
  while (count > 0) {
    const ssize_t n = call(fd, parts, count, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    if (n == 0) return -1;
    offset += static_cast<uint64_t>(n);
    size_t left = static_cast<size_t>(n);
    while (count > 0 && left >= parts->iov_len) {
      left -= parts->iov_len;
      ++parts;
      --count;
    }
    if (count > 0) {
      parts->iov_base = static_cast<std::byte*>(parts->iov_base) + left;
      parts->iov_len -= left;
    }
  }
  return 0;
}

class ThreadPoolIo final : public IoBackend {
 public:
  ThreadPoolIo(UniqueFd file, bool direct, int threads, std::string name)
      : file_(std::move(file)), direct_(direct), name_(std::move(name)) {
    for (int i = 0; i < std::max(threads, 1); ++i) threads_.emplace_back([this] { Work(); });
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
  struct Job {
    uint64_t offset = 0;
    std::byte* memory = nullptr;
    uint64_t bytes = 0;
    bool write = false;
    DoneFn done;
  };

  void Queue(Job job) {
    {
      absl::MutexLock lock(&mu_);
      (job.write ? writes_ : reads_).push_back(std::move(job));
    }
    changed_.Signal();
  }

  // False: stopping, and nothing is left.
  bool Next(Job& job) {
    absl::MutexLock lock(&mu_);
    while (reads_.empty() && writes_.empty()) {
      if (stopping_) return false;
      changed_.Wait(&mu_);
    }
    std::deque<Job>& queue = reads_.empty() ? writes_ : reads_;
    job = std::move(queue.front());
    queue.pop_front();
    return true;
  }

  void Work() {
    const PageBuffer bounce = AllocatePages(kBounceBytes);
    Job job;
    while (Next(job)) {
      const bool in_place = !direct_ || IsAligned(job.memory);
      const int error = in_place ? RunInPlace(job, bounce.get()) : RunBounced(job, bounce.get());
      job.done(ToStatus(job, error));
      job.done = nullptr;
    }
  }

  absl::Status ToStatus(const Job& job, int error) const {
    if (error == 0) return absl::OkStatus();
    const std::string what = absl::StrCat(name_, ": ", job.write ? "writing " : "reading ",
                                          job.bytes, " bytes at ", job.offset);
    if (error == -1) return absl::DataLossError(absl::StrCat(what, ": the file ends before"));
    return ErrnoStatus(what, error);
  }

  // Whole pages straight from or to the block's memory; an odd tail by way of a page of ours.
  int RunInPlace(const Job& job, std::byte* page) const {
    const uint64_t tail = job.bytes % kPage;
    const uint64_t body = job.bytes - tail;
    iovec parts[2] = {{job.memory, body}, {page, kPage}};
    if (job.write && tail != 0) {
      std::memcpy(page, job.memory + body, tail);
      std::memset(page + tail, 0, kPage - tail);
    }
    iovec* const first = body == 0 ? parts + 1 : parts;
    const int count = (body != 0) + (tail != 0);
    const int error =
        Transfer(job.write ? ::pwritev : ::preadv, file_.get(), job.offset, first, count);
    if (error == 0 && !job.write && tail != 0) std::memcpy(job.memory + body, page, tail);
    return error;
  }

  int RunBounced(const Job& job, std::byte* bounce) const {
    for (uint64_t at = 0; at < job.bytes; at += kBounceBytes) {
      const uint64_t bytes = std::min(kBounceBytes, job.bytes - at);
      const uint64_t padded = (bytes + kPage - 1) / kPage * kPage;
      if (job.write) {
        std::memcpy(bounce, job.memory + at, bytes);
        std::memset(bounce + bytes, 0, padded - bytes);
      }
      iovec part{bounce, padded};
      const int error =
          Transfer(job.write ? ::pwritev : ::preadv, file_.get(), job.offset + at, &part, 1);
      if (error != 0) return error;
      if (!job.write) std::memcpy(job.memory + at, bounce, bytes);
    }
    return 0;
  }

  const UniqueFd file_;
  const bool direct_;
  const std::string name_;

  absl::Mutex mu_;
  absl::CondVar changed_;
  std::deque<Job> reads_ ABSL_GUARDED_BY(mu_);
  std::deque<Job> writes_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;

  std::vector<std::thread> threads_;  // last: they use all of the above
};

}  // namespace

std::unique_ptr<IoBackend> MakeThreadPoolIo(UniqueFd file, bool direct, int threads,
                                            std::string name) {
  return std::make_unique<ThreadPoolIo>(std::move(file), direct, threads, std::move(name));
}

}  // namespace larder
