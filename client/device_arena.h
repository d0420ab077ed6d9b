// DeviceArenas: the GPU arenas in devices' memory that a hand-over described, opened in this
// process.
//
// Thread safety: thread-safe.
//
// Invariants:
//   1. An arena is opened when it is first asked for, since that makes a context and takes hundreds
//      of milliseconds; only who runs kernels asks.
//   2. What is open stays so until the object goes. An arena that is not closed stays allocated,
//      whatever became of its daemon.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "storage/arena_cuda.h"

namespace larder {
inline namespace client {

// For kernels and copies of the device's primary context. The CPU can do nothing with the address.
struct DeviceArena {
  uint64_t address = 0;  // of offset 0; a CUdeviceptr
  uint64_t bytes = 0;
  std::string device;  // "GPU-..." as nvidia-smi -L names it
};

class DeviceArenas {
 public:
  // `arenas`: all of a hand-over's; those in shared memory are left out.
  DeviceArenas(const std::vector<wire::HandoverArena>& arenas, uint64_t boot_id);

  bool empty() const { return descriptions_.empty(); }

  // NOT_FOUND: the arena is no device's memory. Otherwise why it is not open here, the first
  // answer for ever: no driver, another device.
  absl::StatusOr<DeviceArena> Open(uint32_t arena) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  using Opened = absl::StatusOr<std::unique_ptr<CudaArena>>;

  std::map<uint32_t, wire::HandoverArena> descriptions_;  // by Run.arena; constant
  const uint64_t boot_id_;

  absl::Mutex mu_;  // held while one is opened: who else asks needs it as well
  std::map<uint32_t, Opened> opened_ ABSL_GUARDED_BY(mu_);
};

}  // namespace client
}  // namespace larder
