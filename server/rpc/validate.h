// Bounds of every field of every request, checked before the cache is touched. What needs the
// cache's state (ids, ends, whole blocks) the cache checks itself.
//
// Thread safety: pure functions.
//
// INVALID_ARGUMENT: "field: value given, bound".
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "larder/v1/inspector.pb.h"
#include "larder/v1/kv_cache.pb.h"
#include "server/cache/model.h"

namespace larder {

inline constexpr int kTokensMax = 1 << 20;
inline constexpr size_t kWorkerNameBytesMax = 128;
inline constexpr uint32_t kReserveBlocksMax = 65'536;
inline constexpr uint32_t kPrefetchTimeoutMsMax = 3'600'000;
inline constexpr uint32_t kEchoBytesMax = 64 << 20;
inline constexpr uint32_t kTopPrefixesMax = 1'000;

absl::Status Validate(const v1::OpenModelRequest& request);
absl::Status Validate(const v1::AttachRequest& request);
absl::Status Validate(const v1::LookupPrefixRequest& request);
absl::Status Validate(const v1::PrefetchRequest& request);
absl::Status Validate(const v1::ReserveRequest& request);
absl::Status Validate(const v1::PutRequest& request);
absl::Status Validate(const v1::DownloadRequest& request);
absl::Status Validate(const v1::ExplainRequest& request);
absl::Status Validate(const v1::TopPrefixesRequest& request);
absl::Status Validate(const v1::EvictRequest& request);
absl::Status Validate(const v1::EchoRequest& request);

// Put.data against the model: tokens are whole blocks and data is exactly theirs, the parts of
// all shards included.
absl::Status ValidateInline(const v1::PutRequest& request, const Model& model);

}  // namespace larder
