// Experiment "restore": a prefix is computed once and pushed down to NVMe; the daemon is killed
// with SIGKILL and started again; a new engine gets a request with that prefix.
//
//   cold     no cache: the whole prompt is computed
//   NVMe     after the restart, nothing is in HOST: blocks are read from the drive
//   HOST     the same request again: blocks are read in place
//
// A round restarts the daemon and makes a new engine for the longest prefix; for shorter ones it
// empties HOST. Engines of the rounds only read, so that every round finds the same.
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

// One prompt's three ways to its first token.
struct Length {
  uint32_t tokens = 0;  // of the prefix
  std::vector<uint32_t> prompt;
  std::vector<uint32_t> answer;  // computed without a cache
  std::vector<absl::Duration> cold, host, nvme;
  RequestStats of_host, of_nvme;  // the last request's
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

// A request whose prefix is in HOST or on NVMe. Every token of it that was not reused was left for
// a reason that the engine counts.
absl::Status MeasureWarm(Engine& engine, const Length& length, uint32_t block_tokens,
                         std::vector<absl::Duration>& ttfts, RequestStats& stats) {
  const absl::StatusOr<Result> result = Generate(engine, length.prompt, kAnswerTokens);
  if (!result.ok()) return result.status();
  stats = result->stats;
  ttfts.push_back(stats.ttft);
  absl::Status holds =
      CheckSame(result->completions[0].tokens, length.answer, "restore, with the cache");
  holds.Update(
      CheckCount(stats.reused_tokens() + (stats.cut_blocks + stats.given_up_blocks) * block_tokens,
                 length.tokens, "restore, tokens found"));
  return holds;
}

absl::Status RunRound(Bench& bench, Published& published, std::vector<Length>& lengths) {
  const uint32_t block_tokens = published.transformer().options().block_tokens;
  if (absl::Status restarted = published.daemon().KillAndRestart(); !restarted.ok()) {
    return restarted;
  }
  absl::StatusOr<std::unique_ptr<Engine>> engine =
      bench.NewEngine(&published.daemon(), /*publish=*/false);
  if (!engine.ok()) return engine.status();
  for (Length& length : lengths) {  // longest first
    absl::Status done = MeasureWarm(**engine, length, block_tokens, length.nvme, length.of_nvme);
    if (done.ok()) {
      done = MeasureWarm(**engine, length, block_tokens, length.host, length.of_host);
    }
    if (done.ok()) done = published.daemon().Evict(v1::TIER_HOST);
    if (!done.ok()) return done;
  }
  return absl::OkStatus();
}

class Figures {
 public:
  Figures(const Bench& bench, const Transformer& transformer)
      : block_bytes_(transformer.geometry().BlockBytes()),
        block_tokens_(transformer.options().block_tokens) {
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
    AddWarm(length, "HOST", length.host, length.of_host, host_);
    AddWarm(length, "NVMe", length.nvme, length.of_nvme, nvme_);
    cold_.points.emplace_back(length.tokens, absl::ToDoubleMilliseconds(cold));
  }

  absl::Status Write(Bench& bench) {
    absl::Status added = bench.report().Add(table_);
    for (Curve* curve : {&cold_, &host_, &nvme_}) {
      std::reverse(curve->points.begin(), curve->points.end());
    }
    added.Update(bench.report().Add(
        Plot{.name = "restore",
             .title = absl::StrCat("Time to first token, ", bench.options().model_name),
             .x_label = "prefix (tokens)",
             .y_label = "time to first token (ms)",
             .y_log = true,
             .curves = {cold_, nvme_, host_}}));
    return added;
  }

 private:
  void AddWarm(const Length& length, const std::string& from,
               const std::vector<absl::Duration>& ttfts, const RequestStats& stats, Curve& curve) {
    const absl::Duration cold = Median(length.cold), warm = Median(ttfts);
    const double read = static_cast<double>(stats.reused_nvme_tokens / block_tokens_) *
                        static_cast<double>(block_bytes_) / (1 << 20);
    table_.rows.push_back({absl::StrCat(length.tokens), from, Milliseconds(warm),
                           Fixed(100 * absl::FDivDuration(warm, cold), 2),
                           Milliseconds(cold - warm), absl::StrCat(stats.reused_tokens()),
                           absl::StrCat(stats.prompt_tokens - stats.reused_tokens()),
                           Fixed(read, 2), Milliseconds(stats.restore), YesNo(true)});
    curve.points.emplace_back(length.tokens, absl::ToDoubleMilliseconds(warm));
  }

  const uint64_t block_bytes_;
  const uint32_t block_tokens_;
  Table table_;
  Curve cold_{.title = "computed"};
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
  const auto add = [&](const char* name, const std::vector<absl::Duration>& ttfts, double goal) {
    const absl::Duration warm = Median(ttfts);
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

}  // namespace

absl::Status RunRestore(Bench& bench) {
  absl::StatusOr<Published> published = Published::Create(bench);
  if (!published.ok()) return published.status();
  const uint32_t block_tokens = published->transformer().options().block_tokens;
  std::vector<Length> lengths;
  for (const uint32_t part : {1, 2, 4}) {
    const auto tokens =
        static_cast<uint32_t>(published->prefix().size() / part / block_tokens * block_tokens);
    if (tokens == 0) break;
    Length& length = lengths.emplace_back();
    length.tokens = tokens;
    length.prompt = published->PromptOf(tokens);
    if (absl::Status cold = MeasureCold(bench, length); !cold.ok()) return cold;
  }
  for (int round = 0; round < kRounds; ++round) {
    if (absl::Status done = RunRound(bench, *published, lengths); !done.ok()) return done;
  }
  Figures figures(bench, published->transformer());
  for (const Length& length : lengths) figures.Add(length);
  if (absl::Status added = figures.Write(bench); !added.ok()) return added;
  bench.report().Say(absl::StrCat("Computing the prefix and putting it into the cache took ",
                                  Milliseconds(published->publishing_ttft()),
                                  " ms to the first token."));
  AddRows(bench, lengths.front());
  return absl::OkStatus();
}

}  // namespace larder::worker::bench
