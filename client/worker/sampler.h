// Sampler: the next token from a row of logits.
//
// Thread safety: free functions.
//
// Invariants:
//   1. A choice depends on nothing but the logits, the options, the sample's index and the
//      position: how requests are batched or resumed changes no sample.
//   2. Equal logits: the lowest token id is preferred.
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"

namespace larder::worker {

// A token is drawn from softmax(logits / temperature), restricted first to the `top_k` most
// likely tokens, then to the fewest of these whose probability reaches `top_p`.
struct SamplingOptions {
  double temperature = 0;  // 0: greedy, the rest is then without effect; at most 100
  uint32_t top_k = 0;      // 0: all
  double top_p = 1;        // above 0, at most 1
  uint64_t seed = 0;
};

// INVALID_ARGUMENT naming the field, its value and the bound.
absl::Status Validate(const SamplingOptions& options);

// The token with the greatest logit. NaN counts as the least.
uint32_t Greedy(std::span<const float> logits);

// `logits`: one row, not empty. `sample`: which of several samples of one prompt this is.
// `position`: where in its sequence the chosen token will stand. Valid options.
uint32_t Sample(std::span<const float> logits, const SamplingOptions& options, uint64_t sample,
                uint64_t position);

}  // namespace larder::worker
