// Between the wire's messages and the cache's values.
//
// Thread safety: pure functions. Requests are validated already (validate.h).
#pragma once

#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "larder/v1/inspector.pb.h"
#include "larder/v1/kv_cache.pb.h"
#include "server/cache/cache.h"
#include "server/cache/model.h"

namespace larder {

// Absl's view of a standard one; Debian's Abseil has a type of its own.
inline absl::string_view ToAbsl(std::string_view text) { return {text.data(), text.size()}; }

inline std::span<const uint32_t> ToSpan(const google::protobuf::RepeatedField<uint32_t>& tokens) {
  return {tokens.data(), static_cast<size_t>(tokens.size())};
}

ModelSpec FromProto(const v1::ModelSpec& spec);
std::optional<Tier> FromProto(v1::Tier tier);  // nullopt: unspecified

v1::Tier ToProto(Tier tier);
void ToProto(const Model& model, v1::Model& out);
// A block's offset is its slot's; Run.arena is the tier's index in the hand-over.
void ToProto(std::span<const SlotRun> runs, google::protobuf::RepeatedPtrField<v1::Run>& out);
void ToProto(const LookupResult& result, v1::LookupPrefixResponse& out);
void ToProto(const LeaseState& state, v1::LeaseState& out);
void ToProto(const PrefetchUpdate& update, v1::PrefetchEvent& out);

void ToProto(const CacheStats& stats, v1::Status& out);
void ToProto(const ModelStats& stats, v1::ModelStatus& out);
void ToProto(const SessionInfo& session, v1::SessionStatus& out);
void ToProto(const Explanation& explanation, v1::ExplainResponse& out);
void ToProto(const TopPrefix& prefix, v1::TopPrefix& out);

}  // namespace larder
