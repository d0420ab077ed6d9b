// GpuTier: the memory of the GPU tier, one arena a rank, and what copies to and from it. Emulated
// in shared memory, or a CUDA device's.
//
// Thread safety: constant after Create; health is thread-safe.
//
// Invariants:
//   1. It does not outlive the HOST arena, nor do copies of it outlive the tier.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/config.h"
#include "server/gpu_reader.h"
#include "storage/arena.h"
#include "storage/arena_cuda.h"
#include "storage/copier.h"

namespace larder {

class GpuTier {
 public:
  // Called once, from any thread: a device failed, and nothing can be copied any more.
  using LostFn = std::function<void(const absl::Status& why)>;

  struct Options {
    LostFn on_lost;
    // How long memory is waited for that other processes hold: workers of a daemon that was killed
    // let go when they notice.
    absl::Duration patience = absl::Seconds(10);
  };

  // FAILED_PRECONDITION or UNAVAILABLE: there is no such device, or it does not work; ABORTED:
  // other processes hold its memory. The daemon goes on without this tier. RESOURCE_EXHAUSTED: it
  // has not that much memory; then a setting must change.
  static absl::StatusOr<std::unique_ptr<GpuTier>> Create(const Config& config, const Arena& host,
                                                         Options options);

  const std::vector<std::unique_ptr<Arena>>& arenas() const { return arenas_; }
  uint64_t bytes() const { return arenas_.front()->bytes(); }  // of each

  // Null: the arenas are shared memory, which everybody can copy.
  Copier* copier() const { return copier_.get(); }
  // Reads what the copier reaches, in pieces of 1 MiB; there where that is.
  GpuReader* reader() const { return reader_.get(); }
  const std::string& backend() const { return backend_; }  // "emulated" or "cuda"
  absl::Status health() const;                             // OK, or why the device is lost

  // Frees nothing, ever: CUDA does not say what becomes of memory that others have open when its
  // owner frees it. The end of the process is defined (CudaDevice::Abandon).
  void LeaveToProcessEnd();

 private:
  GpuTier() = default;
  absl::Status CreateEmulated(const Config& config);
  absl::Status CreateCuda(const Config& config, const Arena& host, Options options);

  std::string backend_;
  std::vector<std::unique_ptr<Arena>> arenas_;
  std::vector<std::shared_ptr<CudaDevice>> devices_;  // by rank
  std::unique_ptr<CudaRegistration> registration_;    // of HOST, for all devices
  // Last, and in this order: the copier's threads call the reader, and use all of the above.
  std::unique_ptr<GpuReader> reader_;
  std::unique_ptr<Copier> copier_;
};

}  // namespace larder
