// Session: one worker's connection to larderd. It lives as long as its stream.
//
// Thread safety: Session is thread-safe, except for moves and destruction.
//
// Invariants:
//   1. A session that is lost (the daemon stopped or restarted, or the stream broke) stays
//      lost: its calls and its leases' calls fail with UNAVAILABLE at once, and no block is
//      handed out any more. Open a new session, on the same Client.
//   2. Memory that was handed out stays mapped until the Session and all its leases are
//      destroyed. What was read from it before the loss is good: a lost session keeps its
//      pins until this process is gone, and a dead daemon writes nothing.
//   3. Memory of a device is closed, without a call, once the session is lost (or destroyed) and
//      its last lease is gone: until then a kernel may read it, and as long as it is open the
//      next daemon cannot have it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/device_arena.h"
#include "client/group_member.h"
#include "larder/v1/kv_cache.pb.h"
#include "larder/v1/types.pb.h"

namespace larder {
inline namespace client {

class Lease;
class SessionState;

struct SessionOptions {
  // False: no hand-over. Blocks cannot be read or written in place, only by inline Put and
  // Download; for daemons on another host.
  bool map_arenas = true;
};

struct LookupOptions {
  // The worker's own rate; when set, the match is cut where restoring would take longer.
  double prefill_tokens_per_second = 0;
};

struct PrefetchOptions {
  v1::Tier tier = v1::TIER_UNSPECIFIED;  // GPU or HOST; unspecified: the highest there is
  v1::PrefetchPolicy policy = v1::PREFETCH_POLICY_WAIT_COMPLETE;
  absl::Duration policy_timeout = absl::Seconds(1);    // with PREFETCH_POLICY_TIMEOUT
  absl::Duration deadline = absl::InfiniteDuration();  // of the call; infinite: the client's
};

struct PrefetchResult {
  uint32_t ready_blocks = 0;     // of the path, from its start
  uint32_t promised_blocks = 0;  // where the prefetch was to end
  // Set: the block that could not be read. Truncate the lease to it and compute the rest.
  std::optional<uint32_t> unreadable_position;
};

// Called in the caller's thread for each event, in prefix order.
using PrefetchCallback = std::function<void(const v1::PrefetchEvent&)>;
// Called in the caller's thread; an error ends the download with that error.
using DownloadCallback = std::function<absl::Status(const v1::DownloadChunk&)>;

class Session {
 public:
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  // Ends the session. Leases that still exist are dead from now on.
  ~Session();

  uint64_t id() const;
  uint64_t boot_id() const;  // changes whenever the daemon restarts
  // For the other ranks of a tensor-parallel group, which join this session (group_member.h).
  Group group() const;

  // OK, or the UNAVAILABLE that every call gives since the session was lost.
  absl::Status Health() const;
  bool Alive() const { return Health().ok(); }
  // The daemon announced that it is about to stop; calls that need new leases are refused.
  bool Draining() const;

  // Leases the longest cached prefix of whole blocks, possibly of none.
  absl::StatusOr<Lease> Lookup(const v1::Model& model, std::span<const uint32_t> tokens,
                               const LookupOptions& options = {}) const;

  // A whole mapped arena; empty where it is not mapped or is a device's memory. For kernels, which
  // take a base and offsets (Lease::places).
  std::span<std::byte> Arena(uint32_t arena) const;
  // The same of an arena in a device's memory, opened by the first who asks; to be used while a
  // lease is held (invariant 3). NOT_FOUND: it is none. UNAVAILABLE: the session is lost, and with
  // its daemon the memory. Otherwise why it is not open here: no driver, another device. Read HOST
  // then: Prefetch and Reserve with TIER_HOST.
  absl::StatusOr<DeviceArena> Device(uint32_t arena) const;
  // Whether blocks in GPU are beyond the CPU's reach: put them inline, get them by Download.
  bool HasDeviceArenas() const;

 private:
  friend class Client;
  explicit Session(std::shared_ptr<SessionState> state);

  // Shared with the leases: spans that they gave out must stay mapped.
  std::shared_ptr<SessionState> state_;
};

}  // namespace client
}  // namespace larder
