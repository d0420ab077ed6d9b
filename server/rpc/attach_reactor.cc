#include "server/rpc/attach_reactor.h"

#include <memory>
#include <utility>

#include "server/rpc/validate.h"

namespace larder {

AttachReactor::AttachReactor(const RpcContext& context, const v1::AttachRequest& request)
    : StreamReactor(context.calls, Method::kAttach), context_(context), request_(request) {}

void AttachReactor::SendDraining(absl::Duration grace) {
  grace_ms_.store(static_cast<uint32_t>(absl::ToInt64Milliseconds(grace)));
  Signal(kStepDraining);
}

void AttachReactor::Close(const absl::Status& why) {
  {
    absl::MutexLock lock(&mu_);
    why_.Update(why);
  }
  Signal(kStepClose);
}

absl::Status AttachReactor::Start() {
  if (absl::Status status = Validate(request_); !status.ok()) return status;
  const absl::StatusOr<SessionId> session = context_.sessions.Open(
      request_.worker(), std::static_pointer_cast<AttachReactor>(shared_from_this()));
  if (!session.ok()) return session.status();
  session_ = *session;
  return absl::OkStatus();
}

void AttachReactor::Advance(uint32_t signals) {
  if ((signals & kStepStart) != 0) {
    if (absl::Status status = Start(); !status.ok()) {
      End(status);
      return;
    }
    asked_ |= signals;
    v1::AttachEvent::Attached& attached = *event_.mutable_attached();
    attached.set_session_id(session_);
    attached.set_boot_id(context_.boot_id);
    attached.set_handover_socket(context_.handover_socket);
    Write(event_);
    return;
  }
  asked_ |= signals;
  if ((asked_ & kStepDraining) != 0) {
    asked_ &= ~uint32_t{kStepDraining};
    event_.mutable_draining()->set_grace_ms(grace_ms_.load());
    Write(event_);
    return;
  }
  if ((asked_ & kStepClose) != 0) {
    absl::MutexLock lock(&mu_);
    End(why_);
  }
}

void AttachReactor::Ended() {
  if (session_ != 0) context_.sessions.StreamEnded(session_);
}

}  // namespace larder
