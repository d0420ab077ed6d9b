// IoBackend with io_uring: one thread submits, reaps and tells.
//
//   Read, Write --> queue --1, 3--> ring --2--> completed --4--> done
//
//   1. What may start goes into the ring; one call submits all of it and waits.
//   2. A completion that is short, or was put off, goes into the ring again.
//   3. What may start in the place of the completed is submitted before anybody is told,
//   4. so the device works while done runs, checksums included.
//
// A thread that waits in the ring is woken by an eventfd that the ring reads.

#include <liburing.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "storage/check.h"
#include "storage/errno_status.h"
#include "storage/io_backend.h"
#include "storage/io_queue.h"
#include "storage/io_transfer.h"

namespace larder {
namespace {

// 32 operations of 192 KiB keep a drive busy. What reads leave free is for writes.
constexpr IoQueue::Limits kLimits = {.reads = 32, .writes = 32};
constexpr uint32_t kDepth = kLimits.reads + kLimits.writes;

constexpr uint64_t kWakeTag = kDepth;  // of a completion; the others' is their place in ops_
constexpr uint64_t kBufferBytes = uint64_t{1} << 30;  // the kernel's limit of a registered buffer

class UringIo final : public IoBackend {
 public:
  explicit UringIo(const IoOptions& options)
      : direct_(options.direct), name_(options.name), memory_(options.memory) {}
  ~UringIo() override;

  // Once, before anything else. OK: it has taken `file` and works.
  absl::Status Start(UniqueFd& file, bool registered);
  const std::string& how() const { return how_; }

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
  int RegisterMemory();
  void Queue(IoJob job);
  void Run();
  bool StartWhatMay(bool then_waits);
  void Prepare(uint32_t place);
  void PrepareWake();
  void Reap();

  const bool direct_;
  const std::string name_;
  const std::span<std::byte> memory_;
  UniqueFd file_;
  UniqueFd wake_;
  std::string how_;
  bool registered_ = false;
  bool ring_open_ = false;

  // The thread's own, once it runs.
  io_uring ring_{};
  std::array<IoTransfer, kDepth> ops_;
  std::vector<uint32_t> free_;  // places in ops_
  std::vector<IoTransfer> completed_;
  uint64_t wakes_ = 0;  // what the ring reads from wake_

  absl::Mutex mu_;
  IoQueue queue_ ABSL_GUARDED_BY(mu_){kLimits};
  bool waits_ ABSL_GUARDED_BY(mu_) = false;  // in the ring, and has not been woken
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;

