// Experiment "restore": a prefix is computed once and pushed down to NVMe; the daemon is killed
// with SIGKILL and started again; a new engine gets a request with that prefix.
//
//   cold     no cache: the whole prompt is computed
//   NVMe     after the restart, nothing is in HOST: blocks are read from the drive
//   HOST     the same request again: blocks are read in place
//
// On a GPU blocks are read in place where they are in its memory:
//
//   NVMe     blocks are read from the drive, and copied to the GPU
//   GPU      the same request again: blocks are read in place
//   HOST     and once more, after GPU was emptied: blocks are copied to the GPU
//
// A round restarts the daemon and makes a new engine for the longest prefix; for shorter ones it
// empties HOST and GPU. Engines of the rounds only read, so that every round finds the same. Tokens
// that are not a cold run's, or blocks that are not found, end the experiment with an error, but
// only after its figures, which may tell why.
#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/worker/bench.h"
#include "client/worker/bench_published.h"

namespace larder::worker::bench {
namespace {

using SteadyClock = std::chrono::steady_clock;

constexpr int kRounds = 3;
// Cold runs are repeated as often, but no more once this is spent.
constexpr absl::Duration kColdBudget = absl::Seconds(10);
constexpr double kHostGoal = 0.05;
constexpr double kNvmeGoal = 0.15;

// A prompt whose prefix was found in one tier.
struct Warm {
  std::vector<absl::Duration> ttfts;
  RequestStats stats;  // the last request's
  absl::Status same;   // its tokens are a cold run's
  absl::Status found;  // as many as were put
};

// One prompt's ways to its first token.
struct Length {
  uint32_t tokens = 0;  // of the prefix
  std::vector<uint32_t> prompt;
  std::vector<uint32_t> answer;  // computed without a cache
  std::vector<absl::Duration> cold;
  Warm gpu, host, nvme;  // gpu: where a GPU computes
};

absl::Status MeasureCold(Bench& bench, Length& length) {
  absl::StatusOr<std::unique_ptr<Engine>> engine = bench.NewEngine(nullptr, false);
  if (!engine.ok()) return engine.status();
  absl::Duration spent;
  while (length.cold.size() < kRounds && spent < kColdBudget) {
    const absl::StatusOr<Result> result = Generate(**engine, length.prompt, kAnswerTokens);
    if (!result.ok()) return result.status();
    spent += result->stats.total;
    length.cold.push_back(result->stats.ttft);
    length.answer = result->completions[0].tokens;
  }
  return absl::OkStatus();
}

// A request whose prefix is cached. Every token of it that was not reused was left for
// a reason that the engine counts.
absl::Status MeasureWarm(Engine& engine, const Length& length, uint32_t block_tokens, Warm& warm) {
  const absl::StatusOr<Result> result = Generate(engine, length.prompt, kAnswerTokens);
  if (!result.ok()) return result.status();
  warm.stats = result->stats;
  warm.ttfts.push_back(warm.stats.ttft);
  const RequestStats& stats = warm.stats;
  warm.same.Update(
      CheckSame(result->completions[0].tokens, length.answer, "restore, with the cache"));
  warm.found.Update(
      CheckCount(stats.reused_tokens() + (stats.cut_blocks + stats.given_up_blocks) * block_tokens,
                 length.tokens, "restore, tokens found"));
  return absl::OkStatus();
}

absl::Status RunRound(Bench& bench, Published& published, std::vector<Length>& lengths) {
  const uint32_t block_tokens = published.transformer().options().block_tokens;
  if (absl::Status restarted = published.daemon().KillAndRestart(); !restarted.ok()) {
    return restarted;
  }
  absl::StatusOr<std::unique_ptr<Engine>> engine =
      bench.NewEngine(&published.daemon(), /*publish=*/false);
  if (!engine.ok()) return engine.status();
  const Daemon& daemon = published.daemon();
  for (Length& length : lengths) {  // longest first
    absl::Status done = MeasureWarm(**engine, length, block_tokens, length.nvme);
    if (done.ok() && bench.on_gpu()) {
      done = MeasureWarm(**engine, length, block_tokens, length.gpu);
      if (done.ok()) done = daemon.Evict(v1::TIER_GPU);
    }
    if (done.ok()) done = MeasureWarm(**engine, length, block_tokens, length.host);
    if (done.ok() && bench.on_gpu()) done = daemon.Evict(v1::TIER_GPU);
    if (done.ok()) done = daemon.Evict(v1::TIER_HOST);
    if (!done.ok()) return done;
  }
  return absl::OkStatus();
}

// Bytes that a request had to wait for, because its blocks were not where they are read in place.
uint64_t BytesMoved(const Bench& bench, const RequestStats& stats) {
  const uint64_t tokens =
      stats.reused_nvme_tokens + (bench.on_gpu() ? stats.reused_host_tokens : 0);
  return tokens / bench.transformer().options().block_tokens *
         bench.transformer().geometry().BlockBytes();
}

class Figures {
 public:
  explicit Figures(const Bench& bench) : bench_(bench) {
    table_.name = "restore";
    table_.heading =
        absl::StrCat("TTFT with a prefix restored, ", bench.options().model_name, "; question of ",
                     kQuestionTokens, " tokens; median of ", kRounds, " rounds");
    table_.titles = {"prefix tokens", "from",          "TTFT ms",         "of cold %",
                     "saved ms",      "reused tokens", "computed tokens", "MiB read",
                     "restore ms",    "same tokens"};
  }

