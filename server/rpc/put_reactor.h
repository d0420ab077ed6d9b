// PutReactor: a Put whose bytes come with it.
//
//   with a lease:     a fork of it, the daemon's own -> Reserve(HOST) -> copy into the arena
//                     -> Put -> the lease follows its fork -> let go
//   without a lease:  a lease of the daemon's own on prefix + tokens -> [bring up what is only on
//                     NVME] -> the same for the blocks that are not cached -> let go
//
// Thread safety: see waiting_reactor.h.
//
// Invariants:
//   1. After an error the lease's end and its reserved blocks are what they were.
//   2. Without a lease, blocks that are cached already are not written again: a retry does
//      nothing.
//   3. Slots are written under the daemon's own lease, whatever becomes of the client's.
#pragma once

#include <memory>
#include <optional>

#include "larder/v1/kv_cache.pb.h"
#include "server/rpc/context.h"
#include "server/rpc/inline_quota.h"
#include "server/rpc/path_hold.h"
#include "server/rpc/waiting_reactor.h"

namespace larder {

class PutReactor final : public WaitingReactor {
 public:
  // `request` is validated and has data.
  PutReactor(const RpcContext& context, const v1::PutRequest& request, v1::LeaseState& response,
             InlineQuota::Hold quota);

 private:
  void Advance(uint32_t signals) override;
  void Cancelled() override;

  void StartOnLease();
  void StartOnPrefix();
  void Poll();
  // Without a lease: publishes what is past block `end` of the daemon's own.
  void PublishFrom(uint32_t end);
  // Publishes the request's blocks from `position` on, on the daemon's own lease.
  absl::StatusOr<LeaseState> Publish(uint32_t position);
  absl::Status CopyIn(const std::vector<SlotRun>& runs, uint32_t position);
  void EndWith(const absl::StatusOr<LeaseState>& state);

  const RpcContext& context_;
  const v1::PutRequest& request_;
  v1::LeaseState& response_;
  const InlineQuota::Hold quota_;  // until the call is over

  // Touched by Step only.
  std::shared_ptr<PathHold> hold_;
  std::optional<PrefetchId> prefetch_;
  Model model_;
};

}  // namespace larder
