// What the CUDA tests share: a device of the fake driver, and bytes in its memory.
//
// Thread safety: none.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "storage/check.h"
#include "storage/cuda_copy_engine.h"
#include "tests/storage/fake_cuda.h"

namespace larder::testing {

inline std::shared_ptr<CudaDevice> OpenDevice(const std::string& which = "") {
  auto device = CudaDevice::Open(which);
  LARDER_CHECK(device.ok(), "the fake driver is not there");
  return device.value;
}

// A DoneFn of the engine to wait for.
class CopyWaiter {
 public:
  CudaCopyEngine::DoneFn done() {
    return [this](const CudaStatus& status) {
      const std::lock_guard lock(mu_);
      LARDER_CHECK(!status_, "called twice");
      status_ = status;
      changed_.notify_all();
    };
  }
  CudaStatus Wait() {
    std::unique_lock lock(mu_);
    changed_.wait(lock, [this] { return status_.has_value(); });
    return *status_;
  }
  bool finished() {
    const std::lock_guard lock(mu_);
    return status_.has_value();
  }

 private:
  std::mutex mu_;
  std::condition_variable changed_;
  std::optional<CudaStatus> status_;
};

inline CudaStatus CopyAndWait(CudaCopyEngine& engine, CudaCopyEngine::Direction direction,
                              CudaPointer device, std::span<std::byte> host) {
  CopyWaiter waiter;
  engine.Copy(direction, {{device, host.data(), host.size()}}, waiter.done());
  return waiter.Wait();
}

// What a kernel of a process would write to, or read from, memory of its device.
inline void WriteDevice(std::shared_ptr<CudaDevice> device, CudaPointer to,
                        std::span<std::byte> bytes) {
  auto engine = CudaCopyEngine::Start(std::move(device), {});
  LARDER_CHECK(engine.ok(), "engine");
  LARDER_CHECK(CopyAndWait(*engine.value, CudaCopyEngine::kToDevice, to, bytes).ok(), "write");
}
inline std::vector<std::byte> ReadDevice(std::shared_ptr<CudaDevice> device, CudaPointer from,
                                         uint64_t bytes) {
  std::vector<std::byte> out(bytes);
  auto engine = CudaCopyEngine::Start(std::move(device), {});
  LARDER_CHECK(engine.ok(), "engine");
  LARDER_CHECK(CopyAndWait(*engine.value, CudaCopyEngine::kToHost, from, out).ok(), "read");
  return out;
}

}  // namespace larder::testing
