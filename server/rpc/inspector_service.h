// InspectorService: larder.v1.Inspector over a Cache, for people and dashboards.
//
// Thread safety: thread-safe; gRPC calls the methods from its own threads.
#pragma once

#include <grpcpp/grpcpp.h>

#include "larder/v1/inspector.grpc.pb.h"
#include "server/rpc/context.h"

namespace larder {

class InspectorService final : public v1::Inspector::CallbackService {
 public:
  explicit InspectorService(const RpcContext& context) : context_(context) {}

 private:
  using Context = grpc::CallbackServerContext;
  using Unary = grpc::ServerUnaryReactor;

  Unary* GetStatus(Context*, const v1::GetStatusRequest*, v1::Status*) override;
  Unary* ListModels(Context*, const v1::ListModelsRequest*, v1::ListModelsResponse*) override;
  Unary* ListSessions(Context*, const v1::ListSessionsRequest*, v1::ListSessionsResponse*) override;
  Unary* Explain(Context*, const v1::ExplainRequest*, v1::ExplainResponse*) override;
  Unary* TopPrefixes(Context*, const v1::TopPrefixesRequest*, v1::TopPrefixesResponse*) override;
  Unary* Evict(Context*, const v1::EvictRequest*, v1::EvictResponse*) override;
  Unary* Echo(Context*, const v1::EchoRequest*, v1::EchoResponse*) override;

  const RpcContext& context_;
};

}  // namespace larder
