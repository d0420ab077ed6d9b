#include "client/replay_summary.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/output.h"

namespace larder::cli {
namespace {

double Rate(const PathUse& path) {
  return path.nanoseconds == 0
             ? 0
             : static_cast<double>(path.bytes) * 1e9 / static_cast<double>(path.nanoseconds);
}

Json PathJson(const PathUse& path) {
  return {{"bytes", path.bytes},
          {"seconds", static_cast<double>(path.nanoseconds) / 1e9},
          {"gb_per_second", Rate(path) / 1e9}};
}

// Errors that are the workload's business: the daemon was killed, or slow.
bool IsExpected(const std::string& error) {
  return absl::EndsWith(error, " UNAVAILABLE") || absl::EndsWith(error, " DEADLINE_EXCEEDED") ||
         absl::EndsWith(error, " CANCELLED");
}

std::string CountAndPercent(uint64_t part, uint64_t whole) {
  return absl::StrCat(FormatCount(part), " (", FormatPercent(part, whole), ")");
}

}  // namespace

uint32_t Quantile(const std::vector<uint32_t>& sorted, double q) {
  if (sorted.empty()) return 0;
  const double size = static_cast<double>(sorted.size());
  return sorted[static_cast<size_t>(std::clamp(std::ceil(q * size), 1.0, size)) - 1];
}

void ReplaySummary::Phase::Add(const RequestRecord& record) {
  ++requests;
  interrupted += record.interrupted;
  asked += record.asked;
  for (size_t tier = 0; tier < served.size(); ++tier) served[tier] += record.served[tier];
  computed += record.computed;
  unreadable += record.unreadable;
  put += record.put;
  exhausted += record.exhausted;
  bytes_verified += record.bytes_verified;
  bytes_wrong += record.bytes_wrong;
}

Json ReplaySummary::Phase::ToJson() const {
  const uint64_t hits = served[0] + served[1] + served[2];
  return {{"boot_id", FormatId(boot_id)},
          {"requests", requests},
          {"interrupted", interrupted},
          {"block_refs", asked},
          {"block_hits", hits},
          {"hits_by_tier", {{"gpu", served[0]}, {"host", served[1]}, {"nvme", served[2]}}},
          {"computed", computed},
          {"unreadable", unreadable},
          {"put", put},
          {"exhausted", exhausted},
          {"bytes_verified", bytes_verified},
          {"bytes_wrong", bytes_wrong}};
}

ReplaySummary::Phase& ReplaySummary::PhaseOf(uint64_t boot_id) {
  for (Phase& phase : phases_) {
    if (phase.boot_id == boot_id) return phase;
  }
  phases_.emplace_back().boot_id = boot_id;
  return phases_.back();
}

void ReplaySummary::Add(const WorkerLine& line) {
  reconnects_ += std::holds_alternative<Reconnected>(line);
  const auto* const record = std::get_if<RequestRecord>(&line);
  if (record == nullptr) return;
  total_.Add(*record);
  PhaseOf(record->boot_id).Add(*record);
  prefetch_.Add(record->prefetch);
  read_.Add(record->read);
  fill_.Add(record->fill);
  for (size_t call = 0; call < kCallCount; ++call) {
    microseconds_[call].insert(microseconds_[call].end(), record->microseconds[call].begin(),
                               record->microseconds[call].end());
  }
  AddErrors(record->errors, errors_);
}

void ReplaySummary::Finish(const WorkerFates& fates, absl::Duration elapsed) {
  fates_ = fates;
  elapsed_ = elapsed;
  for (std::vector<uint32_t>& samples : microseconds_) std::sort(samples.begin(), samples.end());
}

uint64_t ReplaySummary::undone() const {
  return requests_wanted_ - std::min(requests_wanted_, total_.requests);
}

ExitCode ReplaySummary::exit_code() const {
  if (total_.bytes_wrong != 0) return kFailed;
  for (const WorkerFailed& failed : fates_.failed) {
    return ExitCodeOf(absl::Status(failed.code, failed.message));
  }
  // A worker that was killed loses the request that it was in, and nothing more if it was
  // respawned, or was in its last one.
  if (undone() > fates_.respawned + fates_.killed_in_last) return kFailed;
  const bool explained = std::all_of(errors_.begin(), errors_.end(),
                                     [](const auto& error) { return IsExpected(error.first); });
  return explained ? kOk : kFailed;
}

std::string ReplaySummary::PhaseTable() const {
  cli::Table table({"DAEMON", ">REQUESTS", ">BLOCKS ASKED", ">FROM GPU", ">FROM HOST", ">FROM NVME",
                    ">COMPUTED", ">BYTES VERIFIED", ">WRONG"});
  const auto add = [&](const std::string& name, const Phase& phase) {
    table.AddRow({name, FormatCount(phase.requests), FormatCount(phase.asked),
                  CountAndPercent(phase.served[0], phase.asked),
                  CountAndPercent(phase.served[1], phase.asked),
                  CountAndPercent(phase.served[2], phase.asked),
                  CountAndPercent(phase.computed, phase.asked), FormatBytes(phase.bytes_verified),
                  verified_ ? FormatCount(phase.bytes_wrong) : "-"});
  };
  for (const Phase& phase : phases_) add(absl::StrCat("boot ", FormatId(phase.boot_id)), phase);
  if (phases_.size() != 1) add("all", total_);
  return table.Render();
}

std::string ReplaySummary::CallTable() const {
  cli::Table table({"CALL", ">COUNT", ">P50", ">P90", ">P99", ">MAX"});
  for (int call = 0; call < kCallCount; ++call) {
    const std::vector<uint32_t>& samples = microseconds_[call];
    if (samples.empty()) continue;
    table.AddRow(
        {std::string(CallName(static_cast<Call>(call))), FormatCount(samples.size()),
         FormatMicroseconds(Quantile(samples, 0.5)), FormatMicroseconds(Quantile(samples, 0.9)),
         FormatMicroseconds(Quantile(samples, 0.99)), FormatMicroseconds(Quantile(samples, 1))});
  }
  return table.Render();
}

std::string ReplaySummary::PathTable() const {
  cli::Table table({"PATH", ">BYTES", ">RATE A WORKER"});
  table.AddRow({"prefetch", FormatBytes(prefetch_.bytes), FormatRate(Rate(prefetch_))});
  table.AddRow(
      {verified_ ? "read and verify" : "read", FormatBytes(read_.bytes), FormatRate(Rate(read_))});
  table.AddRow({"fill", FormatBytes(fill_.bytes), FormatRate(Rate(fill_))});
  return table.Render();
}

std::string ReplaySummary::Notes() const {
  std::string notes;
  const auto note = [&](uint64_t count, const char* what) {
    if (count != 0) absl::StrAppend(&notes, FormatCount(count), " ", what, "\n");
  };
  note(total_.unreadable, "blocks were found but could not be read, and were computed");
  note(total_.exhausted, "reservations got less than they asked for (RESOURCE_EXHAUSTED)");
  note(total_.computed - std::min(total_.put, total_.computed),
       "computed blocks were not put: there was no room, or the daemon went away");
  note(total_.interrupted, "requests were interrupted because the daemon went away");
  note(reconnects_, "times a worker attached again");
  note(fates_.killed, "workers were killed");
  note(fates_.respawned, "workers were started again");
  note(undone(), "requests were not completed");
  for (const auto& [what, error] : errors_) {
    absl::StrAppend(&notes, FormatCount(error.count), " errors: ", what,
                    ", for example: ", error.example, "\n");
  }
  std::map<std::string, uint64_t> gave_up;
  for (const WorkerFailed& failed : fates_.failed) ++gave_up[failed.message];
  for (const auto& [why, count] : gave_up) {
    absl::StrAppend(&notes, FormatCount(count), " workers gave up: ", why, "\n");
  }
  return notes;
}

std::string ReplaySummary::Table() const {
  const double seconds = std::max(absl::ToDoubleSeconds(elapsed_), 1e-9);
  const std::string notes = Notes();
  return absl::StrCat(
      absl::StrFormat("%s requests in %.1f s (%.0f a second)\n\n", FormatCount(total_.requests),
                      seconds, static_cast<double>(total_.requests) / seconds),
      PhaseTable(), "\n", CallTable(), "\n", PathTable(), notes.empty() ? "" : "\n", notes);
}

Json ReplaySummary::ToJson() const {
  Json json = total_.ToJson();
  json.erase("boot_id");
  json["seconds"] = absl::ToDoubleSeconds(elapsed_);
  json["verified"] = verified_;
  json["undone"] = undone();
  json["reconnects"] = reconnects_;
  json["workers_killed"] = fates_.killed;
  json["workers_respawned"] = fates_.respawned;
  json["phases"] = Json::array();
  for (const Phase& phase : phases_) json["phases"].push_back(phase.ToJson());
  json["calls"] = Json::object();
  for (int call = 0; call < kCallCount; ++call) {
    const std::vector<uint32_t>& samples = microseconds_[call];
    if (samples.empty()) continue;
    json["calls"][std::string(CallName(static_cast<Call>(call)))] = {
        {"count", samples.size()},
        {"p50_us", Quantile(samples, 0.5)},
        {"p90_us", Quantile(samples, 0.9)},
        {"p99_us", Quantile(samples, 0.99)},
        {"max_us", Quantile(samples, 1)}};
  }
  json["paths"] = {{"prefetch", PathJson(prefetch_)},
                   {verified_ ? "verify" : "read", PathJson(read_)},
                   {"fill", PathJson(fill_)}};
  json["errors"] = Json::object();
  for (const auto& [what, error] : errors_) {
    json["errors"][what] = {{"count", error.count}, {"example", error.example}};
  }
  json["gave_up"] = Json::array();
  for (const WorkerFailed& failed : fates_.failed) json["gave_up"].push_back(failed.message);
  return json;
}

}  // namespace larder::cli
