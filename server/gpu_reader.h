// GpuReader: bytes of a GPU tier in devices' memory, into memory of any kind.
//
// A device copies to memory that is not registered with it only while a thread waits in the driver,
// and that would be the copy engine's, which must not: it would neither issue what else is queued
// nor notice a hang. So bytes come by way of buffers that are registered, one a read, and a thread
// of the reader's takes them from there; when all buffers are in use, further reads wait.
//
//   waiting_ --a buffer is free--> reading_ --the device is done--> arrived_ --thread--> DoneFn
//
// Thread safety: thread-safe. DoneFn runs on the reader's thread, or in Stop, without a lock held.
//
// Invariants:
//   1. DoneFn is called exactly once for each read, never from inside Read, and `to` is not written
//      after it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "storage/arena.h"
#include "storage/arena_cuda.h"
#include "storage/copier.h"

namespace larder {

class GpuReader {
 public:
  static constexpr uint64_t kReadBytesMax = 1 << 20;

  // `copier` must outlive all reads, and end before the reader. A registration that fails is no
  // error, as for HOST.
  static absl::StatusOr<std::unique_ptr<GpuReader>> Create(Copier& copier,
                                                           std::shared_ptr<CudaDevice> device);
  ~GpuReader();  // stops

  // `to.size()` bytes, at most kReadBytesMax, from `from` in the arena of `rank`. Not after Stop.
  void Read(uint32_t rank, std::byte* from, std::span<std::byte> to, Copier::DoneFn done)
      ABSL_LOCKS_EXCLUDED(mu_);

  // All reads that are not done fail with CANCELLED, those of a device that hangs as well: it may
  // still write a buffer, and no read's memory. The copier gets no batch from then on.
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Job {
    uint32_t rank = 0;
    std::byte* from = nullptr;
    std::span<std::byte> to;
    Copier::DoneFn done;
  };

  GpuReader(Copier& copier, std::shared_ptr<CudaDevice> device, std::unique_ptr<Arena> buffers);
  void StartWaiting() ABSL_LOCKS_EXCLUDED(mu_);
  void Run() ABSL_LOCKS_EXCLUDED(mu_);

  Copier& copier_;
  const std::unique_ptr<Arena> buffers_;
  const CudaRegistration registration_;
  std::thread thread_;  // of Run

  absl::Mutex mu_;
  std::vector<std::byte*> free_ ABSL_GUARDED_BY(mu_);
  std::deque<Job> waiting_ ABSL_GUARDED_BY(mu_);
  std::map<std::byte*, Job> reading_ ABSL_GUARDED_BY(mu_);  // by buffer
  std::deque<std::pair<std::byte*, absl::Status>> arrived_ ABSL_GUARDED_BY(mu_);
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace larder
