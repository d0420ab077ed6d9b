// RpcContext: what every handler works on. Built once by the composition root.
//
// Thread safety: immutable; what it refers to is thread-safe and outlives the server.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/cache/cache.h"
#include "server/rpc/call_stats.h"
#include "server/rpc/sessions.h"

namespace larder {

// For people; the cache does not know it.
struct TierDescription {
  std::string backend = "none";   // "cuda", "emulated", "memfd", "file"
  std::string health = "ABSENT";  // "OK", "DEGRADED: why"
  std::string io = {};            // NVME: how its file is read and written
  uint32_t ranks = 1;             // GPU: how many memories
};

struct RpcContext {
  Cache& cache;
  Sessions& sessions;
  CallStats& calls;

  uint64_t boot_id = 0;
  // Of Puts with their bytes, all together; two of the largest.
  uint64_t inline_bytes_max = uint64_t{512} << 20;
  std::string handover_socket;
  std::string version;
  absl::Time started;

  // The bytes of GPU, by rank, and of HOST. None: not readable here.
  std::vector<std::span<std::byte>> gpus;
  std::span<std::byte> host;
  // Copies from the memory of a rank that is a device's: from `offset` in it, as many bytes as
  // `to` has. `done` is called from another thread. Null where `gpus` are, or no GPU tier is.
  std::function<void(uint32_t rank, uint64_t offset, std::span<std::byte> to,
                     std::function<void(absl::Status)> done)>
      read_gpu;
  std::function<std::array<TierDescription, kTierCount>()> describe_tiers;

  // A block's bytes from `offset` on, as far as they lie together: in HOST to the block's end, in
  // GPU to the end of that rank's part. Empty: not readable here.
  std::span<std::byte> BytesOf(const Model& model, SlotRef ref, uint64_t offset) const {
    if (ref.tier == Tier::kHost && !host.empty()) {
      return host.subspan(ref.slot.offset(), model.WholeBlockBytes()).subspan(offset);
    }
    const uint64_t rank = offset / model.block_bytes;
    if (ref.tier != Tier::kGpu || rank >= gpus.size()) return {};
    return gpus[rank]
        .subspan(ref.slot.offset(), model.block_bytes)
        .subspan(offset % model.block_bytes);
  }
};

}  // namespace larder
