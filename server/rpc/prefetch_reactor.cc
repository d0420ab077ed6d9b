#include "server/rpc/prefetch_reactor.h"

#include <chrono>
#include <utility>

#include "server/rpc/convert.h"
#include "server/rpc/validate.h"

namespace larder {

PrefetchReactor::PrefetchReactor(const RpcContext& context, const v1::PrefetchRequest& request)
    : StreamReactor(context.calls, Method::kPrefetch), context_(context), request_(request) {}

absl::Status PrefetchReactor::Start() {
  if (absl::Status status = Validate(request_); !status.ok()) return status;
  SessionId session = request_.blocks().session_id();
  LeaseId lease = request_.blocks().lease_id();
  if (lease == 0) {
    absl::StatusOr<std::shared_ptr<PathHold>> hold =
        PathHold::Of(context_.cache, context_.sessions, request_.blocks());
    if (!hold.ok()) return hold.status();
    hold_ = *std::move(hold);
    session = hold_->session();
    lease = hold_->lease();
  }
  // The cache may outlive this stream's interest; it must not outlive the reactor by it.
  const absl::StatusOr<PrefetchId> id = context_.cache.Prefetch(
      session, lease, FromProto(request_.tier()), [weak = weak_from_this()] {
        if (const auto self = weak.lock()) self->Signal(kStepNews);
      });
  if (!id.ok()) return id.status();
  prefetch_ = *id;
  if (request_.policy() == v1::PREFETCH_POLICY_TIMEOUT) SetAlarm();
  return absl::OkStatus();
}

void PrefetchReactor::SetAlarm() {
  alarm_.Set(std::chrono::system_clock::now() + std::chrono::milliseconds(request_.timeout_ms()),
             [weak = weak_from_this()](bool expired) {
               const auto self = weak.lock();
               if (expired && self != nullptr) self->Signal(kStepTimeout);
             });
}

void PrefetchReactor::Advance(uint32_t signals) {
  if ((signals & kStepStart) != 0) {
    if (absl::Status status = Start(); !status.ok()) {
      End(status);
      return;
    }
  }
  const absl::StatusOr<PrefetchUpdate> update = context_.cache.PollPrefetch(*prefetch_);
  if (!update.ok()) {
    prefetch_.reset();
    End(update.status());
    return;
  }
  if (update->done) prefetch_.reset();
  const bool last = update->done || (signals & kStepTimeout) != 0 ||
                    request_.policy() == v1::PREFETCH_POLICY_BEST_EFFORT;
  if (!last && reported_ && update->runs.empty()) return;
  reported_ = true;
  event_.Clear();
  ToProto(*update, event_);
  event_.set_done(last);
  if (!last) {
    Write(event_);
    return;
  }
  Cancelled();
  WriteAndEnd(event_, absl::OkStatus());
}

void PrefetchReactor::Cancelled() {
  if (prefetch_) context_.cache.CancelPrefetch(*prefetch_);
  prefetch_.reset();
}

void PrefetchReactor::Ended() {
  alarm_.Cancel();
  hold_.reset();
}

}  // namespace larder
