// SlabSize: the unit in which models take from a tier.
//
// Thread safety: a pure function.
#pragma once

#include <algorithm>
#include <cstdint>

namespace larder {

// A 64th of the tier, but at least 32 MiB (or all of it), in steps of 2 MiB: 64 MiB are two
// slabs, 1 TiB is 64 of 16 GiB. Fewer and larger slabs waste less on blocks that do not divide
// them; more let more models in.
inline uint64_t SlabSize(uint64_t tier_bytes) {
  constexpr uint64_t kStep = uint64_t{2} << 20;
  constexpr uint64_t kLeast = uint64_t{32} << 20;
  const uint64_t part = (tier_bytes / 64 + kStep - 1) / kStep * kStep;
  return std::min(tier_bytes, std::max(part, kLeast));
}

}  // namespace larder
