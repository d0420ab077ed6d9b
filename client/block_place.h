// BlockPlace: where a block is, and how a rank finds its part of it.
//
// A block of a model of several shards (tensor-parallel ranks) has a part of
// v1::Model.block_bytes for each. A place says where rank 0's part is:
//
//   GPU   rank r's part is in arena `arena + r`, at the same offset
//   HOST  rank r's part is in the same arena, at offset + r * block_bytes
//
// Thread safety: values and pure functions.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "larder/v1/types.pb.h"

namespace larder {
inline namespace client {

// Unspecified tier: not known here (put inline; look it up again).
struct BlockPlace {
  v1::Tier tier = v1::TIER_UNSPECIFIED;
  uint32_t arena = 0;
  uint64_t offset = 0;  // bytes from the arena's base; meaningless for NVME

  friend bool operator==(const BlockPlace&, const BlockPlace&) = default;
};

inline uint32_t Shards(const v1::Model& model) { return std::max(1u, model.spec().shards()); }
// The parts of all shards together: what is moved, stored and sent inline.
inline uint64_t WholeBlockBytes(const v1::Model& model) {
  return model.block_bytes() * Shards(model);
}

// Rank `rank`'s part, of `part_bytes`, in the arena that `arena_of` names (empty: not mapped).
// FAILED_PRECONDITION for a block that is not in GPU or HOST or whose arena is not mapped,
// INTERNAL for an offset outside of it. `position` is for the message.
absl::StatusOr<std::span<std::byte>> PartAt(
    const BlockPlace& place, uint32_t rank, uint64_t part_bytes, uint32_t position,
    absl::FunctionRef<std::span<std::byte>(uint32_t)> arena_of);

// The blocks from `position` on, as few runs as can say it: what a lead sends to its members.
std::vector<v1::Run> RunsOf(std::span<const BlockPlace> places, uint32_t position);

}  // namespace client
}  // namespace larder
