// A step: one forward pass, and what follows from its logits.
#include <algorithm>
#include <utility>

#include "client/worker/engine_state.h"

namespace larder::worker {

absl::Status Engine::Impl::Step() {
  if (cache_.has_value()) cache_->Tend();
  RestartLost();
  CollectRestored();
  const std::vector<Work> work = Plan();
  if (!work.empty()) return Compute(work);
  if (!restoring_.empty()) AwaitRestore();
  return absl::OkStatus();
}

absl::Status Engine::Impl::Compute(std::span<const Work> work) {
  std::vector<Chunk> chunks;
  for (const auto& [sequence, count] : work) {
    const uint32_t begin = sequence->computed;
    sequence->blocks.Grow(begin + count, sequence->tokens.size());
    chunks.push_back({.tokens = std::span(sequence->tokens).subspan(begin, count),
                      .position = begin,
                      .blocks = sequence->blocks.table(),
                      .logits = count == sequence->pending() ? Logits::kLast : Logits::kNone});
  }
  const size_t vocab = transformer_.config().vocab;
  logits_.resize(LogitRows(chunks) * vocab);
  const SteadyClock::time_point start = SteadyClock::now();
  if (absl::Status computed = transformer_.Forward(chunks, logits_); !computed.ok()) {
    return computed;
  }
  const absl::Duration took = Since(start);
  ++stats_.steps;
  stats_.computing += took;
  stats_.sequences_peak = std::max<uint64_t>(stats_.sequences_peak, work.size());
  // Smaller chunks are slower and mixed ones are shared: neither says how fast prefilling is.
  if (work.size() == 1 && work[0].count == options_.chunk_tokens) {
    rate_.Observe(chunks[0].position, chunks[0].position + work[0].count, took);
  }
  std::span<const float> rows = logits_;
  for (size_t i = 0; i < work.size(); ++i) {
    const size_t used = chunks[i].logits == Logits::kLast ? vocab : 0;
    // What was lost while it was read may have been read wrong.
    if (!work[i].sequence->blocks.Lost()) Advance(work[i], rows.first(used));
    rows = rows.subspan(used);
  }
  for (auto& sequence : forked_) sequences_.push_back(std::move(sequence));
  forked_.clear();
  EraseEnded();
  return absl::OkStatus();
}

// The K/V of the work are there; `logits` are those of the sequence's last token, if that is.
void Engine::Impl::Advance(const Work& work, std::span<const float> logits) {
  Sequence& sequence = *work.sequence;
  (sequence.decoding() ? stats_.decode_tokens : stats_.prompt_tokens) += work.count;
  sequence.job->result.stats.computed_tokens += work.count;
  sequence.computed += work.count;
  sequence.blocks.Publish(std::span(sequence.tokens).first(sequence.computed));
  if (logits.empty()) return;
  if (!sequence.decoding()) Fork(sequence, logits);
  Choose(sequence, logits);
}

// The prompt is computed: a sequence for every further sample, which shares its blocks.
void Engine::Impl::Fork(Sequence& sequence, std::span<const float> logits) {
  sequence.job->result.stats.ttft = Since(sequence.job->submitted);
  for (uint32_t sample = 1; sample < sequence.job->request.samples; ++sample) {
    forked_.push_back(
        std::make_unique<Sequence>(Sequence{.job = sequence.job,
                                            .sample = sample,
                                            .tokens = sequence.tokens,
                                            .computed = sequence.computed,
                                            .blocks = sequence.blocks.Fork(sequence.computed)}));
    Choose(*forked_.back(), logits);
  }
}

void Engine::Impl::Choose(Sequence& sequence, std::span<const float> logits) {
  const Request& request = sequence.job->request;
  const uint32_t token = Sample(logits, request.sampling, sequence.sample, sequence.tokens.size());
  sequence.tokens.push_back(token);
  ++sequence.job->result.stats.new_tokens;
  if (request.on_token) request.on_token(sequence.sample, token);
  if (token == request.end_token) {
    End(sequence, Finish::kEnd);
  } else if (sequence.tokens.size() == request.prompt.size() + request.new_tokens_max) {
    End(sequence, Finish::kLength);
  } else if (sequence.tokens.size() > context_) {
    End(sequence, Finish::kContext);
  }
}

void Engine::Impl::End(Sequence& sequence, Finish finish) {
  Job& job = *sequence.job;
  sequence.ended = true;
  Completion& completion = job.result.completions[sequence.sample];
  completion.tokens.assign(sequence.tokens.begin() + job.request.prompt.size(),
                           sequence.tokens.end());
  completion.finish = finish;
  RequestStats& stats = job.result.stats;
  stats.published_blocks += sequence.blocks.counts().published;
  stats.local_blocks += sequence.blocks.counts().local;
  if (stats.durable) {
    stats.durable = sequence.blocks.Flush(options_.cache->flush);
  }
  --job.samples_left;
  --slots_taken_;
}

// Lets sequences go that have ended, and then requests without any.
void Engine::Impl::EraseEnded() {
  std::erase_if(sequences_, [](const auto& sequence) { return sequence->ended; });
  for (std::unique_ptr<Job>& job : jobs_) {
    if (job->samples_left > 0) continue;
    job->result.stats.total = Since(job->submitted);
    blocks_promised_ -= job->blocks_promised;
    ended_.push_back(std::move(job->result));
    job.reset();
  }
  std::erase(jobs_, nullptr);
}

}  // namespace larder::worker
