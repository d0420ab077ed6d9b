// Request and Result: what an Engine is asked, and what it answers.
//
// Thread safety: values.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/time/time.h"
#include "client/worker/sampler.h"

namespace larder::worker {

struct Request {
  std::vector<uint32_t> prompt;   // 1 or more tokens, each below the vocabulary
  uint32_t new_tokens_max = 128;  // 1 or more; fewer where the context ends
  uint32_t samples = 1;           // continuations of the one prompt, at most sequences_max
  SamplingOptions sampling;
  std::optional<uint32_t> end_token;  // ends a sample, and is its last token
  // Called from Engine::Step as each token is chosen.
  std::function<void(uint32_t sample, uint32_t token)> on_token;
};

enum class Finish : uint8_t {
  kLength,   // new_tokens_max tokens are there
  kEnd,      // the end token came
  kContext,  // the model's context is full
};

constexpr std::string_view FinishName(Finish finish) {
  return finish == Finish::kLength ? "length" : finish == Finish::kEnd ? "end" : "context";
}

struct Completion {
  std::vector<uint32_t> tokens;  // without the prompt
  Finish finish = Finish::kLength;
};

// Where a request's K/V came from and went to, and how long it took.
//   prompt_tokens = reused_tokens + prompt tokens of computed_tokens
struct RequestStats {
  uint64_t prompt_tokens = 0;
  // Of the prompt, read from cached blocks, by where the lookup found them.
  uint64_t reused_gpu_tokens = 0;
  uint64_t reused_host_tokens = 0;
  uint64_t reused_nvme_tokens = 0;
  uint64_t computed_tokens = 0;   // K/V computed, of prompt and samples
  uint64_t new_tokens = 0;        // of all samples
  uint64_t published_blocks = 0;  // written in the cache's memory and put there
  uint64_t local_blocks = 0;      // taken from the worker's own pool
  bool durable = false;           // with CacheOptions::flush: what is cached survives a restart
  uint64_t cut_blocks = 0;        // cached, but computing them was estimated to be quicker
  uint64_t given_up_blocks = 0;   // promised by the lookup, but late or unreadable: computed

  // What the daemon expected of restoring the match's NVMe part, and the worker of computing its
  // tokens; zero where the daemon left nothing in the match that must be restored.
  absl::Duration restore_estimate;
  absl::Duration compute_estimate;

  absl::Duration queued;  // from Submit to the lookup
  absl::Duration lookup;
  absl::Duration restore;  // waiting for blocks from NVMe
  absl::Duration ttft;     // from Submit to the first token
  absl::Duration total;    // from Submit to the last

  uint64_t reused_tokens() const {
    return reused_gpu_tokens + reused_host_tokens + reused_nvme_tokens;
  }
};

struct Result {
  uint64_t id = 0;                      // as Submit answered
  std::vector<Completion> completions;  // one a sample
  RequestStats stats;
};

}  // namespace larder::worker