  void Add(const Length& length) {
    const absl::Duration cold = Median(length.cold);
    table_.rows.push_back({absl::StrCat(length.tokens), "cold", Milliseconds(cold), "100", "0", "0",
                           absl::StrCat(length.prompt.size()), "0", "0", YesNo(true)});
    if (bench_.on_gpu()) AddWarm(length, "GPU", length.gpu, gpu_);
    AddWarm(length, "HOST", length.host, host_);
    AddWarm(length, "NVMe", length.nvme, nvme_);
    cold_.points.emplace_back(length.tokens, absl::ToDoubleMilliseconds(cold));
  }

  absl::Status Write(Report& report) {
    absl::Status added = report.Add(table_);
    std::vector<Curve> curves = {cold_, nvme_, host_};
    if (bench_.on_gpu()) curves.push_back(gpu_);
    for (Curve& curve : curves) std::reverse(curve.points.begin(), curve.points.end());
    added.Update(
        report.Add(Plot{.name = "restore",
                        .title = absl::StrCat("Time to first token, ", bench_.options().model_name),
                        .x_label = "prefix (tokens)",
                        .y_label = "time to first token (ms)",
                        .y_log = true,
                        .curves = std::move(curves)}));
    return added;
  }

 private:
  void AddWarm(const Length& length, const std::string& from, const Warm& way, Curve& curve) {
    const absl::Duration cold = Median(length.cold), warm = Median(way.ttfts);
    const RequestStats& stats = way.stats;
    table_.rows.push_back({absl::StrCat(length.tokens), from, Milliseconds(warm),
                           Fixed(100 * absl::FDivDuration(warm, cold), 2),
                           Milliseconds(cold - warm), absl::StrCat(stats.reused_tokens()),
                           absl::StrCat(stats.prompt_tokens - stats.reused_tokens()),
                           Fixed(static_cast<double>(BytesMoved(bench_, stats)) / (1 << 20), 2),
                           Milliseconds(stats.restore), YesNo(way.same.ok())});
    curve.points.emplace_back(length.tokens, absl::ToDoubleMilliseconds(warm));
  }

