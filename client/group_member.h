// GroupMember: one rank of a tensor-parallel group other than its lead.
//
// A group has one session and one block table. Its lead has the Session and the leases; it sends
// Session::group() to the members once, and Lease::Runs() whenever blocks were looked up,
// prefetched or reserved, by whatever the group talks with (a v1::Run serialises itself). Each
// rank then reads and writes its own part of each block in place. The lead puts once all ranks
// have written, and releases once all have read.
//
//   lead     NewSession ---group()---> member   Join
//            Reserve    ---Runs()----> member   Part(run, i), write
//            Put        <--written---  member
//
// Thread safety: thread-safe, except for moves and destruction.
//
// Invariants:
//   1. A member holds arenas and makes no call: it sees no loss of the session, which the lead
//      tells it of. It must go then: memory of a device stays allocated as long as it has it open.
//   2. Whatever the group holds goes to nobody else while this process lives, even when the lead
//      dies: the daemon keeps a lost session's blocks until the last process of it is gone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/device_arena.h"
#include "larder/v1/types.pb.h"
#include "storage/handover.h"

namespace larder {
inline namespace client {

// What a member needs to know of the lead's session.
struct Group {
  std::string handover_socket;
  uint64_t boot_id = 0;
  uint64_t session_id = 0;
};

class GroupMember {
 public:
  // Maps the arenas of the lead's session. `model`: the lead's. INVALID_ARGUMENT for a rank the
  // model has no shard for; NOT_FOUND when the session is over; else the errors of the hand-over.
  static absl::StatusOr<GroupMember> Join(const Group& group, const v1::Model& model,
                                          uint32_t rank,
                                          absl::Duration timeout = absl::Seconds(5));

  uint32_t rank() const { return rank_; }

  // This rank's part of block `index` of a run of the lead's. OUT_OF_RANGE past the run's
  // blocks, FAILED_PRECONDITION for a run on NVME or an arena that is not mapped.
  absl::StatusOr<std::span<std::byte>> Part(const v1::Run& run, uint32_t index) const;

  // A whole mapped arena; empty where it is not mapped or is a device's memory.
  std::span<std::byte> Arena(uint32_t arena) const;
  // This rank's GPU arena in a device's memory is arena `run.arena + rank`; offsets of a run count
  // from its address. Errors as DeviceArenas::Open.
  absl::StatusOr<DeviceArena> Device(uint32_t arena) const { return devices_->Open(arena); }

 private:
  GroupMember(HandoverArenas handover, uint64_t boot_id, uint64_t part_bytes, uint32_t rank)
      : handover_(std::move(handover)),
        devices_(std::make_unique<DeviceArenas>(handover_.descriptions, boot_id)),
        part_bytes_(part_bytes),
        rank_(rank) {}

  HandoverArenas handover_;
  std::unique_ptr<DeviceArenas> devices_;
  uint64_t part_bytes_;
  uint32_t rank_;
};

}  // namespace client
}  // namespace larder
