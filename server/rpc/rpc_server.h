// RpcServer: the gRPC server with both services, health and reflection.
//
//   Start -> SERVING -> Drain: health NOT_SERVING, workers told, nothing new granted
//         -> Stop: streams end, calls get until the deadline, connections a second more
//
// Health, for load balancers and probes: "" and each gRPC service by its full name; and, where
// SetNvmeTakesWrites has been called, kNvmeHealthService.
//
// Thread safety: SetNvmeTakesWrites is thread-safe. Drain and Stop are called by one thread;
// everything else is gRPC's.
//
// Invariants:
//   1. After Stop no handler runs, and no block is being read for a call.
//   2. Stop ends: a peer that does not read its goodbye is cut off.
//   3. gRPC itself is never taken down, whichever of its objects in this process goes last: that
//      waits for a poller of its own, up to 10 s.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/rpc/context.h"
#include "server/rpc/inspector_service.h"
#include "server/rpc/kv_cache_service.h"

namespace larder {

class RpcServer {
 public:
  // A name of its own in grpc.health.v1, because a daemon whose drive is sick still serves.
  static constexpr char kNvmeHealthService[] = "larder.v1.Nvme";
  // The largest request: a Put with its bytes.
  static constexpr int kReceiveBytesMax = 256 << 20;

  // Listens on `addresses`, each unix:PATH, unix-abstract:NAME or HOST:PORT; none: in-process
  // channels only. `context` and what it names outlive the server. UNAVAILABLE names the
  // address that could not be had.
  static absl::StatusOr<std::unique_ptr<RpcServer>> Start(
      const RpcContext& context, const std::vector<std::string>& addresses);
  ~RpcServer();
  RpcServer(const RpcServer&) = delete;
  RpcServer& operator=(const RpcServer&) = delete;

  // Port of each address; 0 or 1 for those that have none.
  const std::vector<int>& ports() const { return ports_; }
  std::shared_ptr<grpc::Channel> InProcessChannel();

  // SERVING or NOT_SERVING of kNvmeHealthService, told to watchers when it changes. NOT_SERVING
  // for good from Drain on.
  void SetNvmeTakesWrites(bool takes);

  void Drain(absl::Duration grace);
  // How many connections were cut off, because they did not end by themselves.
  int Stop(absl::Time deadline);

 private:
  RpcServer(const RpcContext& context, std::vector<std::string> addresses)
      : context_(context),
        addresses_(std::move(addresses)),
        kv_cache_(context),
        inspector_(context),
        ports_(addresses_.size(), 0) {}

  const RpcContext& context_;
  const std::vector<std::string> addresses_;
  KvCacheService kv_cache_;
  InspectorService inspector_;
  std::vector<int> ports_;
  std::unique_ptr<grpc::Server> server_;  // null once stopped

  absl::Mutex mu_;
  // gRPC's, of server_; null before Start and from Drain on.
  grpc::HealthCheckServiceInterface* health_ ABSL_GUARDED_BY(mu_) = nullptr;
  std::optional<bool> nvme_takes_writes_ ABSL_GUARDED_BY(mu_);  // what watchers know
};

}  // namespace larder
