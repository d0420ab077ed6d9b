// PrefetchReactor: brings blocks up and reports runs as they become readable.
//
//   start -> Cache::Prefetch -> [news -> Poll -> event]* -> last event, end
//
// Thread safety: see stream_reactor.h.
//
// Invariants:
//   1. The cache's prefetch is polled to its end or cancelled, exactly one of them.
//   2. For a prefix instead of a lease, the daemon holds a lease for the life of the stream.
#pragma once

#include <grpcpp/alarm.h>

#include <memory>
#include <optional>

#include "larder/v1/kv_cache.pb.h"
#include "server/rpc/context.h"
#include "server/rpc/path_hold.h"
#include "server/rpc/stream_reactor.h"

namespace larder {

class PrefetchReactor final : public StreamReactor<v1::PrefetchEvent> {
 public:
  // `request` lives until OnDone.
  PrefetchReactor(const RpcContext& context, const v1::PrefetchRequest& request);

 private:
  void Advance(uint32_t signals) override;
  void Cancelled() override;
  void Ended() override;
  absl::Status Start();
  void SetAlarm();

  const RpcContext& context_;
  const v1::PrefetchRequest& request_;

  // Touched by Step, and by Ended after the last one.
  std::shared_ptr<PathHold> hold_;  // of a prefix; null for a lease
  std::optional<PrefetchId> prefetch_;
  grpc::Alarm alarm_;
  bool reported_ = false;  // at least once
  v1::PrefetchEvent event_;
};

}  // namespace larder