  const Bench& bench_;
  Table table_;
  Curve cold_{.title = "computed"};
  Curve gpu_{.title = "from GPU"};
  Curve host_{.title = "from HOST"};
  Curve nvme_{.title = "from NVMe after SIGKILL and restart"};
};

// Weights that were trained are small ones: reported beside the shape that the goals are for.
void AddRows(Bench& bench, const Length& length) {
  const bool goals = bench.options().random_weights;
  const std::string suffix = goals ? "" : "_trained";
  const absl::Duration cold = Median(length.cold);
  const std::string against =
      absl::StrCat("cold: ", Milliseconds(cold), " ms for ", length.prompt.size(), " tokens, ",
                   bench.options().model_name);
  const auto add = [&](const char* name, const Warm& way, double goal) {
    const absl::Duration warm = Median(way.ttfts);
    bench.report().Add(
        GoalRow{.name = name + suffix,
                .value = absl::FDivDuration(warm, cold),
                .unit = "x",
                .against = absl::StrCat(against, "; this: ", Milliseconds(warm), " ms"),
                .at_most = goals ? goal : 0});
  };
  add("ttft_host_over_cold", length.host, kHostGoal);
  add("ttft_nvme_over_cold", length.nvme, kNvmeGoal);
}

// Of each length: what the first token takes of a cold one's time, and how fast blocks came to it.
// No goals: nothing of this has been measured yet.
void AddGpuRows(Bench& bench, const Length& length) {
  const absl::Duration cold = Median(length.cold);
  const std::string tokens = length.tokens % 1024 == 0 ? absl::StrCat(length.tokens / 1024, "k")
                                                       : absl::StrCat(length.tokens);
  const struct {
    const char* tier;
    const Warm& way;
  } ways[] = {{"gpu", length.gpu}, {"host", length.host}, {"nvme", length.nvme}};
  for (const auto& [tier, way] : ways) {
    const absl::Duration warm = Median(way.ttfts);
    const std::string name = absl::StrCat(tier, "_", tokens);
    bench.report().Add(GoalRow{
        .name = absl::StrCat("gpu_ttft_over_cold_", name),
        .value = absl::FDivDuration(warm, cold),
        .unit = "x",
        .against = absl::StrCat("cold: ", Milliseconds(cold), " ms for ", length.prompt.size(),
                                " tokens, ", bench.options().model_name,
                                "; this: ", Milliseconds(warm), " ms")});
    const double moved = static_cast<double>(BytesMoved(bench, way.stats));
    if (moved == 0) continue;
    bench.report().Add(
        GoalRow{.name = absl::StrCat("gpu_restore_", name),
                .value = moved / 1e9 / absl::ToDoubleSeconds(way.stats.restore),
                .unit = "GB/s",
                .against = absl::StrCat("of a first token's ", Milliseconds(warm), " ms, ",
                                        Milliseconds(way.stats.restore), " ms for ",
                                        Fixed(moved / (1 << 20), 0), " MiB")});
  }
}

}  // namespace

absl::Status RunRestore(Bench& bench) {
  absl::StatusOr<Published> published = Published::Create(bench);
  if (!published.ok()) return published.status();
  std::vector<Length> lengths;
  for (const uint32_t part : {1, 2, 4}) {
    const uint32_t tokens =
        WholePrefix(bench, static_cast<uint32_t>(published->prefix().size()) / part);
    if (tokens == 0) break;
    Length& length = lengths.emplace_back();
    length.tokens = tokens;
    length.prompt = published->PromptOf(tokens);
    if (absl::Status cold = MeasureCold(bench, length); !cold.ok()) return cold;
  }
  for (int round = 0; round < kRounds; ++round) {
    if (absl::Status done = RunRound(bench, *published, lengths); !done.ok()) return done;
  }
  Figures figures(bench);
  for (const Length& length : lengths) figures.Add(length);
  if (absl::Status added = figures.Write(bench.report()); !added.ok()) return added;
  bench.report().Say(absl::StrCat("Computing the prefix and putting it into the cache took ",
                                  Milliseconds(published->publishing_ttft()),
                                  " ms to the first token."));
  if (!bench.on_gpu()) {
    AddRows(bench, lengths.front());
  } else {
    for (const Length& length : lengths) AddGpuRows(bench, length);
  }
  absl::Status holds;
  for (const Length& length : lengths) {
    for (const Warm* way : {&length.gpu, &length.host, &length.nvme}) {
      holds.Update(way->same);
      holds.Update(way->found);
    }
  }
  return holds;
}

}  // namespace larder::worker::bench
