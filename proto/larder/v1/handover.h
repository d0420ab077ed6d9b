// The hand-over socket: how a session gets the memory its offsets point into.
//
// File descriptors cannot travel over gRPC, so `AttachEvent.attached.handover_socket` names
// a second unix stream socket (a path; a leading '@' means Linux's abstract namespace):
//
//   1. The client connects and sends one HandoverRequest.
//   2. The daemon answers with one HandoverReply. When status is kHandoverOk the reply
//      carries, as SCM_RIGHTS, one file descriptor for each arena of kind kMemfd, in the
//      order of `arenas`.
//   3. The connection stays open for the life of the session. The daemon learns from it
//      which process maps the arenas (SO_PEERCRED, pidfd) and keeps the session's pins
//      until that process is gone, not merely until this socket is closed.
//
// Group session: the workers of a tensor-parallel group share one session. One of them, the
// lead, attaches, calls KvCache and passes session id, boot id and the socket's name on to the
// others, its members (by whatever the group talks with). Every process of the group does steps
// 1 to 3 for itself with the same ids, before the lead reserves; what was leased, read or
// reserved stays as it is until the last of these processes is gone.
//
// All integers are little-endian; the structs have no padding. Anything that is not a
// HandoverRequest with the right magic and a live session of this boot is answered with
// an error reply and closed. Map the descriptors close-on-exec and MADV_DONTFORK.
#pragma once

#include <cstdint>

namespace larder::wire {

inline constexpr uint64_t kHandoverMagic = 0x3156'4f48'5241'4c31;  // "1LARHOV1"

enum HandoverStatus : uint32_t {
  kHandoverOk = 0,
  kHandoverBadRequest = 1,      // magic or size is wrong
  kHandoverUnknownSession = 2,  // no live session of that id and boot id
  kHandoverBusy = 3,            // too many connections
};

enum HandoverArenaKind : uint32_t {
  kMemfd = 0,    // shared memory; a descriptor comes with the reply
  kCudaIpc = 1,  // cudaIpcMemHandle_t of the arena's base, opened on `device_uuid`
};

struct HandoverRequest {
  uint64_t magic = kHandoverMagic;
  uint64_t boot_id = 0;     // AttachEvent.attached.boot_id
  uint64_t session_id = 0;  // AttachEvent.attached.session_id
};
static_assert(sizeof(HandoverRequest) == 24);

struct HandoverArena {
  uint32_t arena = 0;  // the index that runs refer to: Run.arena + rank for GPU, Run.arena for HOST
  uint32_t tier = 0;   // larder.v1.Tier
  uint32_t kind = 0;   // HandoverArenaKind
  uint32_t rank = 0;   // GPU: whose memory this is. HOST: 0, it holds the parts of all ranks
  uint64_t bytes = 0;  // of the whole arena; offsets of runs are below it
  uint8_t device_uuid[16] = {};
  uint8_t ipc_handle[64] = {};
};
static_assert(sizeof(HandoverArena) == 104);

inline constexpr int kGpuRanksMax = 16;
inline constexpr int kHandoverArenasMax = kGpuRanksMax + 1;  // GPU: 0 + rank, and HOST
inline constexpr uint32_t kHostArena = kGpuRanksMax;

struct HandoverReply {
  uint64_t magic = kHandoverMagic;
  uint32_t status = kHandoverOk;
  uint32_t arena_count = 0;
  HandoverArena arenas[kHandoverArenasMax];
};
static_assert(sizeof(HandoverReply) == 16 + kHandoverArenasMax * 104);

}  // namespace larder::wire
