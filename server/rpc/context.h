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
};

struct RpcContext {
  Cache& cache;
  Sessions& sessions;
  CallStats& calls;

  uint64_t boot_id = 0;
  std::string handover_socket;
  std::string version;
  absl::Time started;

  // The bytes of GPU and HOST by Run.arena, which is Index(tier). Empty: not readable here.
  std::array<std::span<std::byte>, 2> arenas;
  std::function<std::array<TierDescription, kTierCount>()> describe_tiers;

  // Where `bytes` of a block in GPU or HOST are.
  std::byte* At(Tier tier, Slot slot) const { return arenas[Index(tier)].data() + slot.offset(); }
};

}  // namespace larder
