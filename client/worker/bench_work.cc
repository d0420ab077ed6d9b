// Experiment "work": how many tokens' K/V are computed to generate a text, counted token by token.
//
//   prompt P, n new tokens        without K/V kept       P + (P + 1) + ... + (P + n - 1)
//                                 with K/V kept          P + n
//
// The pass that gives a token computes the K/V of what it reads. Without a cache that is every
// token before it; with one, only those that are new. P + n counts the last token's K/V as well,
// which nothing of this text needs and the next turn starts from.
#include <algorithm>
#include <chrono>
#include <memory>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/worker/bench.h"
#include "client/worker/block_pool.h"
#include "client/worker/kv_blocks.h"
#include "client/worker/sampler.h"

namespace larder::worker::bench {
namespace {

using SteadyClock = std::chrono::steady_clock;

constexpr uint32_t kPrompt = 5;
constexpr uint32_t kShort = 10;
constexpr uint32_t kMiddle = 100;
constexpr uint32_t kLong = 1'000;
constexpr double kLongRatioMin = 100;
constexpr absl::Duration kLongMax = absl::Minutes(1);
constexpr int kLatencyRuns = 3;

// A sequence whose passes are counted.
class Sequence {
 public:
  Sequence(Transformer& transformer, BlockPool& pool)
      : transformer_(transformer), blocks_(pool, transformer.options().block_tokens) {}

  // Computes tokens [begin, tokens.size()), whose predecessors' K/V are there, in passes of at
  // most kChunkTokens; the likeliest token after them.
  absl::StatusOr<uint32_t> Next(std::span<const uint32_t> tokens, uint32_t begin) {
    std::vector<float> logits(transformer_.config().vocab);
    blocks_.Grow(tokens.size(), tokens.size());
    for (size_t at = begin; at < tokens.size();) {
      const size_t count = std::min<size_t>(kChunkTokens, tokens.size() - at);
      const bool last = at + count == tokens.size();
      const Chunk chunk{.tokens = tokens.subspan(at, count),
                        .position = static_cast<uint32_t>(at),
                        .blocks = blocks_.table(),
                        .logits = last ? Logits::kLast : Logits::kNone};
      const std::span<float> rows = last ? std::span<float>(logits) : std::span<float>();
      if (absl::Status done = transformer_.Forward({&chunk, 1}, rows); !done.ok()) return done;
      computed_ += count;
      at += count;
    }
    return Greedy(logits);
  }

  uint64_t computed() const { return computed_; }

 private:
  Transformer& transformer_;
  KvBlocks blocks_;
  uint64_t computed_ = 0;
};

struct Generated {
  std::vector<uint32_t> tokens;  // with the prompt
  uint64_t computed = 0;
  absl::Duration took = absl::ZeroDuration();
};

absl::StatusOr<Generated> GenerateTokens(Transformer& transformer, BlockPool& pool,
                                         std::vector<uint32_t> prompt, uint32_t n, bool keep) {
  Generated generated{.tokens = std::move(prompt)};
  std::vector<uint32_t>& tokens = generated.tokens;
  Sequence sequence(transformer, pool);
  const SteadyClock::time_point start = SteadyClock::now();
  uint32_t kept = 0;
  for (uint32_t i = 0; i < n; ++i) {
    const absl::StatusOr<uint32_t> token = sequence.Next(tokens, kept);
    if (!token.ok()) return token.status();
    if (keep) kept = static_cast<uint32_t>(tokens.size());
    tokens.push_back(*token);
  }
  generated.took = absl::FromChrono(SteadyClock::now() - start);
  if (keep) {
    if (absl::Status last = sequence.Next(tokens, kept).status(); !last.ok()) return last;
  }
  generated.computed = sequence.computed();
  return generated;
}

// The smallest model there can be; what is counted does not depend on the model.
absl::StatusOr<std::unique_ptr<Transformer>> SmallestModel() {
  ModelConfig config;
  config.layers = 1;
  config.hidden = 32;
  config.heads = 2;
  config.kv_heads = 1;
  config.head_dim = 16;
  config.ffn = 32;
  config.vocab = 256;
  config.max_positions = 2'048;
  config.tied_embeddings = true;
  absl::StatusOr<Weights> weights = Weights::Random(config, 1);
  if (!weights.ok()) return weights.status();
  return Transformer::Create(*std::move(weights));
}

class Counts {
 public:
  explicit Counts(Bench& bench) : bench_(bench) {
    table_.name = "work";
    table_.titles = {"model", "prompt tokens", "new tokens", "K/V computed without", "with kept",
                     "ratio", "same tokens",   "s without",  "s with kept"};
  }

