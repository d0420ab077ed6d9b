#include "server/rpc/rpc_server.h"

#include <grpc/grpc.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>

#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "server/rpc/connections.h"

namespace larder {
namespace {

// How long slices that gRPC still refers to are waited for after its server has stopped.
constexpr absl::Duration kHoldsGrace = absl::Seconds(5);

// How long a connection may take to say goodbye once its calls have ended.
constexpr absl::Duration kGoodbyeGrace = absl::Seconds(1);

// What gRPC has of once a process: two plug-ins, and itself, which stays (invariant 3).
void InitGrpc() {
  static const bool kOnce = [] {
    grpc_init();
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    return true;
  }();
  static_cast<void>(kOnce);
}

void SetLimits(grpc::ServerBuilder& builder) {
  builder.SetMaxReceiveMessageSize(RpcServer::kReceiveBytesMax);
  // Two daemons on one port would share its connections.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // A worker's host may vanish without a word; its sessions should not stay for ever.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 60'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10'000);
  // Reflection alone is served synchronously; it needs no more than one thread.
  builder.SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, 1);
  builder.SetSyncServerOption(grpc::ServerBuilder::MIN_POLLERS, 1);
  builder.SetSyncServerOption(grpc::ServerBuilder::MAX_POLLERS, 1);
}

}  // namespace

absl::StatusOr<std::unique_ptr<RpcServer>> RpcServer::Start(
    const RpcContext& context, const std::vector<std::string>& addresses) {
  InitGrpc();
  auto server = std::unique_ptr<RpcServer>(new RpcServer(context, addresses));
  grpc::ServerBuilder builder;
  SetLimits(builder);
  for (size_t i = 0; i < addresses.size(); ++i) {
    builder.AddListeningPort(addresses[i], grpc::InsecureServerCredentials(), &server->ports_[i]);
  }
  builder.RegisterService(&server->kv_cache_);
  builder.RegisterService(&server->inspector_);
  server->server_ = builder.BuildAndStart();
  if (server->server_ != nullptr) {
    const absl::MutexLock lock(&server->mu_);
    server->health_ = server->server_->GetHealthCheckService();
    for (const char* service :
         {v1::KvCache::service_full_name(), v1::Inspector::service_full_name()}) {
      server->health_->SetServingStatus(service, true);
    }
    return server;
  }
  for (size_t i = 0; i < addresses.size(); ++i) {
    if (server->ports_[i] > 0) continue;
    return absl::UnavailableError(
        absl::StrCat("listen: ", addresses[i],
                     " could not be bound: in use, not of this machine, or not allowed"));
  }
  return absl::UnavailableError("listen: gRPC did not start");
}

RpcServer::~RpcServer() { Stop(absl::Now()); }

std::shared_ptr<grpc::Channel> RpcServer::InProcessChannel() {
  return server_->InProcessChannel(grpc::ChannelArguments());
}

// Only changes: gRPC tells watchers every call.
void RpcServer::SetNvmeTakesWrites(bool takes) {
  const absl::MutexLock lock(&mu_);
  if (health_ == nullptr || nvme_takes_writes_ == takes) return;
  nvme_takes_writes_ = takes;
  health_->SetServingStatus(kNvmeHealthService, takes);
}

void RpcServer::Drain(absl::Duration grace) {
  {
    const absl::MutexLock lock(&mu_);
    if (health_ != nullptr) health_->SetServingStatus(false);
    health_ = nullptr;
  }
  context_.sessions.Drain(grace);
}

int RpcServer::Stop(absl::Time deadline) {
  if (server_ == nullptr) return 0;
  {
    const absl::MutexLock lock(&mu_);
    health_ = nullptr;
  }
  context_.sessions.CloseStreams(absl::UnavailableError("the daemon has stopped"));
  int cut_off = 0;
  absl::Notification ended;
  std::thread cutter([&] {
    if (ended.WaitForNotificationWithDeadline(deadline + kGoodbyeGrace)) return;
    cut_off = EndConnections(addresses_, ports_);
  });
  server_->Shutdown(absl::ToChronoTime(deadline));
  ended.Notify();
  cutter.join();
  server_.reset();
  context_.sessions.AwaitNoHolds(absl::Now() + kHoldsGrace);
  return cut_off;
}

}  // namespace larder
