// Bench: what every experiment works with: a model, prompts, a larderd of its own, a report.
//
// An experiment measures, adds to the report, and fails only when something could not be measured
// or when what must hold does not: other tokens with the cache than without, a count that is not
// the one it claims. A slow machine fails nothing.
//
// Thread safety: one thread at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/worker/bench_daemon.h"
#include "client/worker/bench_report.h"
#include "client/worker/engine.h"
#include "client/worker/transformer.h"
#include "larder/v1/types.pb.h"

namespace larder::worker {

class ModelFlags;

namespace bench {

inline constexpr uint32_t kChunkTokens =
    256;  // prompt tokens of one pass, where no engine cuts them
inline constexpr uint32_t kSequencesMax = 8;
inline constexpr uint64_t kPoolBytes = uint64_t{4} << 30;  // taken as it is used

struct BenchOptions {
  std::string larderd;     // the program; empty: experiments that need one say so
  std::string directory;   // for its temporary files
  std::string text;        // prompts of byte-level models; empty: tokens are drawn
  std::string text_name;   // where it comes from
  std::string model_name;  // for headings and rows
  bool random_weights = false;
  uint32_t chunk_tokens = kChunkTokens;  // of engines
  uint32_t prefix_tokens = 4'000;        // the most of a long prompt's prefix
};

class Bench {
 public:
  // `model` outlives the bench.
  Bench(const ModelFlags& model, BenchOptions options, Report report);

  // The model with everything as the flags have it; loaded once.
  absl::StatusOr<Transformer*> LoadModel();
  // The same weights, computed in another way.
  absl::StatusOr<std::unique_ptr<Transformer>> LoadModel(const TransformerOptions& options) const;

  // `count` tokens, the same whenever they are asked for: of the text from `begin` on, around its
  // end, or drawn from the vocabulary.
  std::vector<uint32_t> Tokens(uint64_t begin, uint64_t count) const;
  // A larderd whose tiers each hold the K/V of so many tokens twice. Its GPU tier is in the memory
  // of the GPU that computes; where the CPU does, `gpu` asks for an emulated one.
  absl::StatusOr<std::unique_ptr<Daemon>> StartDaemon(uint64_t tokens, bool gpu) const;
  // An engine over the model; with a daemon, one that puts what it computes there or only reads.
  absl::StatusOr<std::unique_ptr<Engine>> NewEngine(const Daemon* daemon, bool publish);
  // Whether the model is computed on a GPU.
  bool on_gpu() const { return transformer_->options().device == Device::kCuda; }
  v1::ModelSpec spec() const;
  const Transformer& transformer() const { return *transformer_; }  // once it is loaded

  const BenchOptions& options() const { return options_; }
  Report& report() { return report_; }

 private:
  const ModelFlags& model_;
  const BenchOptions options_;
  Report report_;
  std::unique_ptr<Transformer> transformer_;
};

// One greedy request, alone.
absl::StatusOr<Result> Generate(Engine& engine, std::vector<uint32_t> prompt, uint32_t new_tokens);

// A long prompt, as several experiments have it: whole blocks of a prefix that is or is not cached,
// and a question after it.
inline constexpr uint32_t kQuestionTokens = 56;
inline constexpr uint32_t kAnswerTokens = 16;
// What of `prefix_tokens` is of whole blocks. On a GPU whole passes as well, where it is one at
// least: then a question is computed in a pass of the same rows, cached or not, and gets the same
// bits (forward_pass_cuda.h, invariant 1).
uint32_t WholePrefix(const Bench& bench, uint32_t prefix_tokens);
// At most BenchOptions::prefix_tokens, and what the context holds before question and answer.
// FAILED_PRECONDITION where that is not even a block.
absl::StatusOr<uint32_t> PrefixTokensMax(const Bench& bench);
// The first `prefix_tokens` of document `document`, and question `question`.
std::vector<uint32_t> Prompt(const Bench& bench, uint64_t document, uint32_t prefix_tokens,
                             uint64_t question);

// INTERNAL unless `a` and `b` are the same; `what` says whose they are.
absl::Status CheckSame(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b,
                       std::string_view what);
// INTERNAL unless they are equal.
absl::Status CheckCount(uint64_t counted, uint64_t expected, std::string_view what);

absl::Status RunWork(Bench& bench);         // K/V computations, with K/V kept and without
absl::Status RunPrefix(Bench& bench);       // two requests share a document
absl::Status RunRestore(Bench& bench);      // a prefix from HOST, and from NVMe after a SIGKILL
absl::Status RunPaging(Bench& bench);       // memory: paging against reserving the longest
absl::Status RunHeads(Bench& bench);        // MHA, GQA, MQA, MLA
absl::Status RunPrefetch(Bench& bench);     // restoring before the request arrives
absl::Status RunSpeculation(Bench& bench);  // an n-gram draft, verified in one pass
absl::Status RunSinks(Bench& bench);        // StreamingLLM

}  // namespace bench
}  // namespace larder::worker
