// WaitingReactor: a unary call whose answer has to wait for moves.
//
// Thread safety: gRPC's reactions only leave signals (steps.h); everything else runs in Step.
//
// Invariants:
//   1. Finish is called exactly once, also when cancelled; news after it is ignored.
//   2. The reactor owns itself from Run to OnDone; request and response live as long.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <utility>

#include "server/rpc/call_stats.h"
#include "server/rpc/status.h"
#include "server/rpc/steps.h"

namespace larder {

class WaitingReactor : public grpc::ServerUnaryReactor, public Steps {
 public:
  // Starts the call. What it returns is for gRPC.
  static grpc::ServerUnaryReactor* Run(std::shared_ptr<WaitingReactor> reactor) {
    WaitingReactor* const raw = reactor.get();
    raw->self_ = std::move(reactor);
    raw->Signal(kStepStart);
    return raw;
  }

 protected:
  WaitingReactor(CallStats& stats, Method method) : timer_(stats, method) {}

  // Goes on: waits for more news or ends.
  virtual void Advance(uint32_t signals) = 0;
  // The call is cancelled: let go of what is waited for. Finish follows.
  virtual void Cancelled() = 0;

  void End(const absl::Status& status) {
    ended_ = true;
    timer_.End(status.code());
    Finish(ToGrpc(status));
  }

 private:
  void Step(uint32_t signals) final {
    if (ended_) return;
    if ((signals & kStepCancelled) != 0) {
      Cancelled();
      End(absl::CancelledError("cancelled by the client, or its deadline has passed"));
      return;
    }
    Advance(signals);
  }

  void OnCancel() final { Signal(kStepCancelled); }
  void OnDone() final { self_.reset(); }

  const CallTimer timer_;
  std::shared_ptr<WaitingReactor> self_;  // set before the first signal, reset by OnDone
  bool ended_ = false;                    // touched by Step only
};

}  // namespace larder
