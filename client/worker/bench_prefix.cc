// Experiment "prefix": two requests share a long document. The second computes only what is its
// own.
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/worker/bench.h"

namespace larder::worker::bench {
namespace {

constexpr uint64_t kQuestions = 3;  // after each document, besides the one that comes first

struct Shared {
  Result first;                       // it computes the document
  std::vector<Result> later;          // a question each, of the same document
  std::vector<absl::Duration> alone;  // the same requests without a cache
};

absl::StatusOr<Shared> Measure(const Bench& bench, Engine& cached, Engine& uncached,
                               uint64_t document, uint32_t tokens) {
  Shared shared;
  absl::StatusOr<Result> first =
      Generate(cached, Prompt(bench, document, tokens, 0), kAnswerTokens);
  if (!first.ok()) return first.status();
  shared.first = *std::move(first);
  for (uint64_t question = 1; question <= kQuestions; ++question) {
    const std::vector<uint32_t> prompt = Prompt(bench, document, tokens, question);
    absl::StatusOr<Result> later = Generate(cached, prompt, kAnswerTokens);
    if (!later.ok()) return later.status();
    absl::StatusOr<Result> alone = Generate(uncached, prompt, kAnswerTokens);
    if (!alone.ok()) return alone.status();
    absl::Status holds = CheckSame(later->completions[0].tokens, alone->completions[0].tokens,
                                   "prefix, with the cache and without");
    holds.Update(CheckCount(later->stats.reused_tokens(), tokens, "prefix, tokens of the hit"));
    if (!holds.ok()) return holds;
    shared.alone.push_back(alone->stats.ttft);
    shared.later.push_back(*std::move(later));
  }
  return shared;
}

absl::Duration LaterTtft(const Shared& shared) {
  std::vector<absl::Duration> ttfts;
  for (const Result& later : shared.later) ttfts.push_back(later.stats.ttft);
  return Median(std::move(ttfts));
}

}  // namespace

absl::Status RunPrefix(Bench& bench) {
  absl::StatusOr<Transformer*> model = bench.LoadModel();
  if (!model.ok()) return model.status();
  const absl::StatusOr<uint32_t> tokens_max = PrefixTokensMax(bench);
  if (!tokens_max.ok()) return tokens_max.status();
  const uint32_t block_tokens = (*model)->options().block_tokens;
  absl::StatusOr<std::unique_ptr<Daemon>> daemon = bench.StartDaemon(4 * *tokens_max, true);
  if (!daemon.ok()) return daemon.status();
  absl::StatusOr<std::unique_ptr<Engine>> cached = bench.NewEngine(daemon->get(), true);
  if (!cached.ok()) return cached.status();
  absl::StatusOr<std::unique_ptr<Engine>> uncached = bench.NewEngine(nullptr, false);
  if (!uncached.ok()) return uncached.status();

  Table table{
      .name = "prefix",
      .heading =
          absl::StrCat("A document shared by requests with questions of ", kQuestionTokens,
                       " tokens, ", bench.options().model_name, "; TTFT: median of ", kQuestions),
      .titles = {"document tokens", "hit tokens", "computed tokens", "blocks saved", "MiB saved",
                 "first TTFT ms", "without cache ms", "with cache ms", "same tokens"}};
  Curve alone{.title = "computed"}, hit{.title = "document cached"};
  uint64_t document = 0;
  for (uint32_t tokens = *tokens_max / 8 / block_tokens * block_tokens; tokens > 0;) {
    absl::StatusOr<Shared> shared = Measure(bench, **cached, **uncached, document++, tokens);
    if (!shared.ok()) return shared.status();
    const RequestStats& stats = shared->later.front().stats;
    const uint64_t blocks = stats.reused_tokens() / block_tokens;
    const absl::Duration slow = Median(shared->alone), fast = LaterTtft(*shared);
    table.rows.push_back(
        {absl::StrCat(tokens), absl::StrCat(stats.reused_tokens()),
         absl::StrCat(stats.prompt_tokens - stats.reused_tokens()), absl::StrCat(blocks),
         Fixed(static_cast<double>(blocks * (*model)->geometry().BlockBytes()) / (1 << 20), 2),
         Milliseconds(shared->first.stats.ttft), Milliseconds(slow), Milliseconds(fast),
         YesNo(true)});
    alone.points.emplace_back(tokens, absl::ToDoubleMilliseconds(slow));
    hit.points.emplace_back(tokens, absl::ToDoubleMilliseconds(fast));
    if (tokens == *tokens_max) break;
    tokens = std::min(tokens * 2, *tokens_max);
  }
  absl::Status added = bench.report().Add(table);
  added.Update(bench.report().Add(
      Plot{.name = "prefix",
           .title = absl::StrCat("Time to first token, ", bench.options().model_name),
           .x_label = "document (tokens)",
           .y_label = "time to first token (ms)",
           .curves = {alone, hit}}));
  return added;
}

}  // namespace larder::worker::bench
