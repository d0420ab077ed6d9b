#include "client/replay_record.h"

#include <utility>

#include "client/json.h"

namespace larder::cli {
namespace {

constexpr std::array<std::string_view, kCallCount> kCallNames = {
    "Attach", "LookupPrefix", "Prefetch", "Truncate", "Reserve", "Put", "Flush", "Release"};

Json PathJson(const PathUse& path) { return {path.bytes, path.nanoseconds}; }

Json RecordJson(const RequestRecord& record) {
  Json json = {{"index", record.index},
               {"boot", record.boot_id},
               {"interrupted", record.interrupted},
               {"asked", record.asked},
               {"served", record.served},
               {"computed", record.computed},
               {"unreadable", record.unreadable},
               {"put", record.put},
               {"exhausted", record.exhausted},
               {"bytes_verified", record.bytes_verified},
               {"bytes_wrong", record.bytes_wrong},
               {"prefetch", PathJson(record.prefetch)},
               {"read", PathJson(record.read)},
               {"fill", PathJson(record.fill)},
               {"us", record.microseconds},
               {"errors", Json::object()}};
  for (const auto& [what, error] : record.errors) {
    json["errors"][what] = {error.count, error.example};
  }
  return json;
}

// Reads fields of an object; after the first that is missing or of another type, ok() is false.
class Reader {
 public:
  explicit Reader(const Json& object) : object_(object), ok_(object.is_object()) {}

  void Number(const char* key, uint64_t& value) {
    const Json* const field = Field(key);
    if (field != nullptr) Take(*field, value);
  }
  void Bool(const char* key, bool& value) {
    const Json* const field = Field(key);
    ok_ = ok_ && field->is_boolean();
    if (ok_) value = field->get<bool>();
  }
  void Path(const char* key, PathUse& path) {
    const Json* const field = Array(key, 2);
    if (field == nullptr) return;
    Take((*field)[0], path.bytes);
    Take((*field)[1], path.nanoseconds);
  }
  template <size_t N>
  void Numbers(const char* key, std::array<uint64_t, N>& values) {
    const Json* const field = Array(key, N);
    for (size_t i = 0; ok_ && i < N; ++i) Take((*field)[i], values[i]);
  }
  void Latencies(const char* key, std::array<std::vector<uint32_t>, kCallCount>& values) {
    const Json* const field = Array(key, kCallCount);
    for (size_t call = 0; ok_ && call < kCallCount; ++call) {
      const Json& samples = (*field)[call];
      ok_ = samples.is_array();
      for (size_t i = 0; ok_ && i < samples.size(); ++i) {
        uint64_t sample = 0;
        Take(samples[i], sample);
        values[call].push_back(static_cast<uint32_t>(sample));
      }
    }
  }
  void Errors(const char* key, ErrorCounts& errors) {
    const Json* const field = Field(key);
    ok_ = ok_ && field->is_object();
    if (!ok_) return;
    for (const auto& [what, error] : field->items()) {
      ok_ = ok_ && error.is_array() && error.size() == 2 && error[1].is_string();
      if (!ok_) return;
      Take(error[0], errors[what].count);
      errors[what].example = error[1].get<std::string>();
    }
  }

  bool ok() const { return ok_; }

 private:
  const Json* Field(const char* key) {
    if (!ok_) return nullptr;
    const auto found = object_.find(key);
    ok_ = found != object_.end();
    return ok_ ? &*found : nullptr;
  }
  const Json* Array(const char* key, size_t size) {
    const Json* const field = Field(key);
    ok_ = ok_ && field->is_array() && field->size() == size;
    return ok_ ? field : nullptr;
  }
  void Take(const Json& field, uint64_t& value) {
    ok_ = ok_ && field.is_number_unsigned();
    if (ok_) value = field.get<uint64_t>();
  }

  const Json& object_;
  bool ok_;
};

absl::Status BadLine() { return absl::InvalidArgumentError("not a line of a replay worker"); }

absl::StatusOr<WorkerLine> ParseRecord(const Json& json) {
  RequestRecord record;
  Reader reader(json);
  reader.Number("index", record.index);
  reader.Number("boot", record.boot_id);
  reader.Bool("interrupted", record.interrupted);
  reader.Number("asked", record.asked);
  reader.Numbers("served", record.served);
  reader.Number("computed", record.computed);
  reader.Number("unreadable", record.unreadable);
  reader.Number("put", record.put);
  reader.Number("exhausted", record.exhausted);
  reader.Number("bytes_verified", record.bytes_verified);
  reader.Number("bytes_wrong", record.bytes_wrong);
  reader.Path("prefetch", record.prefetch);
  reader.Path("read", record.read);
  reader.Path("fill", record.fill);
  reader.Latencies("us", record.microseconds);
  reader.Errors("errors", record.errors);
  if (!reader.ok()) return BadLine();
  return record;
}

}  // namespace

std::string_view CallName(Call call) { return kCallNames[static_cast<size_t>(call)]; }

void AddErrors(const ErrorCounts& more, ErrorCounts& errors) {
  for (const auto& [what, error] : more) {
    ErrorCount& sum = errors[what];
    if (sum.count == 0) sum.example = error.example;
    sum.count += error.count;
  }
}

std::string FormatLine(const WorkerLine& line) {
  if (const auto* record = std::get_if<RequestRecord>(&line)) {
    return Dump({{"request", RecordJson(*record)}});
  }
  if (const auto* failed = std::get_if<WorkerFailed>(&line)) {
    return Dump(
        {{"failed", {{"code", static_cast<int>(failed->code)}, {"message", failed->message}}}});
  }
  return Dump({{"reconnected", true}});
}

absl::StatusOr<WorkerLine> ParseLine(std::string_view line) {
  const Json json = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || json.size() != 1) return BadLine();
  if (json.contains("request")) return ParseRecord(json["request"]);
  if (json.contains("reconnected")) return Reconnected();
  if (!json.contains("failed")) return BadLine();
  const Json& failed = json["failed"];
  if (!failed.is_object() || !failed.contains("code") || !failed["code"].is_number_integer() ||
      !failed.contains("message") || !failed["message"].is_string()) {
    return BadLine();
  }
  return WorkerFailed{static_cast<absl::StatusCode>(failed["code"].get<int>()),
                      failed["message"].get<std::string>()};
}

}  // namespace larder::cli
