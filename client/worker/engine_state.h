// Engine::Impl: its state and what its parts do; they are spread over engine.cc (requests),
// engine_plan.cc (what the next step computes) and engine_compute.cc (computing it).
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "client/worker/block_pool.h"
#include "client/worker/cache_session.h"
#include "client/worker/engine.h"
#include "client/worker/kv_blocks.h"
#include "client/worker/prefill_rate.h"
#include "client/worker/restore.h"

namespace larder::worker {

using SteadyClock = std::chrono::steady_clock;

inline absl::Duration Since(SteadyClock::time_point start) {
  return absl::FromChrono(SteadyClock::now() - start);
}

class Engine::Impl {
 public:
  Impl(Transformer& transformer, EngineOptions options, std::unique_ptr<BlockPool> pool);

  absl::Status Start();
  absl::StatusOr<uint64_t> Submit(Request request);
  bool idle() const { return waiting_.empty() && jobs_.empty(); }
  absl::Status Step();
  std::vector<Result> TakeResults() { return std::exchange(ended_, {}); }
  EngineStats stats() const { return stats_; }
  const PrefillRate& rate() const { return rate_; }

 private:
  // One request, until all its samples have ended.
  struct Job {
    Request request;
    Result result;
    uint64_t blocks_promised = 0;  // of the pool, should the cache give none
    uint32_t samples_left = 0;
    SteadyClock::time_point submitted;
  };

  // One sample; before the prompt is computed, all of them.
  struct Sequence {
    Job* job;
    uint32_t sample = 0;
    std::vector<uint32_t> tokens;  // the prompt and what was chosen
    uint32_t computed = 0;         // of these, how many have their K/V
    KvBlocks blocks;
    bool ended = false;

    uint32_t pending() const { return static_cast<uint32_t>(tokens.size()) - computed; }
    bool decoding() const { return tokens.size() > job->request.prompt.size(); }
    // Only its newest token is to be computed. A sequence that was started again is prefilled
    // first, the tokens chosen so far like a prompt's.
    bool stepping() const { return decoding() && pending() == 1; }
  };

  struct Restoring {
    Job* job;
    std::vector<BlockPlace> found;  // where the lookup found each block
    SteadyClock::time_point began;
    std::unique_ptr<Restore> restore;
  };

  // What a step computes of a sequence: its next `count` tokens.
  struct Work {
    Sequence* sequence;
    uint32_t count;
  };

  absl::Status Check(const Request& request) const;
  uint64_t BlocksNeeded(const Request& request) const;
  // The most tokens a sample can come to, its prompt included.
  uint64_t TokensMax(const Request& request) const;

  // Planning: what the next step computes.
  void RestartLost();
  std::vector<Work> Plan();
  bool AdmitNext();
  void LookUp(Job& job);
  uint32_t CutByBreakEven(Lease& lease, RequestStats& stats) const;
  void CollectRestored();
  void AwaitRestore();
  void Begin(Job& job, std::optional<Lease> lease, std::span<const BlockPlace> found);

  // Computing it.
  absl::Status Compute(std::span<const Work> work);
  void Advance(const Work& work, std::span<const float> logits);
  void Fork(Sequence& sequence, std::span<const float> logits);
  void Choose(Sequence& sequence, std::span<const float> logits);
  void End(Sequence& sequence, Finish finish);
  void EraseEnded();

  // Constant.
  const EngineOptions options_;
  Transformer& transformer_;
  const uint32_t block_tokens_;
  const uint64_t context_;  // tokens whose K/V a sequence may have
  const std::unique_ptr<BlockPool> pool_;
  const v1::Tier lowest_tier_;  // in which the forward pass reads blocks in place

  // The caller's thread's.
  std::optional<CacheSession> cache_;
  PrefillRate rate_;
  EngineStats stats_;
  uint64_t next_id_ = 1;
  uint64_t blocks_promised_ = 0;
  uint32_t slots_taken_ = 0;  // samples of the jobs under way

  uint64_t restores_collected_ = 0;

  // Told by the restores' threads, which end before these do.
  absl::Mutex mutex_;
  uint64_t restores_done_ ABSL_GUARDED_BY(mutex_) = 0;

  // Requests, from waiting to ended. What each holds goes before the pool and the session.
  std::deque<std::unique_ptr<Job>> waiting_;
  std::vector<std::unique_ptr<Job>> jobs_;  // under way
  std::vector<Restoring> restoring_;
  std::vector<std::unique_ptr<Sequence>> sequences_;  // oldest request first
  std::vector<std::unique_ptr<Sequence>> forked_;     // in this step
  std::vector<Result> ended_;
  std::vector<float> logits_;
};

}  // namespace larder::worker