  // Both ways, and that the counts are those of the head of this file.
  absl::StatusOr<absl::Duration> Measure(const std::string& model, Transformer& transformer,
                                         uint32_t n) {
    absl::StatusOr<std::unique_ptr<BlockPool>> pool = BlockPool::Create(
        transformer.block_memory(), kPoolBytes, transformer.geometry().BlockBytes());
    if (!pool.ok()) return pool.status();
    const std::vector<uint32_t> prompt = bench_.Tokens(0, kPrompt);
    absl::StatusOr<Generated> without = GenerateTokens(transformer, **pool, prompt, n, false);
    if (!without.ok()) return without.status();
    absl::StatusOr<Generated> with = GenerateTokens(transformer, **pool, prompt, n, true);
    if (!with.ok()) return with.status();
    const uint64_t sum = uint64_t{n} * kPrompt + uint64_t{n} * (n - 1) / 2;
    absl::Status holds = CheckSame(without->tokens, with->tokens, "work");
    holds.Update(CheckCount(without->computed, sum, "work, without K/V"));
    holds.Update(CheckCount(with->computed, kPrompt + n, "work, K/V kept"));
    const double ratio = static_cast<double>(without->computed) / with->computed;
    if (n >= kLong && ratio <= kLongRatioMin) {
      holds.Update(absl::InternalError(absl::StrCat("work: a ratio of ", ratio)));
    }
    if (!holds.ok()) return holds;
    table_.rows.push_back({model, absl::StrCat(kPrompt), absl::StrCat(n),
                           absl::StrCat(without->computed), absl::StrCat(with->computed),
                           Fixed(ratio, 1), YesNo(true),
                           Fixed(absl::ToDoubleSeconds(without->took), 3),
                           Fixed(absl::ToDoubleSeconds(with->took), 3)});
    return without->took;
  }

  Table& table() { return table_; }

 private:
  Bench& bench_;
  Table table_;
};

// What one more token takes at each length, both ways.
absl::Status Latency(Bench& bench, Transformer& transformer) {
  absl::StatusOr<std::unique_ptr<BlockPool>> pool = BlockPool::Create(
      transformer.block_memory(), kPoolBytes, transformer.geometry().BlockBytes());
  if (!pool.ok()) return pool.status();
  const uint32_t longest = std::min(transformer.config().max_positions - 1, 2'047u);
  const std::vector<uint32_t> tokens = bench.Tokens(0, longest + 1);
  Curve without{.title = "every token computed again"};
  Curve with{.title = "K/V kept"};
  Table table{.name = "work_latency",
              .heading = absl::StrCat("Time of one more token by sequence length, ",
                                      bench.options().model_name, "; median of ", kLatencyRuns),
              .titles = {"length tokens", "ms without", "ms with kept", "ratio"}};
  for (uint32_t length = 16; length <= longest; length = std::max(length + 1, length * 3 / 2)) {
    Sequence sequence(transformer, **pool);
    std::vector<absl::Duration> all, one;
    for (int run = 0; run < kLatencyRuns; ++run) {
      for (const bool keep : {false, true}) {
        const SteadyClock::time_point start = SteadyClock::now();
        const std::span<const uint32_t> read = std::span(tokens).first(length + 1);
        absl::Status done = sequence.Next(read, keep ? length : 0).status();
        if (!done.ok()) return done;
        (keep ? one : all).push_back(absl::FromChrono(SteadyClock::now() - start));
      }
    }
    const absl::Duration slow = Median(all), fast = Median(one);
    without.points.emplace_back(length + 1, absl::ToDoubleMilliseconds(slow));
    with.points.emplace_back(length + 1, absl::ToDoubleMilliseconds(fast));
    table.rows.push_back({absl::StrCat(length + 1), Milliseconds(slow), Milliseconds(fast),
                          Fixed(absl::FDivDuration(slow, fast), 1)});
  }
  absl::Status added = bench.report().Add(table);
  added.Update(bench.report().Add(
      Plot{.name = "work_latency",
           .title = absl::StrCat("Time of one more token, ", bench.options().model_name),
           .x_label = "sequence length (tokens)",
           .y_label = "time of a token (ms)",
           .x_log = true,
           .y_log = true,
           .curves = {without, with}}));
  return added;
}

}  // namespace

absl::Status RunWork(Bench& bench) {
  absl::StatusOr<Transformer*> model = bench.LoadModel();
  if (!model.ok()) return model.status();
  const uint32_t context = (*model)->config().max_positions;
  Counts counts(bench);
  counts.table().heading = "K/V computations, counted";
  absl::Duration middle;
  for (const uint32_t n : {kShort, kMiddle}) {
    if (kPrompt + n > context) continue;
    absl::StatusOr<absl::Duration> took = counts.Measure(bench.options().model_name, **model, n);
    if (!took.ok()) return took.status();
    middle = *took;
  }
  // The work grows with the square of n.
  const bool fits = kPrompt + kLong <= context && middle * 100 <= kLongMax;
  std::unique_ptr<Transformer> smallest;
  if (!fits) {
    absl::StatusOr<std::unique_ptr<Transformer>> created = SmallestModel();
    if (!created.ok()) return created.status();
    smallest = *std::move(created);
  }
  absl::StatusOr<absl::Duration> took =
      fits ? counts.Measure(bench.options().model_name, **model, kLong)
           : counts.Measure("one layer of width 32", *smallest, kLong);
  if (!took.ok()) return took.status();
  if (absl::Status added = bench.report().Add(counts.table()); !added.ok()) return added;
  return Latency(bench, **model);
}

}  // namespace larder::worker::bench
