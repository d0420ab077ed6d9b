// FlushReactor: waits until every block of a lease is durable, or the call's deadline.
//
// Thread safety: see waiting_reactor.h.
//
// Invariants:
//   1. The cache's flush completes or is cancelled before the call ends.
#pragma once

#include "larder/v1/kv_cache.pb.h"
#include "server/rpc/context.h"
#include "server/rpc/waiting_reactor.h"

namespace larder {

class FlushReactor final : public WaitingReactor {
 public:
  FlushReactor(const RpcContext& context, const v1::FlushRequest& request,
               v1::LeaseState& response);

 private:
  void Advance(uint32_t signals) override;
  void Cancelled() override;
  void Start();

  const RpcContext& context_;
  const v1::FlushRequest& request_;
  v1::LeaseState& response_;

  absl::Status flushed_;  // written before kStepNews, read after it
  FlushId flush_ = 0;     // touched by Step only
};

}  // namespace larder
