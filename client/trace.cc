#include "client/trace.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace larder {
inline namespace client {
namespace {

using Json = nlohmann::json;

// A number of the line that may be missing. `max` is inclusive.
absl::StatusOr<uint64_t> OptionalNumber(const Json& object, const char* key, uint64_t max) {
  const auto found = object.find(key);
  if (found == object.end()) return 0;
  if (!found->is_number_unsigned() || found->get<uint64_t>() > max) {
    return absl::InvalidArgumentError(
        absl::StrCat(key, " is ", found->dump(-1, ' ', false, Json::error_handler_t::replace),
                     ", must be a whole number from 0 to ", max));
  }
  return found->get<uint64_t>();
}

absl::Status ReadBlockIds(const Json& object, std::vector<uint32_t>& ids) {
  constexpr uint64_t kIdMax = std::numeric_limits<uint32_t>::max();
  const auto found = object.find("hash_ids");
  if (found == object.end()) return absl::InvalidArgumentError("hash_ids is missing");
  if (!found->is_array()) return absl::InvalidArgumentError("hash_ids is not a list");
  if (found->size() > kTraceBlocksMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("hash_ids has ", found->size(), " ids, must have at most ", kTraceBlocksMax));
  }
  ids.reserve(found->size());
  for (size_t i = 0; i < found->size(); ++i) {
    const Json& id = (*found)[i];
    if (!id.is_number_unsigned() || id.get<uint64_t>() > kIdMax) {
      return absl::InvalidArgumentError(absl::StrCat(
          "hash_ids[", i, "] is ", id.dump(-1, ' ', false, Json::error_handler_t::replace),
          ", must be a whole number from 0 to ", kIdMax));
    }
    ids.push_back(static_cast<uint32_t>(id.get<uint64_t>()));
  }
  return absl::OkStatus();
}

absl::Status CannotOpen(const std::string& path, int error) {
  const std::string message = absl::StrCat(path, ": ", std::strerror(error));
  if (error == EACCES || error == EPERM) return absl::PermissionDeniedError(message);
  return absl::NotFoundError(message);
}

// A bijection on 32 bits (MurmurHash3's finalizer), which is what makes first tokens of
// different ids differ.
uint32_t Scramble(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85eb'ca6b;
  x ^= x >> 13;
  x *= 0xc2b2'ae35;
  return x ^ (x >> 16);
}

}  // namespace

absl::StatusOr<TraceRequest> ParseTraceLine(std::string_view line) {
  const Json object = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (object.is_discarded()) return absl::InvalidArgumentError("not JSON");
  if (!object.is_object()) return absl::InvalidArgumentError("not a JSON object");
  TraceRequest request;
  constexpr uint64_t kTokensMax = std::numeric_limits<uint32_t>::max();
  absl::StatusOr<uint64_t> timestamp =
      OptionalNumber(object, "timestamp", std::numeric_limits<int64_t>::max());
  if (!timestamp.ok()) return timestamp.status();
  absl::StatusOr<uint64_t> input = OptionalNumber(object, "input_length", kTokensMax);
  if (!input.ok()) return input.status();
  absl::StatusOr<uint64_t> output = OptionalNumber(object, "output_length", kTokensMax);
  if (!output.ok()) return output.status();
  if (absl::Status ids = ReadBlockIds(object, request.block_ids); !ids.ok()) return ids;
  request.timestamp_ms = static_cast<int64_t>(*timestamp);
  request.input_tokens = static_cast<uint32_t>(*input);
  request.output_tokens = static_cast<uint32_t>(*output);
  return request;
}

absl::StatusOr<std::vector<TraceRequest>> ReadTrace(const std::string& path,
                                                    const TraceSelection& selection) {
  std::ifstream file(path);
  if (!file) return CannotOpen(path, errno);
  std::vector<TraceRequest> requests;
  // Into memory of a fixed size: a line of a device need not end.
  std::vector<char> buffer(kTraceLineBytesMax + 1);
  uint64_t line_number = 0;
  uint64_t index = 0;
  while (requests.size() < selection.limit) {
    file.getline(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    ++line_number;
    if (static_cast<uint64_t>(file.gcount()) == kTraceLineBytesMax && file.fail()) {
      return absl::InvalidArgumentError(absl::StrCat(
          path, ":", line_number, ": a line of more than ", kTraceLineBytesMax, " bytes"));
    }
    if (file.fail()) break;
    const size_t bytes = static_cast<size_t>(file.gcount()) - (file.eof() ? 0 : 1);
    const std::string_view line(buffer.data(), bytes);
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    absl::StatusOr<TraceRequest> request = ParseTraceLine(line);
    if (!request.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ":", line_number, ": ", request.status().message()));
    }
    request->index = index++;
    if (request->index >= selection.skip) requests.push_back(*std::move(request));
  }
  if (file.bad()) return CannotOpen(path, EIO);
  return requests;
}

void AppendBlockTokens(uint32_t block_id, uint32_t block_tokens, std::vector<uint32_t>& tokens) {
  tokens.push_back(Scramble(block_id));
  for (uint32_t i = 1; i < block_tokens; ++i) {
    tokens.push_back(Scramble(block_id ^ (i * 0x9e37'79b9)));
  }
}

std::vector<uint32_t> ExpandTokens(std::span<const uint32_t> block_ids, uint32_t block_tokens) {
  std::vector<uint32_t> tokens;
  tokens.reserve(block_ids.size() * block_tokens);
  for (uint32_t id : block_ids) AppendBlockTokens(id, block_tokens, tokens);
  return tokens;
}

}  // namespace client
}  // namespace larder
