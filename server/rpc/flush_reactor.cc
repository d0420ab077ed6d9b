#include "server/rpc/flush_reactor.h"

#include <memory>
#include <utility>

#include "server/rpc/convert.h"

namespace larder {

FlushReactor::FlushReactor(const RpcContext& context, const v1::FlushRequest& request,
                           v1::LeaseState& response)
    : WaitingReactor(context.calls, Method::kFlush),
      context_(context),
      request_(request),
      response_(response) {}

void FlushReactor::Start() {
  const absl::StatusOr<FlushId> id = context_.cache.Flush(
      request_.session_id(), request_.lease_id(),
      [self = std::static_pointer_cast<FlushReactor>(shared_from_this())](absl::Status status) {
        self->flushed_ = std::move(status);
        self->Signal(kStepNews);
      });
  if (!id.ok()) {
    End(id.status());
    return;
  }
  flush_ = *id;
}

void FlushReactor::Advance(uint32_t signals) {
  if ((signals & kStepStart) != 0) Start();
  if ((signals & kStepNews) == 0) return;
  if (!flushed_.ok()) {
    End(flushed_);
    return;
  }
  const absl::StatusOr<LeaseState> state =
      context_.cache.GetLease(request_.session_id(), request_.lease_id());
  if (state.ok()) ToProto(*state, response_);
  End(state.status());
}

void FlushReactor::Cancelled() {
  // False: it has completed; its news finds the call ended.
  if (flush_ != 0) context_.cache.CancelFlush(flush_);
}

}  // namespace larder
