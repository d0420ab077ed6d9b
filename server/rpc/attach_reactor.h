// AttachReactor: the stream that is a session.
//
//   start -> attached -> (nothing, for hours) -> [draining] -> end: the session is lost
//
// Thread safety: thread-safe, as a SessionStream; see stream_reactor.h.
//
// Invariants:
//   1. The session is open in Sessions from the first event to OnDone.
#pragma once

#include <atomic>
#include <cstdint>

#include "absl/synchronization/mutex.h"
#include "larder/v1/kv_cache.pb.h"
#include "server/rpc/context.h"
#include "server/rpc/sessions.h"
#include "server/rpc/stream_reactor.h"

namespace larder {

class AttachReactor final : public StreamReactor<v1::AttachEvent>, public SessionStream {
 public:
  // `request` lives until OnDone.
  AttachReactor(const RpcContext& context, const v1::AttachRequest& request);

  void SendDraining(absl::Duration grace) override;
  void Close(const absl::Status& why) override;

 private:
  void Advance(uint32_t signals) override;
  void Ended() override;
  absl::Status Start();

  const RpcContext& context_;
  const v1::AttachRequest& request_;

  std::atomic<uint32_t> grace_ms_ = 0;
  absl::Mutex mu_;
  absl::Status why_ ABSL_GUARDED_BY(mu_);

  // Touched by Step only.
  SessionId session_ = 0;
  uint32_t asked_ = 0;  // signals not acted upon
  v1::AttachEvent event_;
};

}  // namespace larder
