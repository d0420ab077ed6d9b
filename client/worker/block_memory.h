// BlockMemory: memory for blocks of K/V that a forward pass reads and writes, and copies within it:
// the host's here, a GPU's in gpu.h.
//
// Thread safety: as the forward pass it belongs to; HostBlockMemory() from any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "absl/status/statusor.h"

namespace larder::worker {

using DeviceUuid = std::array<uint8_t, 16>;

class BlockMemory {
 public:
  virtual ~BlockMemory() = default;

  // The GPU whose kernels read and write it; nothing: it is the host's.
  virtual std::optional<DeviceUuid> device() const = 0;

  // `bytes` > 0 of zeros, aligned to 64 bytes; given back with the last reference, before this
  // object. RESOURCE_EXHAUSTED where there is not so much.
  virtual absl::StatusOr<std::shared_ptr<std::byte>> Allocate(uint64_t bytes) = 0;
  // Copies a block that passes read to one that they write; done when it returns, and before any
  // pass that follows. A device that fails here fails the next pass.
  virtual void Copy(std::byte* to, const std::byte* from, uint64_t bytes) = 0;
};

// The process's own memory; pages are taken as they are used. Outlives everything.
BlockMemory& HostBlockMemory();

}  // namespace larder::worker
