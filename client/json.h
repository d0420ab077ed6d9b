// Json: any message of larder.v1 as JSON for scripts.
//
// Thread safety: free functions.
//
// Invariants:
//   1. Keys are the field names of the .proto files, in their order, and every field is there
//      whether set or not; unset messages and fields of a oneof that are not set are left out.
//   2. Ids (fixed64 fields whose name ends in "_id") are strings of 16 hex digits, as every
//      flag takes them; other numbers are numbers. Enums are their name without the type's
//      prefix ("GPU", "BF16"). Bytes are hex.
#pragma once

#include <string>

#include "google/protobuf/message.h"
#include "nlohmann/json.hpp"

namespace larder::cli {

using Json = nlohmann::ordered_json;

Json ToJson(const google::protobuf::Message& message);

// One line, with bytes that are not UTF-8 replaced.
std::string Dump(const Json& json);

}  // namespace larder::cli
