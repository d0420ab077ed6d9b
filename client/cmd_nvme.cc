// larder nvme check, stats, drop: looks into the directory of an NVMe tier while no daemon has
// it. Links storage/ and asks no daemon.
#include <algorithm>
#include <array>
#include <cstdio>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/commands.h"
#include "client/flags.h"
#include "client/json.h"
#include "client/output.h"
#include "spdlog/sinks/stdout_color_sinks.h"
#include "spdlog/spdlog.h"
#include "storage/nvme_audit.h"

namespace larder::cli {
namespace {

constexpr char kCommand[] = "nvme";
constexpr size_t kFindingsShown = 20;
constexpr uint64_t kThreadsMax = 64;

struct NvmeFlags {
  std::string directory;
  uint64_t threads = std::clamp<uint64_t>(std::thread::hardware_concurrency(), 1, 8);
  bool repair = false;
  uint64_t model_id = 0;
};

// Counts by ranges: what is below limits[i] and not below the one before.
struct Histogram {
  struct Range {
    const char* name;
    uint64_t below;
  };
  explicit Histogram(std::vector<Range> all) : ranges(std::move(all)), counts(ranges.size()) {}
  void Add(uint64_t value) {
    size_t at = 0;
    while (value >= ranges[at].below) ++at;
    counts[at] += 1;
  }
  std::vector<Range> ranges;  // the last has no limit
  std::vector<uint64_t> counts;
};

constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();

Histogram Ages() {
  constexpr uint64_t kHour = 3600;
  constexpr uint64_t kDay = 24 * kHour;
  return Histogram({{"under 1 minute", 60},
                    {"under 10 minutes", 600},
                    {"under 1 hour", kHour},
                    {"under 6 hours", 6 * kHour},
                    {"under 1 day", kDay},
                    {"under 1 week", 7 * kDay},
                    {"under 30 days", 30 * kDay},
                    {"older", kNoLimit}});
}

Histogram Depths() {
  return Histogram({{"0", 1},
                    {"1 to 3", 4},
                    {"4 to 15", 16},
                    {"16 to 63", 64},
                    {"64 to 255", 256},
                    {"256 to 1,023", 1024},
                    {"1,024 and more", kNoLimit}});
}

struct ModelBlocks {
  uint64_t blocks = 0;
  uint64_t bytes = 0;
  uint32_t block_bytes = 0;
  uint64_t oldest_s = kNoLimit;  // ages
  uint64_t newest_s = kNoLimit;
};

struct Contents {
  uint64_t bytes_total = 0;
  uint64_t blocks = 0;
  uint64_t bytes = 0;
  std::map<uint64_t, ModelBlocks> models;
  Histogram ages = Ages();
  Histogram depths = Depths();

