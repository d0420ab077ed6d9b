// DeviceArena: a GPU arena in a device's memory, opened in this process.
//
// Thread safety: values and a pure function.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "storage/handover.h"

namespace larder {
inline namespace client {

// For kernels and copies of the device's primary context. The CPU can do nothing with the address.
struct DeviceArena {
  uint64_t address = 0;  // of offset 0; a CUdeviceptr
  uint64_t bytes = 0;
  std::string device;  // "GPU-..." as nvidia-smi -L names it
};

// NOT_FOUND: the arena is no device's memory. Otherwise why it is not open here: no driver,
// another device.
absl::StatusOr<DeviceArena> DeviceArenaIn(const HandoverArenas& handover, uint32_t arena);

}  // namespace client
}  // namespace larder
