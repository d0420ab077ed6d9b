// Answer: a unary call that is answered at once.
//
// Thread safety: a function.
#pragma once

#include <grpcpp/grpcpp.h>

#include "absl/status/status.h"
#include "server/rpc/call_stats.h"
#include "server/rpc/status.h"

namespace larder {

// Runs `handle`, records its status and finishes the call with it.
template <typename Handle>
grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, CallStats& calls,
                                 Method method, Handle&& handle) {
  const CallTimer timer(calls, method);
  const absl::Status status = handle();
  timer.End(status.code());
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

}  // namespace larder
