// The hand-over socket: gives sessions the descriptors of the arenas and watches who got them.
// The protocol is proto/larder/v1/handover.h.
//
//   connection:  request read --AuthorizeFn--> holder noted --> reply and descriptors --> open
//   session:     first holder noted .............................. last holder gone --> GoneFn
//
// A holder is a process that was sent the arenas. A pidfd tells when it is gone; where none is
// to be had (a pid in a foreign namespace, on kernels before 6.5) the connection's end plus a
// grace period stands in. The connection's end of a process with a pidfd proves nothing.
//
// Thread safety: thread-safe. AuthorizeFn and GoneFn run on the server's own thread, one at a
// time and without a lock held; they must not block.
//
// Invariants:
//   1. Descriptors are sent only after the holder is noted: whoever sees PeerOf() == nullopt
//      after it made AuthorizeFn refuse a session knows that nobody has or will get its arenas.
//   2. GoneFn is called exactly once for each session that PeerOf ever named or whose arenas
//      were sent, and never for another. AuthorizeFn must refuse a session from then on.
//   3. No client can hold up another: reads and writes never block, a request has
//      Options::request_timeout, connections are bounded.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/larder/v1/handover.h"
#include "storage/arena.h"
#include "storage/unique_fd.h"

namespace larder {

// Who is at the other end of a connected unix socket.
struct PeerProcess {
  int64_t pid = 0;  // 0: not visible from this pid namespace
  UniqueFd pidfd;   // none: foreign
};

// UNAVAILABLE: the process is gone already, or no descriptor was to be had for it.
absl::StatusOr<PeerProcess> ProbePeer(int socket);

class HandoverServer {
 public:
  struct ArenaExport {
    wire::HandoverArena description;  // Arena::Description, with its number and tier
    int fd = -1;  // of kMemfd arenas; borrowed, must outlive the server
  };
  using ProbeFn = std::function<absl::StatusOr<PeerProcess>(int socket)>;

  struct Options {
    std::string socket_path;  // a leading '@' means the abstract namespace, which has no mode
    mode_t mode = 0660;
    uint64_t boot_id = 0;
    std::vector<ArenaExport> arenas;  // at most wire::kHandoverArenasMax
    int connections_max = 4096;
    absl::Duration foreign_grace = absl::Seconds(10);
    absl::Duration request_timeout = absl::Seconds(3);
    ProbeFn probe = ProbePeer;  // replaced by tests that play a foreign pid namespace
  };

  struct Peer {
    int64_t pid = 0;       // of the first process that got the arenas
    bool foreign = false;  // watched by its connection only
  };

  using AuthorizeFn = std::function<bool(uint64_t session_id)>;
  using GoneFn = std::function<void(uint64_t session_id)>;

  // Listens. The socket file of a dead daemon is replaced; FAILED_PRECONDITION when a live
  // one listens there or the path is something else than a socket; INVALID_ARGUMENT for a
  // path that is too long or too many arenas.
  static absl::StatusOr<std::unique_ptr<HandoverServer>> Start(Options options,
                                                               AuthorizeFn authorize, GoneFn gone);

  // Closes every connection and removes the socket file. GoneFn is not called any more.
  ~HandoverServer();
  HandoverServer(const HandoverServer&) = delete;
  HandoverServer& operator=(const HandoverServer&) = delete;

  // nullopt: nobody has the arenas by this session (never mapped, or GoneFn was called).
  std::optional<Peer> PeerOf(uint64_t session_id) const;
  // Some process that was sent the arenas lives.
  bool AnyHolder() const;

 private:
  class Impl;
  explicit HandoverServer(std::unique_ptr<Impl> impl);
  const std::unique_ptr<Impl> impl_;
};

// What a client got. Keep `connection` open as long as the session lives.
struct HandoverArenas {
  // By Run.arena; null: no such arena, or none that is mapped. A device's memory is opened by its
  // description, by whoever runs kernels (CudaArena::Import): it takes a context.
  std::vector<std::unique_ptr<Arena>> arenas;
  std::vector<wire::HandoverArena> descriptions;  // as sent
  UniqueFd connection;
};

// The client's side. UNAVAILABLE: nobody listens; DEADLINE_EXCEEDED: no answer in `timeout`;
// NOT_FOUND: no such session of this boot; RESOURCE_EXHAUSTED: too many connections;
// INTERNAL: the answer makes no sense.
absl::StatusOr<HandoverArenas> ConnectHandover(const std::string& path, uint64_t boot_id,
                                               uint64_t session_id,
                                               absl::Duration timeout = absl::Seconds(5));

}  // namespace larder
