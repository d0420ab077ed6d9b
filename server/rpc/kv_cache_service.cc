#include "server/rpc/kv_cache_service.h"

#include <memory>
#include <vector>

#include "server/rpc/answer.h"
#include "server/rpc/attach_reactor.h"
#include "server/rpc/convert.h"
#include "server/rpc/download_reactor.h"
#include "server/rpc/flush_reactor.h"
#include "server/rpc/prefetch_reactor.h"
#include "server/rpc/put_reactor.h"
#include "server/rpc/validate.h"

namespace larder {
namespace {

// Fills `out` if there is a result, and says whether there is one.
template <typename Result, typename Message>
absl::Status Encode(const absl::StatusOr<Result>& result, Message& out) {
  if (result.ok()) ToProto(*result, out);
  return result.status();
}

}  // namespace

grpc::ServerUnaryReactor* KvCacheService::OpenModel(Context* call,
                                                    const v1::OpenModelRequest* request,
                                                    v1::Model* response) {
  return Answer(call, context_.calls, Method::kOpenModel, [&]() -> absl::Status {
    if (absl::Status status = Validate(*request); !status.ok()) return status;
    return Encode(context_.cache.OpenModel(FromProto(request->spec())), *response);
  });
}

grpc::ServerWriteReactor<v1::AttachEvent>* KvCacheService::Attach(
    Context*, const v1::AttachRequest* request) {
  return AttachReactor::Run(std::make_shared<AttachReactor>(context_, *request));
}

grpc::ServerUnaryReactor* KvCacheService::LookupPrefix(Context* call,
                                                       const v1::LookupPrefixRequest* request,
                                                       v1::LookupPrefixResponse* response) {
  return Answer(call, context_.calls, Method::kLookupPrefix, [&]() -> absl::Status {
    if (absl::Status status = Validate(*request); !status.ok()) return status;
    if (!request->peek()) {
      if (absl::Status status = context_.sessions.CheckAdmits(); !status.ok()) return status;
    }
    LookupOptions options;
    options.lease = request->lease_id();
    options.peek = request->peek();
    options.prefill_tokens_per_second = request->prefill_tokens_per_second();
    const absl::StatusOr<LookupResult> result = context_.cache.Lookup(
        request->session_id(), request->model_id(), ToSpan(request->tokens()), options);
    return Encode(result, *response);
  });
}

grpc::ServerWriteReactor<v1::PrefetchEvent>* KvCacheService::Prefetch(
    Context*, const v1::PrefetchRequest* request) {
  return PrefetchReactor::Run(std::make_shared<PrefetchReactor>(context_, *request));
}

grpc::ServerUnaryReactor* KvCacheService::Reserve(Context* call, const v1::ReserveRequest* request,
                                                  v1::ReserveResponse* response) {
  return Answer(call, context_.calls, Method::kReserve, [&]() -> absl::Status {
    if (absl::Status status = Validate(*request); !status.ok()) return status;
    if (absl::Status status = context_.sessions.CheckAdmits(); !status.ok()) return status;
    const absl::StatusOr<std::vector<SlotRun>> runs =
        context_.cache.Reserve(request->session_id(), request->lease_id(), request->position(),
                               request->count(), FromProto(request->tier()));
    if (runs.ok()) ToProto(*runs, *response->mutable_runs());
    return runs.status();
  });
}

grpc::ServerUnaryReactor* KvCacheService::Put(Context* call, const v1::PutRequest* request,
                                              v1::LeaseState* response) {
  absl::Status status = Validate(*request);
  if (status.ok() && !request->data().empty()) {
    status = context_.sessions.CheckAdmits();
    if (status.ok()) {
      absl::StatusOr<InlineQuota::Hold> hold = inline_quota_.Take(request->data().size());
      if (hold.ok()) {
        return WaitingReactor::Run(
            std::make_shared<PutReactor>(context_, *request, *response, *std::move(hold)));
      }
      status = hold.status();
    }
  }
  return Answer(call, context_.calls, Method::kPut, [&]() -> absl::Status {
    if (!status.ok()) return status;
    return Encode(context_.cache.Put(request->session_id(), request->lease_id(),
                                     request->position(), ToSpan(request->tokens())),
                  *response);
  });
}

grpc::ServerUnaryReactor* KvCacheService::Flush(Context*, const v1::FlushRequest* request,
                                                v1::LeaseState* response) {
  return WaitingReactor::Run(std::make_shared<FlushReactor>(context_, *request, *response));
}

grpc::ServerUnaryReactor* KvCacheService::Truncate(Context* call,
                                                   const v1::TruncateRequest* request,
                                                   v1::LeaseState* response) {
  return Answer(call, context_.calls, Method::kTruncate, [&] {
    return Encode(
        context_.cache.Truncate(request->session_id(), request->lease_id(), request->position()),
        *response);
  });
}

grpc::ServerUnaryReactor* KvCacheService::Fork(Context* call, const v1::ForkRequest* request,
                                               v1::LeaseState* response) {
  return Answer(call, context_.calls, Method::kFork, [&]() -> absl::Status {
    if (absl::Status status = context_.sessions.CheckAdmits(); !status.ok()) return status;
    return Encode(context_.cache.Fork(request->session_id(), request->lease_id()), *response);
  });
}

grpc::ServerUnaryReactor* KvCacheService::Release(Context* call, const v1::ReleaseRequest* request,
                                                  v1::ReleaseResponse*) {
  return Answer(call, context_.calls, Method::kRelease, [&] {
    return context_.cache.Release(request->session_id(), request->lease_id(),
                                  request->session_over());
  });
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* KvCacheService::Download(
    Context*, const grpc::ByteBuffer* request) {
  return DownloadReactor::Run(std::make_shared<DownloadReactor>(context_, *request));
}

}  // namespace larder
