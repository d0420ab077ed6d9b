#include "client/worker/bench_published.h"

#include <utility>

namespace larder::worker::bench {

absl::StatusOr<Published> Published::Create(Bench& bench) {
  Published published(bench);
  absl::StatusOr<Transformer*> model = bench.LoadModel();
  if (!model.ok()) return model.status();
  published.transformer_ = *model;
  const absl::StatusOr<uint32_t> tokens = PrefixTokensMax(bench);
  if (!tokens.ok()) return tokens.status();
  published.prefix_ = bench.Tokens(0, *tokens);
  absl::StatusOr<std::unique_ptr<Daemon>> daemon = bench.StartDaemon(*tokens, false);
  if (!daemon.ok()) return daemon.status();
  published.daemon_ = *std::move(daemon);
  absl::StatusOr<std::unique_ptr<Engine>> engine = bench.NewEngine(published.daemon_.get(), true);
  if (!engine.ok()) return engine.status();
  const absl::StatusOr<Result> result = Generate(**engine, published.prefix_, 1);
  if (!result.ok()) return result.status();
  published.publishing_ttft_ = result->stats.ttft;
  absl::Status holds = CheckCount(result->stats.published_blocks,
                                  *tokens / (*model)->options().block_tokens, "blocks published");
  holds.Update(published.daemon_->Flush(bench.spec(), published.prefix_));
  if (!holds.ok()) return holds;
  return published;
}

std::vector<uint32_t> Published::PromptOf(uint32_t tokens) const {
  return Prompt(*bench_, 0, tokens, 0);
}

}  // namespace larder::worker::bench
