// Experiment "sinks": a text many times as long as the model's context, foretold token by token
// (StreamingLLM, Xiao et al. 2023).
//
//   full             everything is kept, positions go past the trained length
//   window           the last tokens only
//   sinks + window   a block of the very first tokens, and the last ones
//
// The latter two give the blocks in between back to the pool and count positions by what is left.
#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/worker/bench.h"
#include "client/worker/block_pool.h"
#include "client/worker/perplexity.h"
#include "client/worker/streaming_blocks.h"

namespace larder::worker::bench {
namespace {

constexpr uint32_t kContexts = 8;  // length of the text, in contexts
constexpr uint32_t kTokensMax = 16'384;
constexpr uint32_t kPointsPerContext = 4;  // of the curves

struct Way {
  std::string name;
  uint32_t sink_blocks = 0;
  uint32_t window_blocks = 0;  // 0: full
};

struct Outcome {
  Likelihood within, beyond;  // the trained length
  std::vector<Likelihood> parts;
  std::vector<uint64_t> blocks;  // in use, at the end of each part
  uint64_t blocks_max = 0;
  uint64_t given_back = 0;
};

// What a run is made of, in whole blocks.
struct Sizes {
  uint32_t block_tokens;
  uint32_t context;      // tokens
  uint32_t step_tokens;  // of one pass
  uint32_t part_tokens;
  uint32_t tokens;
};

Sizes SizesOf(const Transformer& transformer) {
  Sizes sizes{};
  sizes.block_tokens = transformer.options().block_tokens;
  sizes.context = std::min(transformer.config().max_positions, kTokensMax / kContexts);
  sizes.part_tokens =
      std::max(sizes.context / kPointsPerContext / sizes.block_tokens * sizes.block_tokens,
               sizes.block_tokens);
  sizes.step_tokens =
      std::max(std::min(sizes.part_tokens, kChunkTokens / 2) / sizes.block_tokens, 1u) *
      sizes.block_tokens;
  sizes.part_tokens = sizes.part_tokens / sizes.step_tokens * sizes.step_tokens;
  sizes.tokens = sizes.part_tokens * kPointsPerContext * kContexts;
  return sizes;
}

void Count(std::span<const float> row, uint32_t token, Likelihood& to) {
  to.nats -= LogProbability(row, token);
  ++to.tokens;
}

// `tokens`: one more than is computed, to be foretold.
absl::StatusOr<Outcome> Stream(Transformer& transformer, const Way& way, const Sizes& sizes,
                               std::span<const uint32_t> tokens) {
  absl::StatusOr<std::unique_ptr<BlockPool>> pool = BlockPool::Create(
      transformer.block_memory(), kPoolBytes, transformer.geometry().BlockBytes());
  if (!pool.ok()) return pool.status();
  StreamingBlocks blocks(**pool, sizes.block_tokens, way.sink_blocks, way.window_blocks);
  const size_t vocab = transformer.config().vocab;
  std::vector<float> logits(sizes.step_tokens * vocab);
  Outcome outcome;
  for (uint32_t begin = 0; begin < sizes.tokens; begin += sizes.step_tokens) {
    blocks.Grow(sizes.step_tokens);
    const Chunk chunk{.tokens = tokens.subspan(begin, sizes.step_tokens),
                      .position = blocks.position(),
                      .blocks = blocks.table(),
                      .logits = Logits::kAll};
    if (absl::Status done = transformer.Forward({&chunk, 1}, logits); !done.ok()) return done;
    if (begin % sizes.part_tokens == 0) outcome.parts.emplace_back();
    for (uint32_t i = 0; i < sizes.step_tokens; ++i) {
      const std::span<const float> row = std::span(logits).subspan(i * vocab, vocab);
      Count(row, tokens[begin + i + 1], outcome.parts.back());
      Count(row, tokens[begin + i + 1],
            begin + i < sizes.context ? outcome.within : outcome.beyond);
    }
    outcome.blocks_max = std::max(outcome.blocks_max, (*pool)->used());
    if ((begin + sizes.step_tokens) % sizes.part_tokens == 0) {
      outcome.blocks.push_back((*pool)->used());
    }
  }
  outcome.given_back = blocks.given_back();
  const uint64_t taken = sizes.tokens / sizes.block_tokens;
  absl::Status holds = CheckCount((*pool)->used() + outcome.given_back, taken,
                                  absl::StrCat("sinks, ", way.name, ", blocks"));
  if (way.window_blocks > 0) {
    const uint64_t most =
        way.sink_blocks + way.window_blocks + sizes.step_tokens / sizes.block_tokens;
    holds.Update(CheckCount(outcome.blocks_max, most,
                            absl::StrCat("sinks, ", way.name, ", blocks at most")));
  }
  if (!holds.ok()) return holds;
  return outcome;
}

absl::StatusOr<Outcome> Run(const Bench& bench, const Way& way, const Sizes& sizes,
                            std::span<const uint32_t> tokens) {
  TransformerOptions options;
  options.block_tokens = sizes.block_tokens;
  options.rows_max = sizes.step_tokens;
  if (way.window_blocks > 0) {
    options.keys_before_rope = true;
    options.window = AttentionWindow{.sink_tokens = way.sink_blocks * sizes.block_tokens,
                                     .window_tokens = way.window_blocks * sizes.block_tokens};
  }
  absl::StatusOr<std::unique_ptr<Transformer>> transformer = bench.LoadModel(options);
  if (!transformer.ok()) return transformer.status();
  return Stream(**transformer, way, sizes, tokens);
}

}  // namespace

absl::Status RunSinks(Bench& bench) {
  absl::StatusOr<Transformer*> model = bench.LoadModel();
  if (!model.ok()) return model.status();
  const Sizes sizes = SizesOf(**model);
  // Half the context, so that positions, with the tokens of a pass, stay below it.
  const uint32_t half = std::max(sizes.context / 2 / sizes.block_tokens, 2u);
  const Way ways[] = {{"full"}, {"window", 0, half}, {"sinks + window", 1, half - 1}};
  const std::vector<uint32_t> tokens = bench.Tokens(0, sizes.tokens + 1);
  Table table{.name = "sinks",
              .heading = absl::StrCat(sizes.tokens, " tokens of ", bench.options().text_name, ", ",
                                      bench.options().model_name, ", context ", sizes.context,
                                      "; window ", half * sizes.block_tokens, " tokens, sinks ",
                                      sizes.block_tokens, " of them"),
              .titles = {"kept", "perplexity within context", "beyond it", "blocks at most",
                         "blocks given back", "K/V MiB at most"}};
  Plot perplexity{
      .name = "sinks_perplexity",
      .title = absl::StrCat("Perplexity far past the context, ", bench.options().model_name),
      .x_label = "position in the text (tokens)",
      .y_label = "perplexity (a token)"};
  Plot memory{.name = "sinks_memory",
              .title = absl::StrCat("K/V memory, ", bench.options().model_name),
              .x_label = "position in the text (tokens)",
              .y_label = "K/V memory (MiB)"};
  const double block_mib = static_cast<double>((*model)->geometry().BlockBytes()) / (1 << 20);
  for (const Way& way : ways) {
    absl::StatusOr<Outcome> outcome = Run(bench, way, sizes, tokens);
    if (!outcome.ok()) return outcome.status();
    table.rows.push_back({way.name, Fixed(outcome->within.Perplexity(), 3),
                          Fixed(outcome->beyond.Perplexity(), 3), absl::StrCat(outcome->blocks_max),
                          absl::StrCat(outcome->given_back),
                          Fixed(static_cast<double>(outcome->blocks_max) * block_mib, 2)});
    Curve nats{.title = way.name}, used{.title = way.name};
    for (size_t i = 0; i < outcome->parts.size(); ++i) {
      const double end = static_cast<double>(i + 1) * sizes.part_tokens;
      nats.points.emplace_back(end, outcome->parts[i].Perplexity());
      used.points.emplace_back(end, static_cast<double>(outcome->blocks[i]) * block_mib);
    }
    perplexity.curves.push_back(std::move(nats));
    memory.curves.push_back(std::move(used));
  }
  perplexity.y_log = true;
  absl::Status added = bench.report().Add(table);
  added.Update(bench.report().Add(perplexity));
  added.Update(bench.report().Add(memory));
  return added;
}

}  // namespace larder::worker::bench
