// CudaDevice: one GPU, by its primary context, which all of a process share.
//
// Thread safety: thread-safe. A thread's current context is what it was after every call, so a
// worker's own CUDA code does not notice.
//
// Invariants:
//   1. The context is held as long as the object lives.
//   2. After Abandon nothing is freed or closed any more: those calls could wait for ever, or take
//      memory from under who has it open. The end of the process does it, which must be _exit: what
//      the driver does at exit could wait as well.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "storage/cuda_driver.h"

namespace larder {

// "GPU-6c8f2b1e-...", as nvidia-smi -L writes it.
std::string FormatCudaUuid(const CudaUuid& uuid);

class CudaDevice {
 public:
  struct Memory {
    uint64_t free_bytes = 0;  // of all processes' view
    uint64_t total_bytes = 0;
  };

  // `which`: empty for the first device, an ordinal, or a UUID as FormatCudaUuid or, of a part of a
  // device, nvidia-smi -L writes it ("MIG-6c8f2b1e-..."), its letters small or large.
  // kCudaNoDriver, kCudaNoDevice, kCudaInvalidDevice, or what the driver says.
  static CudaOr<std::shared_ptr<CudaDevice>> Open(const std::string& which,
                                                  const char* library = CudaDriver::kLibrary);
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  const CudaDriver& driver() const { return driver_; }
  const CudaUuid& uuid() const { return uuid_; }
  const std::string& name() const { return name_; }  // "NVIDIA H200 (GPU-6c8f2b1e-...)"

  CudaOr<Memory> MemoryInfo() const;

  // Memory that is contiguous on the device, its content undefined. Exported whole: a multiple
  // of 2 MiB, because the driver maps it in such units.
  CudaOr<CudaPointer> Allocate(uint64_t bytes) const;
  void Free(CudaPointer pointer) const;

  // For other processes, which map the whole allocation. Not for this one: the driver refuses.
  CudaOr<CudaIpcHandle> Export(CudaPointer pointer) const;
  CudaOr<CudaPointer> Import(const CudaIpcHandle& handle) const;
  void Close(CudaPointer imported) const;

  // Lets the device copy from and to host memory by itself. One call for all of it: no copy may
  // cross two registrations.
  CudaStatus Register(void* memory, uint64_t bytes) const;
  void Unregister(void* memory) const;

  void Abandon();
  bool abandoned() const { return abandoned_; }
  static bool AnyAbandoned();  // in this process, ever

  // Makes the device current in this thread while it lives.
  class Current {
   public:
    explicit Current(const CudaDevice& device);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
    const CudaStatus& status() const { return status_; }

   private:
    const CudaDriver& driver_;
    CudaStatus status_;
  };

 private:
  CudaDevice(const CudaDriver& driver, int device) : driver_(driver), device_(device) {}

  const CudaDriver driver_;
  const int device_;
  // Constant once Open has returned.
  CudaUuid uuid_;
  std::string name_;
  CudaContext* context_ = nullptr;

  std::atomic<bool> abandoned_ = false;
};

}  // namespace larder
