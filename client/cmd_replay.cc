// larder replay: drives a daemon with a trace.
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/commands.h"
#include "client/flags.h"
#include "client/output.h"
#include "client/replay.h"
#include "client/replay_summary.h"
#include "client/trace.h"

namespace larder::cli {
namespace {

constexpr char kCommand[] = "replay";

int RunReplay(const Invocation& invocation, const ReplayFlags& flags) {
  if (flags.as_worker < flags.workers) return RunReplayWorker(invocation, flags);
  absl::StatusOr<std::vector<TraceRequest>> requests =
      ReadTrace(flags.trace, {flags.skip, flags.limit});
  if (!requests.ok()) {
    return Fail(invocation, kCommand,
                absl::InvalidArgumentError(absl::StrCat("--trace: ", requests.status().message())));
  }
  ReplaySummary summary(requests->size(), flags.verify);
  const absl::Time start = absl::Now();
  absl::StatusOr<WorkerFates> fates = WorkerFates();
  {
    Progress progress(kCommand, requests->size());
    fates = RunWorkers(
        invocation.argv, flags, flags.skip + requests->size(), [&](const WorkerLine& line) {
          summary.Add(line);
          progress.Update(summary.requests(), absl::StrCat(summary.bytes_wrong(), " bytes wrong"));
        });
  }
  if (!fates.ok()) return Fail(invocation, kCommand, fates.status());
  summary.Finish(*fates, absl::Now() - start);
  if (summary.requests() == 0 && !fates->failed.empty()) {
    const WorkerFailed& first = fates->failed.front();
    return Fail(invocation, kCommand, absl::Status(first.code, first.message));
  }
  if (invocation.json) {
    std::puts(Dump(summary.ToJson()).c_str());
  } else {
    std::fputs(summary.Table().c_str(), stdout);
  }
  return summary.exit_code();
}

void AddFlags(CLI::App& replay, ReplayFlags& flags) {
  constexpr uint64_t kAny = std::numeric_limits<uint64_t>::max();
  replay.add_option("--trace", flags.trace, "JSON lines with hash_ids")
      ->type_name("FILE")
      ->required();
  AddNumber(replay, "--workers", flags.workers, 1, 64, "Worker processes (default 4)");
  AddNumber(replay, "--skip", flags.skip, 0, kAny / 2, "Leave out the first requests (default 0)");
  AddNumber(replay, "--limit", flags.limit, 1, kAny, "At most so many requests (default all)");
  replay.add_flag("--verify", flags.verify, "Compare every byte of every hit");
  AddNumber(replay, "--hold-ms", flags.hold_ms, 0, 60'000,
            "Milliseconds that a lease is held after its last put (default 2)");
  AddNumber(replay, "--flush-every", flags.flush_every, 0, kAny,
            "Make a lease durable every so many requests of a worker; 0: never (default 0)");
  AddTier(replay, "--prefetch-tier", flags.prefetch_tier, /*nvme=*/false,
          "gpu or host (default the highest)");
  AddDuration(replay, "--reconnect-timeout", flags.reconnect_timeout,
              "How long a worker looks for a daemon that went away (default 30s)");
  replay.add_flag("--respawn", flags.respawn,
                  "Start a killed worker again, after the request that it was in");
  flags.model.set_default_name("larder-replay");
  flags.model.AddTo(replay);
  AddNumber(replay, "--as-worker", flags.as_worker, 0, 63, "")->group("");
  AddNumber(replay, "--resume-at", flags.resume_at, 0, kAny, "")->group("");
}

}  // namespace

void RegisterReplay(CLI::App& app, Invocation& invocation) {
  CLI::App* const replay = app.add_subcommand(
      kCommand,
      "Drive a daemon with a trace: each worker process looks up, prefetches, reads, fills what is "
      "missing, puts and releases");
  const auto flags = std::make_shared<ReplayFlags>();
  AddFlags(*replay, *flags);
  replay->callback([&invocation, flags] {
    invocation.run = [&invocation, flags] { return RunReplay(invocation, *flags); };
  });
}

}  // namespace larder::cli
