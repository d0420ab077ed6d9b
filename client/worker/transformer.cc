#include "client/worker/transformer.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "client/worker/forward_pass.h"
#include "client/worker/forward_pass_cpu.h"
#include "client/worker/forward_pass_cuda.h"
#include "client/worker/matmul.h"

namespace larder::worker {
namespace {

constexpr uint32_t kBlockTokensMax = 1'024;
constexpr uint32_t kRowsMax = 1 << 16;
constexpr uint32_t kThreadsMax = 1'024;
constexpr uintptr_t kBlockAlign = 64;  // bytes

absl::Status OutOfBounds(absl::string_view field, uint64_t value, uint64_t min, uint64_t max) {
  if (value >= min && value <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", value, "; allowed: ", min, " to ", max));
}

absl::Status ValidateOptions(const TransformerOptions& options) {
  absl::Status status = OutOfBounds("block_tokens", options.block_tokens, 1, kBlockTokensMax);
  status.Update(OutOfBounds("rows_max", options.rows_max, 1, kRowsMax));
  status.Update(OutOfBounds("threads", options.threads, 0, kThreadsMax));
  if (options.window) {
    status.Update(
        OutOfBounds("window.window_tokens", options.window->window_tokens, 1, kPositionsMax));
    status.Update(OutOfBounds("window.sink_tokens", options.window->sink_tokens, 0, kPositionsMax));
  }
  return status;
}

absl::StatusOr<Arithmetic> ChooseArithmetic(const TransformerOptions& options) {
  if (options.device == Device::kCuda) {
    if (options.arithmetic != Arithmetic::kF32) return Arithmetic::kBf16;
    return absl::UnimplementedError("arithmetic: f32; allowed on cuda: 16 bits");
  }
  if (options.arithmetic == Arithmetic::kAuto) {
    return HasBf16Products() ? Arithmetic::kBf16 : Arithmetic::kF32;
  }
  if (options.arithmetic == Arithmetic::kBf16 && !HasBf16Products()) {
    return absl::UnimplementedError("arithmetic: bf16; allowed on this processor: f32");
  }
  return options.arithmetic;
}

// What K/V depend on besides geometry.
std::string FullRevision(const std::string& weights, const ForwardPass& pass,
                         const TransformerOptions& options) {
  std::string revision = absl::StrCat(weights, " ", pass.arithmetic());
  if (options.window) {
    absl::StrAppend(&revision, " sinks ", options.window->sink_tokens, " window ",
                    options.window->window_tokens);
  }
  if (options.keys_before_rope) absl::StrAppend(&revision, " keys before rope");
  return revision;
}

absl::Status CheckChunk(const Chunk& chunk, const std::string& path, const ModelConfig& config,
                        const TransformerOptions& options) {
  absl::Status status =
      OutOfBounds(absl::StrCat(path, "tokens"), chunk.tokens.size(), 1, options.rows_max);
  if (!status.ok()) return status;
  status = OutOfBounds(absl::StrCat(path, "position"), chunk.position, 0,
                       kPositionsMax - chunk.tokens.size());
  if (!status.ok()) return status;
  for (const uint32_t token : chunk.tokens) {
    if (token >= config.vocab) {
      return OutOfBounds(absl::StrCat(path, "tokens"), token, 0, config.vocab - 1);
    }
  }
  const uint64_t blocks =
      (chunk.position + chunk.tokens.size() + options.block_tokens - 1) / options.block_tokens;
  if (chunk.blocks.size() < blocks) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, "blocks: ", chunk.blocks.size(), "; allowed: at least ", blocks));
  }
  for (uint64_t i = 0; i < blocks; ++i) {
    if (chunk.blocks[i] == nullptr ||
        reinterpret_cast<uintptr_t>(chunk.blocks[i]) % kBlockAlign != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, "blocks[", i, "]: ", reinterpret_cast<uintptr_t>(chunk.blocks[i]),
                       "; allowed: an address aligned to ", kBlockAlign, " bytes"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

uint64_t LogitRows(std::span<const Chunk> chunks) {
  uint64_t rows = 0;
  for (const Chunk& chunk : chunks) {
    if (chunk.logits == Logits::kAll) rows += chunk.tokens.size();
    if (chunk.logits == Logits::kLast) rows += 1;
  }
  return rows;
}

class Transformer::Impl {
 public:
  Impl(const ModelConfig& config, const TransformerOptions& options, KvGeometry geometry,
       std::unique_ptr<ForwardPass> pass)
      : config(config), options(options), geometry(std::move(geometry)), pass(std::move(pass)) {}

  const ModelConfig config;
  const TransformerOptions options;
  const KvGeometry geometry;
  const std::unique_ptr<ForwardPass> pass;
};

Transformer::Transformer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Transformer::~Transformer() = default;

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Create(
    Weights weights, const TransformerOptions& requested) {
  const absl::Status valid = ValidateOptions(requested);
  if (!valid.ok()) return valid;
  const absl::StatusOr<Arithmetic> arithmetic = ChooseArithmetic(requested);
  if (!arithmetic.ok()) return arithmetic.status();
  TransformerOptions options = requested;
  options.arithmetic = *arithmetic;
  const ModelConfig config = weights.config();
  const std::string revision = weights.revision();
  absl::StatusOr<std::unique_ptr<ForwardPass>> pass =
      options.device == Device::kCuda ? CreateCudaForwardPass(std::move(weights), options)
                                      : CpuForwardPass::Create(std::move(weights), options);
  if (!pass.ok()) return pass.status();
  options.threads = (*pass)->threads();
  KvGeometry geometry{.layers = config.layers,
                      .kv_heads = config.kv_heads,
                      .head_dim = config.head_dim,
                      .dtype = options.kv_dtype,
                      .block_tokens = options.block_tokens,
                      .weights_revision = FullRevision(revision, **pass, options)};
  return std::unique_ptr<Transformer>(new Transformer(
      std::make_unique<Impl>(config, options, std::move(geometry), *std::move(pass))));
}

const ModelConfig& Transformer::config() const { return impl_->config; }
const TransformerOptions& Transformer::options() const { return impl_->options; }
const KvGeometry& Transformer::geometry() const { return impl_->geometry; }
BlockMemory& Transformer::block_memory() { return impl_->pass->block_memory(); }

absl::Status Transformer::Forward(std::span<const Chunk> chunks, std::span<float> logits) {
  uint64_t rows = 0;
  for (size_t i = 0; i < chunks.size(); ++i) {
    const absl::Status checked =
        CheckChunk(chunks[i], absl::StrCat("chunks[", i, "]."), config(), options());
    if (!checked.ok()) return checked;
    rows += chunks[i].tokens.size();
  }
  const absl::Status few_enough = OutOfBounds("chunks: rows", rows, 1, options().rows_max);
  if (!few_enough.ok()) return few_enough;
  const uint64_t floats = LogitRows(chunks) * config().vocab;
  if (logits.size() != floats) {
    return absl::InvalidArgumentError(
        absl::StrCat("logits: ", logits.size(), " floats; allowed: exactly ", floats));
  }
  return impl_->pass->Run(chunks, logits);
}

}  // namespace larder::worker
