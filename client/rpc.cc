#include "client/rpc.h"

#include <grpc/grpc.h>

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace larder {
inline namespace client {
namespace {

// Echo allows 64 MiB of payload; room for the envelope on top.
constexpr int kMessageBytesMax = 68 << 20;
// gRPC's own backoff, 1 s growing to 2 min, is made for the internet: a daemon on the same node
// is back within a second or two of a restart.
constexpr int kBackoffMsMin = 50;
constexpr int kBackoffMsMax = 500;
// What one attempt may take, which gRPC calls the minimal backoff. A daemon that is starting
// accepts before it answers: giving up sooner than it takes to start never gets through.
constexpr int kAttemptMs = 2000;
constexpr absl::Duration kAwaitConnectionMax = absl::Milliseconds(250);

absl::string_view Abseil(std::string_view s) { return {s.data(), s.size()}; }

absl::Status CheckAddress(const std::string& address) {
  const bool unix_path = absl::StartsWith(address, "unix:") && address.size() > 5;
  const bool abstract = absl::StartsWith(address, "unix-abstract:") && address.size() > 14;
  const size_t colon = address.rfind(':');
  uint32_t port = 0;
  const bool tcp = !absl::StartsWith(address, "unix") && colon != std::string::npos && colon > 0 &&
                   absl::SimpleAtoi(address.substr(colon + 1), &port) && port >= 1 && port <= 65'535;
  if (unix_path || abstract || tcp) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("address \"", address,
                   "\" must be unix:PATH, unix-abstract:NAME or HOST:PORT, with a port of 1 to 65535"));
}

// Holds gRPC until the process ends. It takes itself down with the last of its objects, and then
// waits up to 10 s for a poller of its own.
void HoldGrpc() {
  static const bool kOnce = [] {
    grpc_init();
    return true;
  }();
  static_cast<void>(kOnce);
}

}  // namespace

Rpc::Rpc(std::string address, std::shared_ptr<grpc::Channel> channel, absl::Duration call_timeout)
    : address_(std::move(address)),
      call_timeout_(call_timeout),
      channel_(std::move(channel)),
      kv_(v1::KvCache::NewStub(channel_)),
      inspector_(v1::Inspector::NewStub(channel_)) {}

absl::StatusOr<std::shared_ptr<Rpc>> Rpc::Connect(std::string address,
                                                  absl::Duration connect_timeout,
                                                  absl::Duration call_timeout) {
  if (absl::Status ok = CheckAddress(address); !ok.ok()) return ok;
  HoldGrpc();
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMessageBytesMax);
  arguments.SetMaxSendMessageSize(kMessageBytesMax);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kBackoffMsMin);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, kAttemptMs);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kBackoffMsMax);
  // Connections are not shared between channels: a Client that reconnects must not inherit
  // the backoff of another one.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  std::shared_ptr<grpc::Channel> channel =
      grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);

  const auto deadline = absl::ToChronoTime(absl::Now() + connect_timeout);
  grpc_connectivity_state state = channel->GetState(/*try_to_connect=*/true);
  while (state != GRPC_CHANNEL_READY) {
    const bool changed = channel->WaitForStateChange(state, deadline);
    if (!changed) {
      return absl::UnavailableError(absl::StrCat("no larderd answers at ", address, " within ",
                                                 absl::FormatDuration(connect_timeout)));
    }
    state = channel->GetState(/*try_to_connect=*/true);
    if (state == GRPC_CHANNEL_TRANSIENT_FAILURE || state == GRPC_CHANNEL_SHUTDOWN) {
      return absl::UnavailableError(absl::StrCat("no larderd answers at ", address));
    }
  }
  return std::shared_ptr<Rpc>(new Rpc(std::move(address), std::move(channel), call_timeout));
}

void Rpc::AwaitConnection() const {
  const auto deadline = absl::ToChronoTime(absl::Now() + kAwaitConnectionMax);
  grpc_connectivity_state state = channel_->GetState(/*try_to_connect=*/true);
  while (state != GRPC_CHANNEL_READY && channel_->WaitForStateChange(state, deadline)) {
    state = channel_->GetState(/*try_to_connect=*/true);
  }
}

absl::Status Rpc::ToStatus(const grpc::Status& status, std::string_view name,
                           absl::Duration timeout) const {
  if (status.ok()) return absl::OkStatus();
  const auto code = static_cast<absl::StatusCode>(status.error_code());
  if (code == absl::StatusCode::kDeadlineExceeded) {
    return absl::DeadlineExceededError(absl::StrCat(Abseil(name), " at ", address_,
                                                    " did not complete within ",
                                                    absl::FormatDuration(timeout)));
  }
  if (code == absl::StatusCode::kUnavailable) {
    return absl::UnavailableError(
        absl::StrCat(Abseil(name), " at ", address_, ": ", status.error_message()));
  }
  return absl::Status(code, status.error_message());
}

}  // namespace client
}  // namespace larder
