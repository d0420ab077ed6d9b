// Experiment "speculation": an n-gram draft proposes, the model verifies it in one pass, Fork and
// Truncate roll back (speculator.h). Against one pass a token: the same tokens, fewer passes.
#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/worker/bench.h"
#include "client/worker/block_pool.h"
#include "client/worker/cache_session.h"
#include "client/worker/kv_blocks.h"
#include "client/worker/speculator.h"

namespace larder::worker::bench {
namespace {

using SteadyClock = std::chrono::steady_clock;

constexpr uint32_t kPromptTokensMax = 768;
constexpr uint32_t kNewTokensMax = 256;
constexpr uint64_t kPrompts = 4;  // different texts

struct Setting {
  uint32_t draft_tokens;
  uint32_t branches;
};
constexpr Setting kSettings[] = {{0, 1}, {2, 1}, {4, 1}, {8, 1}, {16, 1}, {4, 3}, {8, 3}, {16, 3}};
constexpr Setting kLeased = {8, 3};  // once more, on blocks of a larderd

struct Outcome {
  SpeculationStats stats;  // summed over the prompts
  uint64_t tokens = 0;
  absl::Duration decoding;

  double TokensAPass() const {
    return static_cast<double>(tokens) / static_cast<double>(stats.passes);
  }
};

std::vector<std::string> RowOf(const char* blocks, const Setting& setting, const Outcome& outcome) {
  const SpeculationStats& stats = outcome.stats;
  const double seconds = absl::ToDoubleSeconds(outcome.decoding);
  return {blocks,
          absl::StrCat(setting.draft_tokens),
          absl::StrCat(setting.branches),
          absl::StrCat(stats.passes),
          Fixed(outcome.TokensAPass(), 2),
          absl::StrCat(stats.proposed_tokens),
          absl::StrCat(stats.accepted_tokens),
          absl::StrCat(stats.truncated_tokens),
          absl::StrCat(stats.forks),
          Fixed(static_cast<double>(outcome.tokens) / seconds, 0),
          YesNo(true)};
}

class SpeculationRun {
 public:
  SpeculationRun(Bench& bench, Transformer& transformer, BlockPool& pool)
      : bench_(bench), transformer_(transformer), pool_(pool) {
    const uint32_t context = transformer.config().max_positions;
    new_tokens_ = std::max(1u, std::min(kNewTokensMax, context / 3));
    prompt_tokens_ = std::max(1u, std::min(kPromptTokensMax, context / 2));
  }

  // Greedy decoding by the engine, which knows nothing of speculation.
  absl::Status MeasurePlain() {
    absl::StatusOr<std::unique_ptr<Engine>> engine = bench_.NewEngine(nullptr, false);
    if (!engine.ok()) return engine.status();
    for (uint64_t i = 0; i < kPrompts; ++i) {
      absl::StatusOr<Result> result = Generate(**engine, PromptOf(i), new_tokens_);
      if (!result.ok()) return result.status();
      plain_.push_back(std::move(result->completions[0].tokens));
    }
    return absl::OkStatus();
  }

  // On the worker's own blocks.
  absl::StatusOr<Outcome> Measure(const Setting& setting) {
    Outcome outcome;
    for (uint64_t i = 0; i < kPrompts; ++i) {
      Speculator speculator(transformer_, KvBlocks(pool_, block_tokens()), PromptOf(i), 0,
                            OptionsOf(setting));
      absl::Status done = Decode(speculator, i, outcome);
      done.Update(
          CheckCount(pool_.used(), speculator.blocks().size(), "speculation, blocks in use"));
      if (!done.ok()) return done;
    }
    return outcome;
  }

  // On blocks leased from a larderd, which forks the leases. What it has afterwards is what was
  // kept, and it holds nothing for us.
  absl::StatusOr<Outcome> MeasureLeased(const Setting& setting, const Daemon& daemon) {
    CacheOptions cache;
    cache.address = daemon.address();
    CacheSession session(cache, bench_.spec(), transformer_.block_memory().device(), nullptr);
    Outcome outcome;
    for (uint64_t i = 0; i < kPrompts; ++i) {
      absl::StatusOr<Lease> lease = session.Lookup(PromptOf(i), {});
      if (!lease.ok()) return lease.status();
      absl::Status done = CheckCount(lease->end(), 0, "speculation, blocks cached before");
      std::vector<uint32_t> tokens;
      {
        Speculator speculator(transformer_, KvBlocks(pool_, *std::move(lease), /*publish=*/true),
                              PromptOf(i), 0, OptionsOf(setting));
        done.Update(Decode(speculator, i, outcome));
        tokens.assign(speculator.tokens().begin(), speculator.tokens().end() - 1);
      }
      if (!done.ok()) return done;
      const absl::StatusOr<Lease> cached = session.Lookup(tokens, {});
      if (!cached.ok()) return cached.status();
      done.Update(CheckCount(cached->end(), tokens.size() / block_tokens(),
                             "speculation, blocks cached after"));
      done.Update(CheckCount(cached->reserved(), 0, "speculation, blocks reserved after"));
      if (!done.ok()) return done;
    }
    return outcome;
  }

