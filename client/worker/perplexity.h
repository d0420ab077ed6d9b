// Perplexity: how well a model foretells a text. The measure of what lossy K/V costs.
//
// Thread safety: free functions; a Transformer is one caller's at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/statusor.h"
#include "client/worker/transformer.h"

namespace larder::worker {

struct Likelihood {
  double nats = 0;      // sum of -ln p(token | the tokens before it)
  uint64_t tokens = 0;  // how many were foretold

  // exp(nats / tokens); 1 for no tokens.
  double Perplexity() const;
};

// ln softmax(logits)[token], summed in f64.
double LogProbability(std::span<const float> logits, uint32_t token);

// Foretells tokens[position + 1 ...] of a sequence whose first `position` tokens have their K/V
// in `blocks` already, and writes the K/V of the others, `chunk_tokens` (1 to rows_max) at a
// time. `blocks` covers all tokens. INVALID_ARGUMENT as Transformer::Forward.
absl::StatusOr<Likelihood> Score(Transformer& transformer, std::span<const uint32_t> tokens,
                                 uint32_t position, std::span<std::byte* const> blocks,
                                 uint32_t chunk_tokens);

}  // namespace larder::worker
