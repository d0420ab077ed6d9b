// PathHold: a lease of the daemon's own on a path, for as long as a call reads its blocks.
//
// Thread safety: immutable; shared by whatever still reads the blocks, e.g. slices that gRPC
// has not sent yet. The last owner lets go, on any thread.
//
// Invariants:
//   1. The lease is nobody else's: what the client does to its own lease or session does not
//      move it, and its ids are known to nobody.
//   2. It dies before the cache and the sessions.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "larder/v1/kv_cache.pb.h"
#include "server/cache/cache.h"
#include "server/rpc/sessions.h"

namespace larder {

class PathHold {
 public:
  // The blocks that `selector` names: a fork of its lease, or a lease on what is cached of its
  // tokens. Errors: those of LookupPrefix and Fork.
  static absl::StatusOr<std::shared_ptr<PathHold>> Of(Cache& cache, Sessions& sessions,
                                                      const v1::BlockSelector& selector);
  static absl::StatusOr<std::shared_ptr<PathHold>> OfLease(Cache& cache, Sessions& sessions,
                                                           SessionId session, LeaseId lease);
  static absl::StatusOr<std::shared_ptr<PathHold>> OfPrefix(Cache& cache, Sessions& sessions,
                                                            ModelId model,
                                                            std::span<const uint32_t> tokens);
  PathHold(const PathHold&) = delete;
  PathHold& operator=(const PathHold&) = delete;

  SessionId session() const { return hold_.session(); }
  LeaseId lease() const { return lease_; }
  uint32_t blocks() const { return blocks_; }  // the lease's end when it was made
  bool on_nvme() const { return on_nvme_; }    // OfPrefix: some of them must be brought up

 private:
  PathHold(Sessions::Hold hold, LeaseId lease, uint32_t blocks, bool on_nvme)
      : hold_(std::move(hold)), lease_(lease), blocks_(blocks), on_nvme_(on_nvme) {}

  const Sessions::Hold hold_;  // the lease ends with its session
  const LeaseId lease_;
  const uint32_t blocks_;
  const bool on_nvme_;
};

}  // namespace larder