  uint32_t prompt_tokens() const { return prompt_tokens_; }
  uint32_t new_tokens() const { return new_tokens_; }

 private:
  static SpeculationOptions OptionsOf(const Setting& setting) {
    SpeculationOptions options;
    options.draft_tokens = setting.draft_tokens;
    options.branches = setting.branches;
    return options;
  }

  // Decodes after prompt `i`, and compares.
  absl::Status Decode(Speculator& speculator, uint64_t i, Outcome& outcome) const {
    SteadyClock::time_point start;
    for (size_t end = prompt_tokens_ + new_tokens_; speculator.tokens().size() < end;) {
      const auto left = static_cast<uint32_t>(end - speculator.tokens().size());
      absl::Status done = speculator.Step(left);
      // What was rolled back is gone: the table ends with the tokens whose K/V were kept.
      const uint64_t kept = speculator.tokens().size() - 1;
      done.Update(CheckCount(speculator.blocks().size(),
                             (kept + block_tokens() - 1) / block_tokens(),
                             "speculation, blocks after a pass"));
      if (!done.ok()) return done;
      // The first pass computed the prompt, too.
      if (speculator.stats().passes == 1) start = SteadyClock::now();
    }
    outcome.decoding += absl::FromChrono(SteadyClock::now() - start);
    const std::span<const uint32_t> decoded = speculator.tokens().subspan(prompt_tokens_);
    outcome.tokens += decoded.size();
    const SpeculationStats& stats = speculator.stats();
    outcome.stats.passes += stats.passes;
    outcome.stats.proposed_tokens += stats.proposed_tokens;
    outcome.stats.accepted_tokens += stats.accepted_tokens;
    outcome.stats.forks += stats.forks;
    outcome.stats.truncated_tokens += stats.truncated_tokens;
    return CheckSame({decoded.begin(), decoded.end()}, plain_[i], "speculation");
  }

  uint32_t block_tokens() const { return transformer_.options().block_tokens; }

  std::vector<uint32_t> PromptOf(uint64_t i) const {
    return bench_.Tokens(i * kPromptTokensMax * 2, prompt_tokens_);
  }

  Bench& bench_;
  Transformer& transformer_;
  BlockPool& pool_;
  uint32_t prompt_tokens_;
  uint32_t new_tokens_;
  std::vector<std::vector<uint32_t>> plain_;
};

}  // namespace

absl::Status RunSpeculation(Bench& bench) {
  absl::StatusOr<Transformer*> model = bench.LoadModel();
  if (!model.ok()) return model.status();
  absl::StatusOr<std::unique_ptr<BlockPool>> pool =
      BlockPool::Create((*model)->block_memory(), kPoolBytes, (*model)->geometry().BlockBytes());
  if (!pool.ok()) return pool.status();
  SpeculationRun run(bench, **model, **pool);
  if (absl::Status plain = run.MeasurePlain(); !plain.ok()) return plain;
  Table table{
      .name = "speculation",
      .heading =
          absl::StrCat("Greedy decoding of ", run.new_tokens(), " tokens after ",
                       run.prompt_tokens(), ", ", kPrompts, " texts, ", bench.options().model_name),
      .titles = {"blocks", "draft tokens", "branches", "passes", "tokens a pass", "proposed",
                 "accepted", "rolled back", "forks", "tokens/s", "same tokens"}};
  Curve one{.title = "one branch"}, three{.title = "three branches"};
  for (const Setting& setting : kSettings) {
    absl::StatusOr<Outcome> outcome = run.Measure(setting);
    if (!outcome.ok()) return outcome.status();
    table.rows.push_back(RowOf("own", setting, *outcome));
    (setting.branches == 1 ? one : three)
        .points.emplace_back(setting.draft_tokens, outcome->TokensAPass());
  }
  if (!bench.options().larderd.empty()) {
    absl::StatusOr<std::unique_ptr<Daemon>> daemon =
        bench.StartDaemon(kPrompts * (run.prompt_tokens() + run.new_tokens()), false);
    if (!daemon.ok()) return daemon.status();
    absl::StatusOr<Outcome> outcome = run.MeasureLeased(kLeased, **daemon);
    if (!outcome.ok()) return outcome.status();
    table.rows.push_back(RowOf("leased", kLeased, *outcome));
  }
  absl::Status added = bench.report().Add(table);
  added.Update(bench.report().Add(
      Plot{.name = "speculation",
           .title = absl::StrCat("Speculation by n-grams, ", bench.options().model_name),
           .x_label = "draft (tokens)",
           .y_label = "tokens a pass",
           .curves = {one, three}}));
  return added;
}

}  // namespace larder::worker::bench
