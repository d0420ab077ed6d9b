// Rpc: one channel to a larderd and its two stubs. Internal to client/: the public headers do
// not include gRPC's.
//
// Thread safety: immutable after Connect; every method may be called from any thread.
//
// Invariants:
//   1. Every unary call has a deadline.
//   2. gRPC's errors become absl::Status here and nowhere else: same code; a message for the
//      two codes that the transport produces names the call, the address and the time.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "larder/v1/inspector.grpc.pb.h"
#include "larder/v1/kv_cache.grpc.pb.h"

namespace larder {
inline namespace client {

class Rpc {
 public:
  // Waits until the channel is up. INVALID_ARGUMENT for an address that is neither
  // unix:PATH, unix-abstract:NAME nor HOST:PORT; UNAVAILABLE when nobody answers.
  static absl::StatusOr<std::shared_ptr<Rpc>> Connect(std::string address,
                                                      absl::Duration connect_timeout,
                                                      absl::Duration call_timeout);

  v1::KvCache::Stub& kv() const { return *kv_; }
  v1::Inspector::Stub& inspector() const { return *inspector_; }
  const std::string& address() const { return address_; }
  absl::Duration call_timeout() const { return call_timeout_; }

  // `method` as in &v1::KvCache::Stub::Reserve; `name` is for messages.
  template <typename Stub, typename Request, typename Response>
  absl::StatusOr<Response> Call(
      Stub& stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
      const Request& request, std::string_view name, absl::Duration timeout) const {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    Response response;
    const grpc::Status status = (stub.*method)(&context, request, &response);
    if (!status.ok()) return ToStatus(status, name, timeout);
    return response;
  }

  // Returns when the channel is up, and after a quarter of a second in any case. gRPC makes
  // progress with a connection only while somebody waits for it, and a call that fails at once
  // because the daemon was away does not wait: whoever may be the first after a restart calls
  // this before.
  void AwaitConnection() const;

  absl::Status ToStatus(const grpc::Status& status, std::string_view name,
                        absl::Duration timeout) const;

 private:
  Rpc(std::string address, std::shared_ptr<grpc::Channel> channel, absl::Duration call_timeout);

  const std::string address_;
  const absl::Duration call_timeout_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::KvCache::Stub> kv_;
  const std::unique_ptr<v1::Inspector::Stub> inspector_;
};

}  // namespace client
}  // namespace larder
