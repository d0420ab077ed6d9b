// StreamReactor: a server-streaming call that writes when it has news.
//
// Thread safety: gRPC's reactions only leave signals (steps.h); everything else runs in Step.
//
// Invariants:
//   1. One write is outstanding at a time; news that comes meanwhile waits in the signals.
//   2. Finish is called exactly once, also when cancelled, and never while a write is
//      outstanding (a cancelled call completes its write at once).
//   3. The reactor owns itself from Run to OnDone.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <utility>

#include "server/rpc/call_stats.h"
#include "server/rpc/status.h"
#include "server/rpc/steps.h"

namespace larder {

template <typename Message>
class StreamReactor : public grpc::ServerWriteReactor<Message>, public Steps {
 public:
  // Starts the call. What it returns is for gRPC.
  static grpc::ServerWriteReactor<Message>* Run(std::shared_ptr<StreamReactor> reactor) {
    StreamReactor* const raw = reactor.get();
    raw->self_ = std::move(reactor);
    raw->Signal(kStepStart);
    return raw;
  }

 protected:
  StreamReactor(CallStats& stats, Method method) : timer_(stats, method) {}

  // Goes on: writes at most one message or ends. Not called while a write is outstanding or
  // after the end.
  virtual void Advance(uint32_t signals) = 0;
  // The call is cancelled: let go of what is waited for. Finish follows.
  virtual void Cancelled() {}
  // The call is over for gRPC, whatever its end; no thread is inside the reactor's Step.
  virtual void Ended() {}

  // `message` must stay unchanged until the next Advance. `more`: another write follows at
  // once, so gRPC need not send this one by itself.
  void Write(const Message& message, bool more = false) {
    writing_ = true;
    grpc::WriteOptions options;
    if (more) options.set_buffer_hint();
    this->StartWrite(&message, options);
  }
  void End(const absl::Status& status) {
    NoteEnd(status);
    this->Finish(ToGrpc(status));
  }
  // Writes a last message and ends; saves a round through the transport.
  void WriteAndEnd(const Message& message, const absl::Status& status) {
    NoteEnd(status);
    this->StartWriteAndFinish(&message, grpc::WriteOptions(), ToGrpc(status));
  }

 private:
  void NoteEnd(const absl::Status& status) {
    ended_ = true;
    timer_.End(status.code());
  }

  void Step(uint32_t signals) final {
    if ((signals & kStepWritten) != 0) writing_ = false;
    if (ended_) return;
    pending_ |= signals;
    if (writing_) return;
    if ((pending_ & kStepCancelled) != 0) {
      Cancelled();
      End(absl::CancelledError("cancelled by the client, or its deadline has passed"));
      return;
    }
    Advance(std::exchange(pending_, 0u));
  }

  void OnWriteDone(bool ok) final {
    this->Signal(ok ? kStepWritten : kStepWritten | kStepCancelled);
  }
  void OnCancel() final { this->Signal(kStepCancelled); }
  void OnDone() final {
    Ended();
    self_.reset();
  }

  const CallTimer timer_;
  std::shared_ptr<StreamReactor> self_;  // set before the first signal, reset by OnDone

  // Touched by Step only.
  bool writing_ = false;
  bool ended_ = false;
  uint32_t pending_ = 0;
};

}  // namespace larder
