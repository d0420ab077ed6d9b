#include "client/streams.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/time/clock.h"

namespace larder {
inline namespace client {
namespace {

// The call's own deadline: what was asked for, else the client's, and never shorter than
// the time the daemon was told to wait.
absl::Duration PrefetchDeadline(const Rpc& rpc, const PrefetchOptions& options) {
  if (options.deadline != absl::InfiniteDuration()) return options.deadline;
  if (options.policy != v1::PREFETCH_POLICY_TIMEOUT) return rpc.call_timeout();
  return options.policy_timeout + rpc.call_timeout();
}

void Merge(const v1::PrefetchEvent& event, PrefetchResult& result) {
  result.ready_blocks = std::max(result.ready_blocks, event.ready_blocks());
  result.promised_blocks = std::max(result.promised_blocks, event.promised_blocks());
  if (event.unreadable()) result.unreadable_position = event.unreadable_position();
}

}  // namespace

absl::StatusOr<PrefetchResult> RunPrefetch(const Rpc& rpc, v1::PrefetchRequest request,
                                           const PrefetchOptions& options,
                                           const PrefetchCallback& on_event) {
  request.set_tier(options.tier);
  request.set_policy(options.policy);
  if (options.policy == v1::PREFETCH_POLICY_TIMEOUT) {
    request.set_timeout_ms(
        static_cast<uint32_t>(absl::ToInt64Milliseconds(options.policy_timeout)));
  }
  const absl::Duration deadline = PrefetchDeadline(rpc, options);
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + deadline));
  const auto stream = rpc.kv().Prefetch(&context, request);
  PrefetchResult result;
  bool ended = false;
  v1::PrefetchEvent event;
  while (stream->Read(&event)) {
    Merge(event, result);
    ended = event.done() || event.unreadable();
    if (on_event) on_event(event);
  }
  if (const grpc::Status status = stream->Finish(); !status.ok()) {
    return rpc.ToStatus(status, "Prefetch", deadline);
  }
  if (!ended) return absl::InternalError("Prefetch: the stream ended without its last event");
  return result;
}

absl::Status RunDownload(const Rpc& rpc, const v1::DownloadRequest& request, absl::Duration timeout,
                         const DownloadCallback& on_chunk) {
  if (timeout == absl::InfiniteDuration()) timeout = rpc.call_timeout();
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  const auto stream = rpc.kv().Download(&context, request);
  absl::Status refused;
  v1::DownloadChunk chunk;
  while (stream->Read(&chunk)) {
    if (refused = on_chunk(chunk); !refused.ok()) {
      context.TryCancel();
      break;
    }
  }
  const grpc::Status status = stream->Finish();
  if (!refused.ok()) return refused;
  return rpc.ToStatus(status, "Download", timeout);
}

void SetTokens(google::protobuf::RepeatedField<uint32_t>& field, std::span<const uint32_t> tokens) {
  field.Clear();
  field.Add(tokens.begin(), tokens.end());
}

}  // namespace client
}  // namespace larder
