#include "server/rpc/inspector_service.h"

#include <limits>
#include <optional>

#include "absl/time/clock.h"
#include "server/rpc/answer.h"
#include "server/rpc/convert.h"
#include "server/rpc/validate.h"

namespace larder {

grpc::ServerUnaryReactor* InspectorService::GetStatus(Context* call, const v1::GetStatusRequest*,
                                                      v1::Status* response) {
  return Answer(call, context_.calls, Method::kGetStatus, [&] {
    ToProto(context_.cache.Stats(), *response);
    response->set_version(context_.version);
    response->set_boot_id(context_.boot_id);
    response->set_uptime_seconds(
        static_cast<uint64_t>(absl::ToInt64Seconds(absl::Now() - context_.started)));
    response->set_draining(context_.sessions.draining());
    const auto tiers = context_.describe_tiers();
    for (int i = 0; i < kTierCount; ++i) {
      response->mutable_tiers(i)->set_backend(tiers[i].backend);
      response->mutable_tiers(i)->set_health(tiers[i].health);
      response->mutable_tiers(i)->set_io(tiers[i].io);
      response->mutable_tiers(i)->set_ranks(tiers[i].ranks);
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* InspectorService::ListModels(Context* call, const v1::ListModelsRequest*,
                                                       v1::ListModelsResponse* response) {
  return Answer(call, context_.calls, Method::kListModels, [&] {
    for (const ModelStats& model : context_.cache.Models()) ToProto(model, *response->add_models());
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* InspectorService::ListSessions(Context* call,
                                                         const v1::ListSessionsRequest* request,
                                                         v1::ListSessionsResponse* response) {
  return Answer(call, context_.calls, Method::kListSessions, [&] {
    for (const SessionInfo& session : context_.cache.Sessions(request->leases())) {
      v1::SessionStatus& out = *response->add_sessions();
      ToProto(session, out);
      out.set_lease_count(session.lease_count);
      if (const auto peer = context_.sessions.PeerOf(session.session)) out.set_pid(peer->pid);
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* InspectorService::Explain(Context* call,
                                                    const v1::ExplainRequest* request,
                                                    v1::ExplainResponse* response) {
  return Answer(call, context_.calls, Method::kExplain, [&]() -> absl::Status {
    if (absl::Status status = Validate(*request); !status.ok()) return status;
    const absl::StatusOr<Model> model = context_.cache.FindModel(request->model_id());
    if (!model.ok()) return model.status();
    const absl::StatusOr<Explanation> explanation =
        context_.cache.Explain(request->model_id(), ToSpan(request->tokens()));
    if (!explanation.ok()) return explanation.status();
    ToProto(*explanation, *response);
    response->set_ignored_tail_tokens(static_cast<uint32_t>(request->tokens_size()) %
                                      model->spec.block_tokens);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* InspectorService::TopPrefixes(Context* call,
                                                        const v1::TopPrefixesRequest* request,
                                                        v1::TopPrefixesResponse* response) {
  return Answer(call, context_.calls, Method::kTopPrefixes, [&]() -> absl::Status {
    if (absl::Status status = Validate(*request); !status.ok()) return status;
    if (request->model_id() != 0) {
      const auto model = context_.cache.FindModel(request->model_id());
      if (!model.ok()) return model.status();
    }
    const uint32_t count = request->count() == 0 ? 20 : request->count();
    for (const TopPrefix& prefix : context_.cache.TopPrefixes(request->model_id(), count)) {
      ToProto(prefix, *response->add_prefixes());
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* InspectorService::Evict(Context* call, const v1::EvictRequest* request,
                                                  v1::EvictResponse* response) {
  return Answer(call, context_.calls, Method::kEvict, [&]() -> absl::Status {
    if (absl::Status status = Validate(*request); !status.ok()) return status;
    if (request->model_id() != 0) {
      const auto model = context_.cache.FindModel(request->model_id());
      if (!model.ok()) return model.status();
    }
    const std::optional<Tier> only = FromProto(request->tier());
    const uint64_t blocks =
        request->blocks() == 0 ? std::numeric_limits<uint64_t>::max() : request->blocks();
    for (const Tier tier : kTiers) {
      if (only && *only != tier) continue;
      const auto [dropped, kept] = context_.cache.Evict(tier, request->model_id(), blocks);
      response->set_evicted_blocks(response->evicted_blocks() + dropped);
      response->set_kept_blocks(response->kept_blocks() + kept);
    }
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* InspectorService::Echo(Context* call, const v1::EchoRequest* request,
                                                 v1::EchoResponse* response) {
  return Answer(call, context_.calls, Method::kEcho, [&]() -> absl::Status {
    if (absl::Status status = Validate(*request); !status.ok()) return status;
    response->mutable_payload()->assign(request->response_bytes(), '\0');
    return absl::OkStatus();
  });
}

}  // namespace larder
