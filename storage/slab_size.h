// SlabSize: the unit in which models take from a tier.
//
// Thread safety: a pure function.
#pragma once

#include <algorithm>
#include <cstdint>

namespace larder {

// A 64th of the tier in steps of 2 MiB, but at least 32 MiB or, in a tier that is smaller than
// four of those, a quarter (at least 2 MiB, or all of it): 8 MiB are four slabs, 1 GiB is 32,
// 1 TiB is 64 of 16 GiB. Fewer and larger slabs waste less on blocks that do not divide them;
// more let more models in. A block must fit into a slab.
inline uint64_t SlabSize(uint64_t tier_bytes) {
  constexpr uint64_t kStep = uint64_t{2} << 20;
  constexpr uint64_t kLeast = uint64_t{32} << 20;
  const auto in_steps = [](uint64_t bytes) { return (bytes + kStep - 1) / kStep * kStep; };
  const uint64_t least = std::min(kLeast, in_steps(tier_bytes / 4));
  return std::min(tier_bytes, std::max(in_steps(tier_bytes / 64), least));
}

}  // namespace larder
