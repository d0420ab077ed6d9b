// Gpu: a CUDA device as a forward pass needs it: memory, one stream, and what went wrong on it.
//
// Thread safety: one thread at a time.
//
// Invariants:
//   1. The first error stays: after it every Finish fails with it, as CUDA itself goes on failing.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/worker/block_memory.h"

namespace larder::worker {

// OK; RESOURCE_EXHAUSTED for memory, FAILED_PRECONDITION for no driver or device, else INTERNAL.
absl::Status FromCuda(cudaError_t error, absl::string_view what);

// Memory of the device, or of the host in pages that the device copies from by itself.
class GpuBuffer {
 public:
  GpuBuffer() = default;
  static absl::StatusOr<GpuBuffer> Device(size_t bytes);  // content undefined, aligned to 256 bytes
  static absl::StatusOr<GpuBuffer> Pinned(size_t bytes);

  // At least `bytes` from now on, content undefined; nothing under way may still use the old ones.
  absl::Status Grow(size_t bytes, absl::StatusOr<GpuBuffer> (*allocate)(size_t));

  size_t bytes() const { return bytes_; }
  template <typename T>
  T* As() const {
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  using Memory = std::unique_ptr<std::byte, void (*)(std::byte*)>;
  GpuBuffer(Memory memory, size_t bytes) : memory_(std::move(memory)), bytes_(bytes) {}

  Memory memory_{nullptr, nullptr};
  size_t bytes_ = 0;
};

// Launches that were captured, to be launched as one.
using GpuGraph =
    std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, cudaError_t (*)(cudaGraphExec_t)>;

class Gpu final : public BlockMemory {
 public:
  // The first device that CUDA_VISIBLE_DEVICES leaves.
  static absl::StatusOr<std::unique_ptr<Gpu>> Open();
  ~Gpu() override;

  cudaStream_t stream() const { return stream_; }
  int32_t multiprocessors() const { return multiprocessors_; }
  const std::string& name() const { return name_; }  // "sm_90": what bits depend on

  // Notes an error; what follows it may still be started and means nothing.
  void Check(cudaError_t error, const char* what) { Check(FromCuda(error, what)); }
  void Check(const absl::Status& status) { failed_.Update(status); }
  bool ok() const { return failed_.ok(); }
  // What `launch` launches on the stream, as a graph; nothing of it runs. Arguments are taken by
  // value, so memory that they point at must stay. What goes wrong meanwhile is this call's error,
  // not the Gpu's: INTERNAL or RESOURCE_EXHAUSTED.
  absl::StatusOr<GpuGraph> Capture(absl::FunctionRef<void()> launch);
  // Waits for the stream. OK, or the first error of all.
  absl::Status Finish();

  std::optional<DeviceUuid> device() const override { return uuid_; }
  absl::StatusOr<std::shared_ptr<std::byte>> Allocate(uint64_t bytes) override;
  void Copy(std::byte* to, const std::byte* from, uint64_t bytes) override;

 private:
  Gpu(cudaStream_t stream, int32_t multiprocessors, std::string name, DeviceUuid uuid)
      : stream_(stream), multiprocessors_(multiprocessors), name_(std::move(name)), uuid_(uuid) {}

  const cudaStream_t stream_;
  const int32_t multiprocessors_;
  const std::string name_;
  const DeviceUuid uuid_;
  absl::Status failed_;
};

}  // namespace larder::worker
