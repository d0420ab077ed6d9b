#include "client/worker/json_reader.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"

namespace larder::worker {
namespace {

using Json = nlohmann::json;

// The deepest nesting of brackets outside strings. Counted before parsing, so that no part of
// the parser has to bear it.
uint32_t Depth(absl::string_view text) {
  uint32_t depth = 0, deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      deepest = std::max(deepest, ++depth);
    } else if ((c == '}' || c == ']') && depth > 0) {
      --depth;
    }
  }
  return deepest;
}

// A value as it stands in a message: short, whatever it was.
std::string Shown(const Json& value) {
  constexpr size_t kShown = 48;
  if (value.is_structured()) return value.is_array() ? "a list" : "an object";
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > kShown) text = absl::StrCat(text.substr(0, kShown), "...");
  return text;
}

}  // namespace

absl::StatusOr<Json> ParseJson(absl::string_view text, absl::string_view what) {
  if (const uint32_t depth = Depth(text); depth > kJsonDepthMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": nested ", depth, " deep; allowed: at most ", kJsonDepthMax));
  }
  std::vector<absl::flat_hash_set<std::string>> keys;  // of the objects around this place
  std::string twice;
  const auto on_event = [&](int, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second && twice.empty()) twice = Shown(parsed);
    }
    return true;
  };
  Json json = Json::parse(text, on_event, /*allow_exceptions=*/false);
  if (json.is_discarded()) return absl::InvalidArgumentError(absl::StrCat(what, ": not JSON"));
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": not a JSON object"));
  }
  if (!twice.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": the key ", twice, " is there twice"));
  }
  return json;
}

const Json* JsonReader::Find(absl::string_view key) const {
  const auto found = object_.find(key);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

uint64_t JsonReader::Integer(absl::string_view key, uint64_t min, uint64_t max,
                             std::optional<uint64_t> fallback) {
  const Json* const value = Find(key);
  if (value == nullptr && fallback) return *fallback;
  if (value != nullptr && value->is_number_unsigned()) {
    const auto number = value->get<uint64_t>();
    if (number >= min && number <= max) return number;
  }
  FailField(key, absl::StrCat("a whole number from ", min, " to ", max));
  return min;
}

double JsonReader::Real(absl::string_view key, double min, double max,
                        std::optional<double> fallback) {
  const Json* const value = Find(key);
  if (value == nullptr && fallback) return *fallback;
  if (value != nullptr && value->is_number()) {
    const auto number = value->get<double>();
    if (number >= min && number <= max) return number;
  }
  FailField(key, absl::StrCat("a number from ", min, " to ", max));
  return min;
}

bool JsonReader::Flag(absl::string_view key, bool fallback) {
  const Json* const value = Find(key);
  if (value == nullptr) return fallback;
  if (value->is_boolean()) return value->get<bool>();
  FailField(key, "true or false");
  return fallback;
}

std::string JsonReader::Text(absl::string_view key, std::optional<std::string> fallback) {
  const Json* const value = Find(key);
  if (value == nullptr && fallback) return *std::move(fallback);
  if (value != nullptr && value->is_string()) return value->get<std::string>();
  FailField(key, "a text");
  return "";
}

void JsonReader::Fail(absl::Status error) { status_.Update(std::move(error)); }

void JsonReader::FailField(absl::string_view key, absl::string_view wanted) {
  const Json* const value = Find(key);
  Fail(absl::InvalidArgumentError(absl::StrCat(
      path_, key, ": ", value == nullptr ? "missing" : Shown(*value), "; allowed: ", wanted)));
}

}  // namespace larder::worker
