// What the storage programs share: host memory that a device copies by itself, and batches that are
// waited for. C++'s standard library only.
//
// Thread safety: Pending is thread-safe, the rest is not.
#pragma once

#include <sys/mman.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>

#include "storage/cuda_copy_engine.h"

namespace larder::gpu {

// Ends the program with the driver's words when a call failed.
inline void Must(const CudaStatus& status, const char* what) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s: %s\n", what, status.text.c_str());
  std::exit(1);
}
template <typename T>
T Must(CudaOr<T> result, const char* what) {
  Must(result.status, what);
  return std::move(result.value);
}

// Page-aligned, touched, registered with the device as HOST is.
class PinnedMemory {
 public:
  PinnedMemory(std::shared_ptr<CudaDevice> device, uint64_t bytes)
      : device_(std::move(device)), bytes_(bytes) {
    void* const memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED) Must({kCudaOutOfMemory, "mmap failed"}, "host memory");
    data_ = static_cast<std::byte*>(memory);
    Must(device_->Register(data_, bytes_), "register");
  }
  ~PinnedMemory() {
    device_->Unregister(data_);
    ::munmap(data_, bytes_);
  }
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  std::byte* data() const { return data_; }

 private:
  const std::shared_ptr<CudaDevice> device_;
  const uint64_t bytes_;
  std::byte* data_ = nullptr;
};

// Counts batches that are not done yet.
class Pending {
 public:
  CudaCopyEngine::DoneFn Add() {
    const std::lock_guard lock(mu_);
    ++left_;
    return [this](const CudaStatus& status) {
      Must(status, "copy");
      const std::lock_guard guard(mu_);
      if (--left_ == 0) none_.notify_all();
    };
  }
  void Wait() {
    std::unique_lock lock(mu_);
    none_.wait(lock, [this] { return left_ == 0; });
  }

 private:
  std::mutex mu_;
  std::condition_variable none_;
  int left_ = 0;
};

}  // namespace larder::gpu
