#include "client/worker/engine.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/worker/calibrate.h"
#include "client/worker/engine_state.h"

namespace larder::worker {
namespace {

absl::Status OutOfRange(std::string_view field, uint64_t value, uint64_t min, uint64_t max) {
  return absl::InvalidArgumentError(absl::StrCat(absl::string_view(field.data(), field.size()),
                                                 ": ", value, "; allowed: ", min, " to ", max));
}

}  // namespace

Engine::Impl::Impl(Transformer& transformer, EngineOptions options, std::unique_ptr<BlockPool> pool)
    : options_(std::move(options)),
      transformer_(transformer),
      block_tokens_(transformer.options().block_tokens),
      context_(transformer.options().keys_before_rope ? std::numeric_limits<uint32_t>::max()
                                                      : transformer.config().max_positions),
      pool_(std::move(pool)),
      lowest_tier_(pool_->on_device() ? v1::TIER_GPU : v1::TIER_HOST) {}

absl::Status Engine::Impl::Start() {
  if (!options_.cache.has_value()) return absl::OkStatus();
  cache_.emplace(
      *options_.cache,
      SpecOf(ArchitectureName(transformer_.config().architecture), transformer_.geometry()),
      transformer_.block_memory().device(), options_.on_notice);
  // What the daemon will never accept is a mistake of ours, and no reason to go on without it; so
  // is a daemon whose memory this GPU cannot reach.
  const absl::Status& lost = cache_->lost();
  if (absl::IsInvalidArgument(lost)) return lost;
  if (pool_->on_device() && absl::IsFailedPrecondition(lost)) return lost;
  absl::StatusOr<PrefillRate> rate =
      Calibrate(transformer_, *pool_, options_.chunk_tokens, context_);
  if (!rate.ok()) return rate.status();
  rate_ = *rate;
  return absl::OkStatus();
}

// --- Requests ------------------------------------------------------------------------------

uint64_t Engine::Impl::TokensMax(const Request& request) const {
  // The last token needs no K/V, so it may be one past the context.
  return std::min<uint64_t>(request.prompt.size() + request.new_tokens_max, context_ + 1);
}

// Every sample's own blocks, the prompt's shared ones, and one for a token that is recomputed.
// Samples that may have to start again (RestartLost) no longer share.
uint64_t Engine::Impl::BlocksNeeded(const Request& request) const {
  const bool may_restart = options_.cache.has_value() && pool_->on_device();
  const uint64_t shared = may_restart ? 0 : request.prompt.size() / block_tokens_;
  const uint64_t all = (TokensMax(request) + block_tokens_ - 1) / block_tokens_;
  return shared + (all - shared) * request.samples + 1;
}

absl::Status Engine::Impl::Check(const Request& request) const {
  const uint32_t vocab = transformer_.config().vocab;
  if (request.prompt.empty() || request.prompt.size() > context_) {
    return OutOfRange("prompt (tokens)", request.prompt.size(), 1, context_);
  }
  const uint32_t greatest = *std::max_element(request.prompt.begin(), request.prompt.end());
  if (greatest >= vocab) return OutOfRange("prompt (token)", greatest, 0, vocab - 1);
  if (request.end_token.value_or(0) >= vocab) {
    return OutOfRange("end_token", *request.end_token, 0, vocab - 1);
  }
  if (request.new_tokens_max == 0) {
    return OutOfRange("new_tokens_max", 0, 1, std::numeric_limits<uint32_t>::max());
  }
  if (request.samples == 0 || request.samples > options_.sequences_max) {
    return OutOfRange("samples", request.samples, 1, options_.sequences_max);
  }
  if (absl::Status sampling = Validate(request.sampling); !sampling.ok()) return sampling;
  if (BlocksNeeded(request) <= pool_->blocks()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("prompt and new_tokens_max: up to ", BlocksNeeded(request), " blocks of ",
                   pool_->block_bytes(), " bytes; pool_bytes allows ", pool_->blocks()));
}

absl::StatusOr<uint64_t> Engine::Impl::Submit(Request request) {
  if (absl::Status ok = Check(request); !ok.ok()) return ok;
  auto job = std::make_unique<Job>();
  job->submitted = SteadyClock::now();
  job->blocks_promised = BlocksNeeded(request);
  job->samples_left = request.samples;
  job->result.id = next_id_++;
  job->result.completions.resize(request.samples);
  job->result.stats.prompt_tokens = request.prompt.size();
  job->result.stats.durable =
      options_.cache.has_value() && options_.cache->flush != absl::ZeroDuration();
  job->request = std::move(request);
  waiting_.push_back(std::move(job));
  return waiting_.back()->result.id;
}

// --- Engine --------------------------------------------------------------------------------

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(Transformer& transformer,
                                                       EngineOptions options) {
  const uint32_t rows = transformer.options().rows_max;
  if (options.sequences_max == 0 || options.sequences_max >= rows) {
    return OutOfRange("sequences_max", options.sequences_max, 1, rows - 1);
  }
  if (options.chunk_tokens == 0 || options.chunk_tokens > rows - options.sequences_max) {
    return OutOfRange("chunk_tokens", options.chunk_tokens, 1, rows - options.sequences_max);
  }
  absl::StatusOr<std::unique_ptr<BlockPool>> pool = BlockPool::Create(
      transformer.block_memory(), options.pool_bytes, transformer.geometry().BlockBytes());
  if (!pool.ok()) return pool.status();
  auto impl = std::make_unique<Impl>(transformer, std::move(options), *std::move(pool));
  if (absl::Status started = impl->Start(); !started.ok()) return started;
  return std::unique_ptr<Engine>(new Engine(std::move(impl)));
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;

absl::StatusOr<uint64_t> Engine::Submit(Request request) {
  return impl_->Submit(std::move(request));
}

bool Engine::idle() const { return impl_->idle(); }
absl::Status Engine::Step() { return impl_->Step(); }

absl::Status Engine::Run() {
  while (!idle()) {
    if (absl::Status stepped = Step(); !stepped.ok()) return stepped;
  }
  return absl::OkStatus();
}

std::vector<Result> Engine::TakeResults() { return impl_->TakeResults(); }
EngineStats Engine::stats() const { return impl_->stats(); }

absl::Duration Engine::PrefillEstimate(uint32_t begin, uint32_t end) const {
  return impl_->rate().Estimate(begin, end);
}

}  // namespace larder::worker