  std::thread thread_;  // last: it uses all of the above
};

absl::Status UringIo::Start(UniqueFd& file, bool registered) {
  // Room for all operations and the wake-up.
  if (const int error = io_uring_queue_init(2 * kDepth, &ring_, 0); error < 0) {
    return ErrnoStatus("io_uring refused", -error);
  }
  ring_open_ = true;
  wake_.Reset(::eventfd(0, EFD_CLOEXEC));
  if (!wake_) return ErrnoStatus("io_uring: eventfd", errno);
  how_ = "io_uring";
  if (registered && !memory_.empty()) {
    const int error = RegisterMemory();
    registered_ = error == 0;
    absl::StrAppend(&how_, registered_
                               ? ", registered buffers"
                               : absl::StrCat("; buffers not registered: ", ErrnoText(error)));
  }
  for (uint32_t place = 0; place < kDepth; ++place) free_.push_back(place);
  file_ = std::move(file);
  thread_ = std::thread([this] { Run(); });
  return absl::OkStatus();
}

// 0 or an errno.
int UringIo::RegisterMemory() {
  std::vector<iovec> buffers;
  for (uint64_t at = 0; at < memory_.size(); at += kBufferBytes) {
    buffers.push_back({memory_.data() + at, std::min(kBufferBytes, memory_.size() - at)});
  }
  return -io_uring_register_buffers(&ring_, buffers.data(), static_cast<unsigned>(buffers.size()));
}

UringIo::~UringIo() {
  if (thread_.joinable()) {
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
    }
    LARDER_CHECK(::eventfd_write(wake_.get(), 1) == 0);
    thread_.join();
  }
  if (ring_open_) io_uring_queue_exit(&ring_);
}

void UringIo::Queue(IoJob job) {
  {
    absl::MutexLock lock(&mu_);
    queue_.Push(std::move(job));
    if (!waits_ || !queue_.MayStart()) return;
    waits_ = false;
  }
  LARDER_CHECK(::eventfd_write(wake_.get(), 1) == 0);
}

void UringIo::Run() {
  PrepareWake();
  while (StartWhatMay(/*then_waits=*/true)) {
    const int submitted = io_uring_submit_and_wait(&ring_, 1);
    // Short of memory, or of room for completions: reaping helps.
    LARDER_CHECK(
        submitted >= 0 || submitted == -EINTR || submitted == -EAGAIN || submitted == -EBUSY,
        "io_uring_enter");
    Reap();
    if (completed_.empty()) continue;
    StartWhatMay(/*then_waits=*/false);
    io_uring_submit(&ring_);
    for (IoTransfer& transfer : completed_) transfer.Finish(name_);
    completed_.clear();
  }
}

// Fills the ring as far as the limits allow. False: stopping, and nothing is left.
bool UringIo::StartWhatMay(bool then_waits) {
  absl::MutexLock lock(&mu_);
  for (const IoTransfer& transfer : completed_) queue_.Done(transfer.write(), transfer.bytes());
  while (std::optional<IoJob> job = queue_.Next()) {
    const uint32_t place = free_.back();
    free_.pop_back();
    ops_[place] = IoTransfer(*std::move(job), direct_);
    Prepare(place);
  }
  waits_ = then_waits;
  return !stopping_ || free_.size() < kDepth;
}

// There is room in the ring: it has an entry for each operation and for the wake-up.
void UringIo::Prepare(uint32_t place) {
  IoTransfer& op = ops_[place];
  const std::span<const iovec> parts = op.Left();
  io_uring_sqe* const sqe = io_uring_get_sqe(&ring_);
  LARDER_CHECK(sqe != nullptr);
  const uint64_t at =
      reinterpret_cast<uintptr_t>(parts[0].iov_base) - reinterpret_cast<uintptr_t>(memory_.data());
  if (registered_ && parts.size() == 1 && at < memory_.size()) {
    // The end of a registered buffer cuts it short; the rest follows as after any short count.
    const uint64_t buffer = at / kBufferBytes;
    const uint64_t end = std::min<uint64_t>((buffer + 1) * kBufferBytes, memory_.size());
    const auto bytes = static_cast<unsigned>(std::min<uint64_t>(parts[0].iov_len, end - at));
    const auto index = static_cast<int>(buffer);
    if (op.write()) {
      io_uring_prep_write_fixed(sqe, file_.get(), parts[0].iov_base, bytes, op.offset(), index);
    } else {
      io_uring_prep_read_fixed(sqe, file_.get(), parts[0].iov_base, bytes, op.offset(), index);
    }
  } else {
    (op.write() ? io_uring_prep_writev : io_uring_prep_readv)(
        sqe, file_.get(), parts.data(), static_cast<unsigned>(parts.size()), op.offset());
  }
  io_uring_sqe_set_data64(sqe, place);
}

void UringIo::PrepareWake() {
  io_uring_sqe* const sqe = io_uring_get_sqe(&ring_);
  LARDER_CHECK(sqe != nullptr);
  io_uring_prep_read(sqe, wake_.get(), &wakes_, sizeof(wakes_), 0);
  io_uring_sqe_set_data64(sqe, kWakeTag);
}

void UringIo::Reap() {
  io_uring_cqe* cqe = nullptr;
  while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
    const uint64_t tag = io_uring_cqe_get_data64(cqe);
    const int result = cqe->res;
    io_uring_cqe_seen(&ring_, cqe);
    if (tag == kWakeTag) {
      PrepareWake();
      continue;
    }
    const auto place = static_cast<uint32_t>(tag);
    if (!ops_[place].Advance(result)) {
      Prepare(place);
      continue;
    }
    completed_.push_back(std::move(ops_[place]));
    free_.push_back(place);
  }
}

}  // namespace

absl::StatusOr<OpenedIo> MakeUringIo(UniqueFd& file, const IoOptions& options) {
  auto io = std::make_unique<UringIo>(options);
  const bool registered = options.best == IoWay::kUringRegistered;
  if (absl::Status status = io->Start(file, registered); !status.ok()) return status;
  std::string how = io->how();
  return OpenedIo{std::move(io), std::move(how)};
}

}  // namespace larder