  void Add(const NvmeRecord& record, uint64_t now_s) {
    const uint64_t age_s = now_s - std::min(now_s, record.block.written_at_s);
    blocks += 1;
    bytes += record.payload_bytes;
    ModelBlocks& model = models[record.block.model_id];
    model.oldest_s = model.blocks == 0 ? age_s : std::max(model.oldest_s, age_s);
    model.newest_s = std::min(model.newest_s, age_s);
    model.blocks += 1;
    model.bytes += record.payload_bytes;
    model.block_bytes = record.block_bytes;
    ages.Add(age_s);
    depths.Add(record.block.depth);
  }
};

Json ToJson(const Histogram& histogram) {
  Json out = Json::object();
  for (size_t i = 0; i < histogram.ranges.size(); ++i) {
    out[histogram.ranges[i].name] = histogram.counts[i];
  }
  return out;
}

void PrintJson(const Contents& contents) {
  Json out;
  out["blocks"] = contents.blocks;
  out["bytes"] = contents.bytes;
  out["bytes_total"] = contents.bytes_total;
  out["models"] = Json::array();
  for (const auto& [id, model] : contents.models) {
    out["models"].push_back({{"model_id", FormatId(id)},
                             {"blocks", model.blocks},
                             {"bytes", model.bytes},
                             {"block_bytes", model.block_bytes},
                             {"oldest_seconds", model.oldest_s},
                             {"newest_seconds", model.newest_s}});
  }
  out["ages"] = ToJson(contents.ages);
  out["depths"] = ToJson(contents.depths);
  std::puts(Dump(out).c_str());
}

void PrintHistogram(const char* title, const Histogram& histogram, uint64_t total) {
  Table table({title, ">BLOCKS", ">OF ALL"});
  for (size_t i = 0; i < histogram.ranges.size(); ++i) {
    if (histogram.counts[i] == 0) continue;
    table.AddRow({histogram.ranges[i].name, FormatCount(histogram.counts[i]),
                  FormatPercent(histogram.counts[i], total)});
  }
  if (!table.empty()) std::printf("\n%s", table.Render().c_str());
}

void PrintTables(const Contents& contents) {
  std::printf("%s blocks, %s of %s\n", FormatCount(contents.blocks).c_str(),
              FormatBytes(contents.bytes).c_str(), FormatBytes(contents.bytes_total).c_str());
  Table models({"MODEL", ">BLOCKS", ">BYTES", ">A BLOCK", ">OLDEST", ">NEWEST"});
  for (const auto& [id, model] : contents.models) {
    models.AddRow({FormatId(id), FormatCount(model.blocks), FormatBytes(model.bytes),
                   FormatBytes(model.block_bytes), FormatAge(model.oldest_s),
                   FormatAge(model.newest_s)});
  }
  if (!models.empty()) std::printf("\n%s", models.Render().c_str());
  PrintHistogram("AGE", contents.ages, contents.blocks);
  PrintHistogram("DEPTH", contents.depths, contents.blocks);
}

int RunStats(const Invocation& invocation, const NvmeFlags& flags) {
  auto audit = NvmeAudit::Open(flags.directory);
  if (!audit.ok()) return Fail(invocation, kCommand, audit.status());
  const auto now_s = static_cast<uint64_t>(absl::ToUnixSeconds(absl::Now()));
  Contents contents;
  contents.bytes_total = (*audit)->slots_bytes();
  absl::Status status =
      (*audit)->ForEach([&](Slot, const NvmeRecord& record) { contents.Add(record, now_s); });
  if (!status.ok()) return Fail(invocation, kCommand, status);
  if (invocation.json) {
    PrintJson(contents);
  } else {
    PrintTables(contents);
  }
  return kOk;
}

absl::StatusOr<std::vector<NvmeAudit::Finding>> Check(const NvmeAudit& audit, uint64_t threads) {
  std::unique_ptr<Progress> progress;
  const absl::Time start = absl::Now();
  return audit.Check(static_cast<int>(threads), [&](uint64_t done, uint64_t total) {
    if (progress == nullptr) progress = std::make_unique<Progress>("nvme check", total >> 20);
    const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
    progress->Update(done >> 20, absl::StrCat("MiB, ", FormatRate(done / seconds)));
  });
}

// What a daemon would find nowhere or refuse to read. A drive that fails may read again.
absl::Status Repair(NvmeAudit& audit, const std::vector<NvmeAudit::Finding>& findings) {
  std::vector<Slot> slots;
  for (const NvmeAudit::Finding& finding : findings) {
    if (finding.slot && finding.problem != NvmeAudit::Problem::kUnreadable) {
      slots.push_back(finding.slot);
    }
  }
  return audit.Erase(slots);
}

void PrintFindings(const Invocation& invocation,
                   const std::vector<NvmeAudit::Finding>& findings) {
  std::array<uint64_t, NvmeAudit::kProblemCount> counts{};
  for (const auto& finding : findings) ++counts[static_cast<int>(finding.problem)];
  if (invocation.json) {
    Json out;
    out["problems"] = Json::object();
    for (int i = 0; i < NvmeAudit::kProblemCount; ++i) {
      out["problems"][NvmeAudit::Name(static_cast<NvmeAudit::Problem>(i))] = counts[i];
    }
    out["findings"] = Json::array();
    for (const auto& finding : findings) {
      out["findings"].push_back({{"slot", finding.slot.number()},
                                 {"problem", NvmeAudit::Name(finding.problem)},
                                 {"model_id", FormatId(finding.model_id)},
                                 {"detail", finding.detail}});
    }
    std::puts(Dump(out).c_str());
    return;
  }
  if (findings.empty()) {
    std::puts("nothing is wrong");
    return;
  }
  Table table({">SLOT", "PROBLEM", "MODEL", "DETAIL"});
  for (const auto& finding : findings) {
    table.AddRow({absl::StrCat(finding.slot.number()), NvmeAudit::Name(finding.problem),
                  FormatId(finding.model_id), finding.detail});
    if (&finding - findings.data() + 1 == kFindingsShown) break;
  }
  std::printf("%s\n%s problems%s; each is a miss to a daemon, never a wrong byte\n",
              table.Render().c_str(), FormatCount(findings.size()).c_str(),
              findings.size() > kFindingsShown ? ", the first of them above" : "");
}

int RunCheck(const Invocation& invocation, const NvmeFlags& flags) {
  auto audit = NvmeAudit::Open(flags.directory);
  if (!audit.ok()) return Fail(invocation, kCommand, audit.status());
  const auto findings = Check(**audit, flags.threads);
  if (!findings.ok()) return Fail(invocation, kCommand, findings.status());
  if (flags.repair && !findings->empty()) {
    absl::Status repaired = Repair(**audit, *findings);
    if (!repaired.ok()) return Fail(invocation, kCommand, repaired);
  }
  PrintFindings(invocation, *findings);
  return findings->empty() ? kOk : kFailed;
}

int RunDrop(const Invocation& invocation, const NvmeFlags& flags) {
  auto audit = NvmeAudit::Open(flags.directory);
  if (!audit.ok()) return Fail(invocation, kCommand, audit.status());
  std::vector<Slot> slots;
  uint64_t bytes = 0;
  absl::Status status = (*audit)->ForEach([&](Slot slot, const NvmeRecord& record) {
    if (record.block.model_id != flags.model_id) return;
    slots.push_back(slot);
    bytes += record.payload_bytes;
  });
  if (status.ok()) status = (*audit)->Erase(slots);
  if (!status.ok()) return Fail(invocation, kCommand, status);
  if (invocation.json) {
    std::puts(Dump(Json{{"model_id", FormatId(flags.model_id)},
                        {"dropped_blocks", slots.size()},
                        {"dropped_bytes", bytes}})
                  .c_str());
  } else {
    std::printf("dropped %s blocks, %s, of model %s\n", FormatCount(slots.size()).c_str(),
                FormatBytes(bytes).c_str(), FormatId(flags.model_id).c_str());
  }
  return kOk;
}

using RunFn = int (*)(const Invocation&, const NvmeFlags&);

CLI::App* AddAction(CLI::App& nvme, Invocation& invocation, std::shared_ptr<NvmeFlags> flags,
                    const char* name, const char* help, RunFn run) {
  CLI::App* const action = nvme.add_subcommand(name, help);
  action->add_option("--dir", flags->directory, "The daemon's --nvme-dir; it must not be running")
      ->type_name("FOLDER")
      ->required();
  action->callback([&invocation, flags, run] {
    invocation.run = [&invocation, flags, run] {
      // Standard output is for the answer.
      spdlog::set_default_logger(spdlog::stderr_color_mt("larder"));
      return run(invocation, *flags);
    };
  });
  return action;
}

}  // namespace

void RegisterNvme(CLI::App& app, Invocation& invocation) {
  CLI::App* const nvme =
      app.add_subcommand(kCommand, "Look into an NVMe tier's directory while no daemon has it");
  nvme->require_subcommand(1);
  const auto flags = std::make_shared<NvmeFlags>();
  CLI::App* const check =
      AddAction(*nvme, invocation, flags, "check",
                "Read and verify everything; exits 1 when anything is wrong", RunCheck);
  AddNumber(*check, "--threads", flags->threads, 1, kThreadsMax,
            "Threads that read (default one a CPU, at most 8)");
  check->add_flag("--repair", flags->repair, "Delete the records that are wrong");
  AddAction(*nvme, invocation, flags, "stats",
            "Blocks, bytes, models, ages and depths; reads no payload", RunStats);
  CLI::App* const drop =
      AddAction(*nvme, invocation, flags, "drop", "Delete all blocks of a model", RunDrop);
  AddId(*drop, "--model", flags->model_id, "The model's id, as stats shows it")->required();
}

}  // namespace larder::cli
