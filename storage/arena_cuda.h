// CUDA arenas: a GPU tier in a device's memory, and what a worker opens of it.
//
// One plain allocation, a multiple of 2 MiB, exported by one CUDA IPC handle. The rules of that:
// the opener is another process than the exporter; one handle is opened once a process; the
// memory must outlive those who opened it, so the daemon frees it only when it ends, and a handle
// of a daemon that is gone is dead, which workers learn from the boot id. What they have open then
// stays allocated until they close it, however dead the daemon: the next one finds it taken.
//
// Thread safety: as Arena's; the functions are thread-safe.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "storage/arena.h"
#include "storage/cuda_device.h"

namespace larder {

inline constexpr uint64_t kCudaArenaGranule = 2 << 20;

// CUDA's errors as ours: no driver or device is FAILED_PRECONDITION, no memory
// RESOURCE_EXHAUSTED, a wrong name INVALID_ARGUMENT, a batch that did not start CANCELLED,
// everything else UNAVAILABLE.
absl::Status FromCuda(const CudaStatus& status);

class CudaArena final : public Arena {
 public:
  // Takes `bytes` of the device, leaving `reserve_bytes` or more to others. RESOURCE_EXHAUSTED: it
  // has not that much. ABORTED: it has, but other processes hold it now. INVALID_ARGUMENT: no
  // multiple of kCudaArenaGranule.
  static absl::StatusOr<std::unique_ptr<CudaArena>> Create(std::shared_ptr<CudaDevice> device,
                                                           uint64_t bytes, uint64_t reserve_bytes);

  // Opens what another process described. `boot_id` tells daemons apart that follow each other.
  // FAILED_PRECONDITION: no driver, or the device is not here.
  static absl::StatusOr<std::unique_ptr<CudaArena>> Import(const wire::HandoverArena& description,
                                                           uint64_t boot_id);

  ~CudaArena() override;

  wire::HandoverArena Description() const override { return description_; }
  const CudaDevice& device() const { return *device_; }
  CudaPointer pointer() const { return reinterpret_cast<CudaPointer>(base()); }

 private:
  class Imported;
  CudaArena(std::shared_ptr<CudaDevice> device, CudaPointer pointer,
            const wire::HandoverArena& description, std::shared_ptr<Imported> imported);

  const std::shared_ptr<CudaDevice> device_;
  const wire::HandoverArena description_;
  const std::shared_ptr<Imported> imported_;  // null: it is ours
};

// Registers a HOST arena with a device for as long as it lives, so that the device copies by
// itself. A registration that fails is no error: copies go through the driver's own buffers, at
// half the speed or less.
class CudaRegistration {
 public:
  CudaRegistration(std::shared_ptr<CudaDevice> device, const Arena& host);
  ~CudaRegistration();
  CudaRegistration(const CudaRegistration&) = delete;
  CudaRegistration& operator=(const CudaRegistration&) = delete;

  const absl::Status& status() const { return status_; }

 private:
  const std::shared_ptr<CudaDevice> device_;
  void* const memory_;
  const absl::Status status_;
};

}  // namespace larder
