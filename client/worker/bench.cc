#include "client/worker/bench.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/worker/cache_session.h"
#include "client/worker/model_config.h"
#include "client/worker/tokenizer.h"
#include "client/worker/worker_flags.h"
#include "storage/check.h"

namespace larder::worker::bench {
namespace {

constexpr uint64_t kTokensSeed = 20'261'124;
constexpr uint64_t kDocumentStride = 4'999;  // tokens from one document to the next
// What a restore takes is measured also where a request would no longer wait for it.
constexpr double kPatience = 10;
constexpr uint64_t kQuestionsBegin = 90'001;  // where in the text questions are taken

absl::string_view Abseil(std::string_view s) { return {s.data(), s.size()}; }

}  // namespace

Bench::Bench(const ModelFlags& model, BenchOptions options, Report report)
    : model_(model), options_(std::move(options)), report_(std::move(report)) {}

absl::StatusOr<Transformer*> Bench::LoadModel() {
  if (transformer_ == nullptr) {
    absl::StatusOr<std::unique_ptr<Transformer>> loaded =
        model_.Load(std::max(options_.chunk_tokens, kChunkTokens) + kSequencesMax);
    if (!loaded.ok()) return loaded.status();
    transformer_ = *std::move(loaded);
  }
  return transformer_.get();
}

absl::StatusOr<std::unique_ptr<Transformer>> Bench::LoadModel(
    const TransformerOptions& options) const {
  return model_.Load(options);
}

std::vector<uint32_t> Bench::Tokens(uint64_t begin, uint64_t count) const {
  const uint32_t vocab = transformer_->config().vocab;
  std::vector<uint32_t> tokens;
  if (Tokenizer(vocab).byte_level() && !options_.text.empty()) {
    for (uint64_t i = begin; i < begin + count; ++i) {
      tokens.push_back(static_cast<uint8_t>(options_.text[i % options_.text.size()]));
    }
    return tokens;
  }
  std::mt19937_64 random(kTokensSeed);
  random.discard(begin);
  for (uint64_t i = 0; i < count; ++i) tokens.push_back(static_cast<uint32_t>(random() % vocab));
  return tokens;
}

absl::StatusOr<std::unique_ptr<Daemon>> Bench::StartDaemon(uint64_t tokens, bool gpu) const {
  if (options_.larderd.empty()) {
    return absl::InvalidArgumentError(
        "--larderd: not given; this experiment starts and kills a larderd of its own");
  }
  const KvGeometry& geometry = transformer_->geometry();
  const uint64_t blocks = (tokens + geometry.block_tokens - 1) / geometry.block_tokens;
  const std::optional<DeviceUuid> device = transformer_->block_memory().device();
  return Daemon::Start({.program = options_.larderd,
                        .directory = options_.directory,
                        .gpu = device.has_value() ? absl::StrCat("cuda:", DeviceName(*device))
                               : gpu              ? "emulated"
                                                  : "",
                        .bytes = 2 * blocks * geometry.BlockBytes()});
}

absl::StatusOr<std::unique_ptr<Engine>> Bench::NewEngine(const Daemon* daemon, bool publish) {
  EngineOptions options;
  options.chunk_tokens = options_.chunk_tokens;
  options.sequences_max = kSequencesMax;
  // A GPU's is taken at once, beside weights and the daemon's tier: one of the longest prompts.
  const uint64_t tokens = options_.prefix_tokens + kQuestionTokens + kAnswerTokens;
  const uint64_t blocks = tokens / transformer_->options().block_tokens + 2;
  const uint64_t needed = blocks * transformer_->geometry().BlockBytes();
  options.pool_bytes = on_gpu() ? needed : std::max(needed, kPoolBytes);
  if (daemon != nullptr) {
    CacheOptions& cache = options.cache.emplace();
    cache.address = daemon->address();
    cache.publish = publish;
    cache.restore_patience = kPatience;
    cache.worker = "larder-worker bench";
  }
  return Engine::Create(*transformer_, std::move(options));
}

v1::ModelSpec Bench::spec() const {
  return SpecOf(ArchitectureName(transformer_->config().architecture), transformer_->geometry());
}

absl::StatusOr<Result> Generate(Engine& engine, std::vector<uint32_t> prompt, uint32_t new_tokens) {
  Request request;
  request.prompt = std::move(prompt);
  request.new_tokens_max = new_tokens;
  if (absl::StatusOr<uint64_t> id = engine.Submit(std::move(request)); !id.ok()) {
    return id.status();
  }
  if (absl::Status ran = engine.Run(); !ran.ok()) return ran;
  std::vector<Result> results = engine.TakeResults();
  LARDER_CHECK(results.size() == 1);
  return std::move(results.front());
}

uint32_t WholePrefix(const Bench& bench, uint32_t prefix_tokens) {
  const uint32_t block_tokens = bench.transformer().options().block_tokens;
  const uint32_t pass = std::lcm(block_tokens, bench.options().chunk_tokens);
  const uint32_t unit = bench.on_gpu() && prefix_tokens >= pass ? pass : block_tokens;
  return prefix_tokens / unit * unit;
}

absl::StatusOr<uint32_t> PrefixTokensMax(const Bench& bench) {
  const uint32_t block_tokens = bench.transformer().options().block_tokens;
  const uint32_t context = bench.transformer().config().max_positions;
  const uint32_t after = kQuestionTokens + kAnswerTokens;
  const uint32_t tokens =
      context > after ? std::min(context - after, bench.options().prefix_tokens) : 0;
  if (tokens >= block_tokens) return WholePrefix(bench, tokens);
  return absl::FailedPreconditionError(absl::StrCat("max_position_embeddings: ", context,
                                                    "; this experiment needs at least ",
                                                    after + block_tokens));
}

std::vector<uint32_t> Prompt(const Bench& bench, uint64_t document, uint32_t prefix_tokens,
                             uint64_t question) {
  std::vector<uint32_t> prompt = bench.Tokens(document * kDocumentStride, prefix_tokens);
  const std::vector<uint32_t> asked =
      bench.Tokens(kQuestionsBegin + question * kQuestionTokens, kQuestionTokens);
  prompt.insert(prompt.end(), asked.begin(), asked.end());
  return prompt;
}

absl::Status CheckSame(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b,
                       std::string_view what) {
  if (a == b) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(Abseil(what), ": the tokens are not the same"));
}

absl::Status CheckCount(uint64_t counted, uint64_t expected, std::string_view what) {
  if (counted == expected) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat(Abseil(what), ": counted ", counted, ", expected ", expected));
}

}  // namespace larder::worker::bench
