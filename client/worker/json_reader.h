// JsonReader: fields out of JSON that nobody vouches for.
//
// Thread safety: ParseJson from any thread, a reader is one thread's.
//
// Invariants:
//   1. The first field that is missing, of another type or out of bounds is remembered, and
//      every call after it answers the smallest allowed value: read all, then ask status().
//   2. Nothing throws.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "nlohmann/json.hpp"

namespace larder::worker {

// Deep enough for any config; far below what a parser's or a destructor's stack bears.
inline constexpr uint32_t kJsonDepthMax = 32;

// `what` names the text in messages. INVALID_ARGUMENT unless it is one JSON object with no key
// twice in an object and nesting of at most kJsonDepthMax.
absl::StatusOr<nlohmann::json> ParseJson(absl::string_view text, absl::string_view what);

class JsonReader {
 public:
  // `object` must outlive the reader; `path` is put before field names in messages.
  explicit JsonReader(const nlohmann::json& object, std::string path = "")
      : object_(object), path_(std::move(path)) {}

  // The field, or nullptr where it is missing or null.
  const nlohmann::json* Find(absl::string_view key) const;

  // Both bounds are inclusive. Without a fallback the field is required.
  uint64_t Integer(absl::string_view key, uint64_t min, uint64_t max,
                   std::optional<uint64_t> fallback = std::nullopt);
  double Real(absl::string_view key, double min, double max,
              std::optional<double> fallback = std::nullopt);
  bool Flag(absl::string_view key, bool fallback);
  std::string Text(absl::string_view key, std::optional<std::string> fallback = std::nullopt);

  // Remembers `error` unless there was one before.
  void Fail(absl::Status error);
  const absl::Status& status() const { return status_; }

 private:
  void FailField(absl::string_view key, absl::string_view wanted);

  const nlohmann::json& object_;
  const std::string path_;
  absl::Status status_;
};

}  // namespace larder::worker
