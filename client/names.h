// Names: the enums of larder.v1 as people write them: "GPU", "BF16", "gpu".
//
// Thread safety: free functions.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "google/protobuf/descriptor.h"
#include "larder/v1/types.pb.h"

namespace larder::cli {

// Without the type's prefix: TIER_GPU is "GPU", PREFETCH_POLICY_TIMEOUT is "TIMEOUT".
std::string EnumName(const google::protobuf::EnumValueDescriptor& value);
std::string TierName(v1::Tier tier);  // "?" for a number this version does not know
std::string DTypeName(v1::DType dtype);

// Upper or lower case; INVALID_ARGUMENT names the value and what is allowed.
absl::StatusOr<v1::Tier> ParseTier(std::string_view name);
absl::StatusOr<v1::DType> ParseDType(std::string_view name);

}  // namespace larder::cli
