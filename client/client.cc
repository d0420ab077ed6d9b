#include "client/client.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_format.h"
#include "client/rpc.h"
#include "client/session_state.h"
#include "client/streams.h"

namespace larder {
inline namespace client {
namespace {

using KvStub = v1::KvCache::Stub;
using InspectorStub = v1::Inspector::Stub;

// A unary call that needs no session, and may be the first after a restart of the daemon.
template <typename Stub, typename Request, typename Response>
absl::StatusOr<Response> Call(const Rpc& rpc, Stub& stub,
                              grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&,
                                                           Response*),
                              const Request& request, std::string_view name) {
  rpc.AwaitConnection();
  return rpc.Call(stub, method, request, name, rpc.call_timeout());
}

}  // namespace

std::string DefaultAddress() {
  const char* const address = std::getenv("LARDER_ADDRESS");
  return address != nullptr && *address != '\0' ? address : "unix:/run/larder/larderd.sock";
}

Client::Client(std::shared_ptr<Rpc> rpc) : rpc_(std::move(rpc)) {}
Client::Client(Client&&) noexcept = default;
Client& Client::operator=(Client&&) noexcept = default;
Client::~Client() = default;

absl::StatusOr<Client> Client::Connect(std::string_view address, const ClientOptions& options) {
  absl::StatusOr<std::shared_ptr<Rpc>> rpc =
      Rpc::Connect(address.empty() ? DefaultAddress() : std::string(address),
                   options.connect_timeout, options.call_timeout);
  if (!rpc.ok()) return rpc.status();
  return Client(*std::move(rpc));
}

const std::string& Client::address() const { return rpc_->address(); }

absl::StatusOr<v1::Model> Client::OpenModel(const v1::ModelSpec& spec) const {
  v1::OpenModelRequest request;
  *request.mutable_spec() = spec;
  return Call(*rpc_, rpc_->kv(), &KvStub::OpenModel, request, "OpenModel");
}

absl::StatusOr<v1::Model> Client::FindModel(uint64_t model_id) const {
  absl::StatusOr<v1::ListModelsResponse> models = ListModels();
  if (!models.ok()) return models.status();
  for (v1::ModelStatus& status : *models->mutable_models()) {
    if (status.model().model_id() == model_id) return std::move(*status.mutable_model());
  }
  return absl::NotFoundError(
      absl::StrFormat("no model %016x is open; %d are", model_id, models->models_size()));
}

absl::StatusOr<Session> Client::NewSession(std::string_view worker,
                                           const SessionOptions& options) const {
  absl::StatusOr<std::shared_ptr<SessionState>> state = SessionState::Open(rpc_, worker, options);
  if (!state.ok()) return state.status();
  return Session(*std::move(state));
}

absl::StatusOr<v1::LookupPrefixResponse> Client::Peek(uint64_t model_id,
                                                      std::span<const uint32_t> tokens) const {
  v1::LookupPrefixRequest request;
  request.set_model_id(model_id);
  request.set_peek(true);
  SetTokens(*request.mutable_tokens(), tokens);
  return Call(*rpc_, rpc_->kv(), &KvStub::LookupPrefix, request, "LookupPrefix");
}

absl::StatusOr<PrefetchResult> Client::Prefetch(uint64_t model_id, std::span<const uint32_t> tokens,
                                                const PrefetchOptions& options,
                                                const PrefetchCallback& on_event) const {
  v1::PrefetchRequest request;
  request.mutable_blocks()->set_model_id(model_id);
  SetTokens(*request.mutable_blocks()->mutable_tokens(), tokens);
  rpc_->AwaitConnection();
  return RunPrefetch(*rpc_, std::move(request), options, on_event);
}

absl::StatusOr<v1::LeaseState> Client::Put(const v1::Model& model, std::span<const uint32_t> prefix,
                                           std::span<const uint32_t> tokens,
                                           std::span<const std::byte> data) const {
  v1::PutRequest request;
  request.set_model_id(model.model_id());
  request.set_position(static_cast<uint32_t>(prefix.size() / std::max(model.block_tokens(), 1u)));
  SetTokens(*request.mutable_prefix(), prefix);
  SetTokens(*request.mutable_tokens(), tokens);
  request.mutable_data()->assign(reinterpret_cast<const char*>(data.data()), data.size());
  return Call(*rpc_, rpc_->kv(), &KvStub::Put, request, "Put");
}

absl::Status Client::Download(uint64_t model_id, std::span<const uint32_t> tokens,
                              uint32_t position, uint32_t count, absl::Duration timeout,
                              const DownloadCallback& on_chunk) const {
  v1::DownloadRequest request;
  request.mutable_blocks()->set_model_id(model_id);
  SetTokens(*request.mutable_blocks()->mutable_tokens(), tokens);
  request.set_position(position);
  request.set_count(count);
  rpc_->AwaitConnection();
  return RunDownload(*rpc_, request, timeout, on_chunk);
}

absl::StatusOr<v1::Status> Client::GetStatus() const {
  return Call(*rpc_, rpc_->inspector(), &InspectorStub::GetStatus, v1::GetStatusRequest(),
              "GetStatus");
}

absl::StatusOr<v1::ListModelsResponse> Client::ListModels() const {
  return Call(*rpc_, rpc_->inspector(), &InspectorStub::ListModels, v1::ListModelsRequest(),
              "ListModels");
}

absl::StatusOr<v1::ListSessionsResponse> Client::ListSessions(bool leases) const {
  v1::ListSessionsRequest request;
  request.set_leases(leases);
  return Call(*rpc_, rpc_->inspector(), &InspectorStub::ListSessions, request, "ListSessions");
}

absl::StatusOr<v1::ExplainResponse> Client::Explain(uint64_t model_id,
                                                    std::span<const uint32_t> tokens) const {
  v1::ExplainRequest request;
  request.set_model_id(model_id);
  SetTokens(*request.mutable_tokens(), tokens);
  return Call(*rpc_, rpc_->inspector(), &InspectorStub::Explain, request, "Explain");
}

absl::StatusOr<v1::TopPrefixesResponse> Client::TopPrefixes(uint64_t model_id,
                                                            uint32_t count) const {
  v1::TopPrefixesRequest request;
  request.set_model_id(model_id);
  request.set_count(count);
  return Call(*rpc_, rpc_->inspector(), &InspectorStub::TopPrefixes, request, "TopPrefixes");
}

absl::StatusOr<v1::EvictResponse> Client::Evict(v1::Tier tier, uint64_t model_id,
                                                uint64_t blocks) const {
  v1::EvictRequest request;
  request.set_tier(tier);
  request.set_model_id(model_id);
  request.set_blocks(blocks);
  return Call(*rpc_, rpc_->inspector(), &InspectorStub::Evict, request, "Evict");
}

absl::StatusOr<v1::EchoResponse> Client::Echo(const v1::EchoRequest& request) const {
  return Call(*rpc_, rpc_->inspector(), &InspectorStub::Echo, request, "Echo");
}

}  // namespace client
}  // namespace larder
