// What the next step computes: who joins, what the cache has for them, and whose turn it is.
#include <algorithm>
#include <utility>

#include "client/worker/engine_state.h"

namespace larder::worker {

// Sequences whose blocks went with a daemon's GPU memory keep their tokens, and nothing else.
void Engine::Impl::RestartLost() {
  for (const auto& sequence : sequences_) {
    if (!sequence->blocks.Lost()) continue;
    RequestStats& stats = sequence->job->result.stats;
    stats.given_up_blocks += (stats.reused_tokens() + block_tokens_ - 1) / block_tokens_;
    stats.reused_gpu_tokens = stats.reused_host_tokens = stats.reused_nvme_tokens = 0;
    stats.published_blocks += sequence->blocks.counts().published;
    stats.local_blocks += sequence->blocks.counts().local;
    sequence->blocks = KvBlocks(*pool_, block_tokens_);
    sequence->computed = 0;
  }
}

// Every decoding sequence's token; of what may be prefilled, the oldest first, and further
// requests only when those under way leave room in the step.
auto Engine::Impl::Plan() -> std::vector<Work> {
  std::vector<Work> work;
  for (const auto& sequence : sequences_) {
    if (sequence->stepping()) work.push_back({sequence.get(), 1});
  }
  uint32_t room = options_.chunk_tokens;
  for (size_t i = 0; room > 0; ++i) {
    while (i == sequences_.size() && AdmitNext()) {
    }
    if (i == sequences_.size()) break;
    if (sequences_[i]->stepping()) continue;
    const uint32_t count = std::min(room, sequences_[i]->pending());
    work.push_back({sequences_[i].get(), count});
    room -= count;
  }
  return work;
}

// The next request leaves the queue. False when there is none or it must wait for others to end.
bool Engine::Impl::AdmitNext() {
  if (waiting_.empty()) return false;
  Job& job = *waiting_.front();
  if (slots_taken_ + job.request.samples > options_.sequences_max ||
      blocks_promised_ + job.blocks_promised > pool_->blocks()) {
    return false;
  }
  slots_taken_ += job.request.samples;
  blocks_promised_ += job.blocks_promised;
  jobs_.push_back(std::move(waiting_.front()));
  waiting_.pop_front();
  job.result.stats.queued = Since(job.submitted);
  LookUp(job);
  return true;
}

void Engine::Impl::LookUp(Job& job) {
  RequestStats& stats = job.result.stats;
  if (!cache_.has_value()) return Begin(job, std::nullopt, {});
  const auto prompt_tokens = static_cast<uint32_t>(job.request.prompt.size());
  const SteadyClock::time_point start = SteadyClock::now();
  absl::StatusOr<Lease> lease = cache_->Lookup(
      job.request.prompt, {.prefill_tokens_per_second = rate_.TokensPerSecond(prompt_tokens)});
  stats.lookup = Since(start);
  if (!lease.ok()) return Begin(job, std::nullopt, {});
  stats.cut_blocks = lease->restore().cut_blocks() + CutByBreakEven(*lease, stats);
  const std::vector<BlockPlace> found(lease->places().begin(), lease->places().end());
  if (FirstUnreadable(*lease, lowest_tier_) == lease->end()) {
    return Begin(job, *std::move(lease), found);
  }
  auto restore = std::make_unique<Restore>(*std::move(lease), lowest_tier_, prompt_tokens, rate_,
                                           options_.cache->restore_patience, [this] {
                                             absl::MutexLock lock(&mutex_);
                                             ++restores_done_;
                                           });
  restoring_.push_back({&job, found, SteadyClock::now(), std::move(restore)});
}

// The daemon cut the match by the whole prompt's rate. Here it is known which part is to be
// restored, and that later tokens take longer to compute. Answers the blocks cut.
uint32_t Engine::Impl::CutByBreakEven(Lease& lease, RequestStats& stats) const {
  const uint32_t end = lease.end();
  const uint32_t readable = FirstUnreadable(lease, lowest_tier_);
  if (readable == end) return 0;
  stats.restore_estimate = absl::Microseconds(lease.restore().microseconds());
  stats.compute_estimate = rate_.Estimate(readable * block_tokens_, end * block_tokens_);
  if (stats.restore_estimate <= stats.compute_estimate) return 0;
  return lease.Truncate(readable).ok() ? end - readable : 0;
}

void Engine::Impl::CollectRestored() {
  for (size_t i = 0; i < restoring_.size();) {
    if (!restoring_[i].restore->done()) {
      ++i;
      continue;
    }
    Restoring done = std::move(restoring_[i]);
    restoring_.erase(restoring_.begin() + i);
    ++restores_collected_;
    done.job->result.stats.restore = Since(done.began);
    Begin(*done.job, done.restore->Take(), done.found);
  }
}

void Engine::Impl::AwaitRestore() {
  const auto news = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return restores_done_ > restores_collected_;
  };
  absl::MutexLock lock(&mutex_);
  mutex_.Await(absl::Condition(&news));
}

// The prompt's K/V begin with what the lease has; the rest is to be computed. A prompt that is
// cached to its end still needs its last token's logits: that token is computed again, into a
// copy of its block. Leasing one block less would compute block_tokens tokens instead of one.
void Engine::Impl::Begin(Job& job, std::optional<Lease> lease, std::span<const BlockPlace> found) {
  RequestStats& stats = job.result.stats;
  KvBlocks blocks = lease.has_value() ? KvBlocks(*pool_, *std::move(lease), options_.cache->publish)
                                      : KvBlocks(*pool_, block_tokens_);
  stats.given_up_blocks = found.size() - blocks.size();
  for (uint32_t i = 0; i < blocks.size(); ++i) {
    uint64_t& tokens = found[i].tier == v1::TIER_GPU    ? stats.reused_gpu_tokens
                       : found[i].tier == v1::TIER_HOST ? stats.reused_host_tokens
                                                        : stats.reused_nvme_tokens;
    const bool last = uint64_t{i + 1} * block_tokens_ == job.request.prompt.size();
    tokens += last ? block_tokens_ - 1 : block_tokens_;
    if (last) blocks.MakePrivate(i);
  }
  auto sequence =
      std::make_unique<Sequence>(Sequence{.job = &job,
                                          .tokens = job.request.prompt,
                                          .computed = static_cast<uint32_t>(stats.reused_tokens()),
                                          .blocks = std::move(blocks)});
  const auto younger = std::find_if(sequences_.begin(), sequences_.end(), [&](const auto& other) {
    return other->job->result.id > job.result.id;
  });
  sequences_.insert(younger, std::move(sequence));
}

}  // namespace larder::worker
