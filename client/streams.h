// Streams: the two streaming calls that leases and the session-less Client share. Internal to
// client/.
//
// Thread safety: free functions; callbacks run in the caller's thread.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/rpc.h"
#include "client/session.h"

namespace larder {
inline namespace client {

// Runs a prefetch to its last event. `request.blocks` is set; the rest comes from `options`.
absl::StatusOr<PrefetchResult> RunPrefetch(const Rpc& rpc, v1::PrefetchRequest request,
                                           const PrefetchOptions& options,
                                           const PrefetchCallback& on_event);

absl::Status RunDownload(const Rpc& rpc, const v1::DownloadRequest& request, absl::Duration timeout,
                         const DownloadCallback& on_chunk);

// The messages' packed token fields, in one copy.
void SetTokens(google::protobuf::RepeatedField<uint32_t>& field, std::span<const uint32_t> tokens);

}  // namespace client
}  // namespace larder
