#include "client/block_place.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace larder {
inline namespace client {

absl::StatusOr<std::span<std::byte>> PartAt(
    const BlockPlace& place, uint32_t rank, uint64_t part_bytes, uint32_t position,
    absl::FunctionRef<std::span<std::byte>(uint32_t)> arena_of) {
  if (place.tier != v1::TIER_GPU && place.tier != v1::TIER_HOST) {
    return absl::FailedPreconditionError(absl::StrCat("the block at position ", position,
                                                      place.tier == v1::TIER_NVME
                                                          ? " is on NVME: prefetch it first"
                                                          : " was put inline: look it up again"));
  }
  const bool gpu = place.tier == v1::TIER_GPU;
  const uint32_t number = gpu ? place.arena + rank : place.arena;
  const uint64_t offset = gpu ? place.offset : place.offset + rank * part_bytes;
  const std::span<std::byte> arena = arena_of(number);
  if (arena.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("arena ", number, " is not mapped here: use Download"));
  }
  if (offset < place.offset || offset > arena.size() || arena.size() - offset < part_bytes) {
    return absl::InternalError(absl::StrCat("offset ", offset, " of position ", position,
                                            " is outside of arena ", number, ", which has ",
                                            arena.size(), " bytes"));
  }
  return arena.subspan(offset, part_bytes);
}

std::vector<v1::Run> RunsOf(std::span<const BlockPlace> places, uint32_t position) {
  std::vector<v1::Run> runs;
  for (const BlockPlace& place : places) {
    if (runs.empty() || runs.back().tier() != place.tier || runs.back().arena() != place.arena) {
      v1::Run& run = runs.emplace_back();
      run.set_tier(place.tier);
      run.set_arena(place.arena);
      run.set_position(position);
    }
    v1::Run& run = runs.back();
    run.set_blocks(run.blocks() + 1);
    if (place.tier != v1::TIER_NVME) run.add_offsets(place.offset);
    ++position;
  }
  return runs;
}

}  // namespace client
}  // namespace larder
