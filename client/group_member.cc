#include "client/group_member.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "client/block_place.h"

namespace larder {
inline namespace client {

absl::StatusOr<GroupMember> GroupMember::Join(const Group& group, const v1::Model& model,
                                              uint32_t rank, absl::Duration timeout) {
  if (rank >= Shards(model)) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank: ", rank, " given, must be less than the model's ", Shards(model),
                     " shards"));
  }
  absl::StatusOr<HandoverArenas> handover =
      ConnectHandover(group.handover_socket, group.boot_id, group.session_id, timeout);
  if (!handover.ok()) return handover.status();
  return GroupMember(*std::move(handover), group.boot_id, model.block_bytes(), rank);
}

absl::StatusOr<std::span<std::byte>> GroupMember::Part(const v1::Run& run, uint32_t index) const {
  if (index >= run.blocks()) {
    return absl::OutOfRangeError(
        absl::StrCat("index: ", index, " given, the run has ", run.blocks(), " blocks"));
  }
  const bool addressed = static_cast<int>(index) < run.offsets_size();
  const BlockPlace place{addressed ? run.tier() : v1::TIER_NVME, run.arena(),
                         addressed ? run.offsets(static_cast<int>(index)) : 0};
  return PartAt(place, rank_, part_bytes_, run.position() + index,
                [this](uint32_t arena) { return Arena(arena); });
}

std::span<std::byte> GroupMember::Arena(uint32_t arena) const {
  if (arena >= handover_.arenas.size() || handover_.arenas[arena] == nullptr) return {};
  return handover_.arenas[arena]->host_bytes();
}

}  // namespace client
}  // namespace larder
