#include "client/worker/perplexity.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"

namespace larder::worker {

double Likelihood::Perplexity() const {
  return tokens == 0 ? 1 : std::exp(nats / static_cast<double>(tokens));
}

double LogProbability(std::span<const float> logits, uint32_t token) {
  const double greatest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - greatest);
  return logits[token] - greatest - std::log(sum);
}

absl::StatusOr<Likelihood> Score(Transformer& transformer, std::span<const uint32_t> tokens,
                                 uint32_t position, std::span<std::byte* const> blocks,
                                 uint32_t chunk_tokens) {
  if (chunk_tokens == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("chunk_tokens: 0; allowed: 1 to ", transformer.options().rows_max));
  }
  const size_t vocab = transformer.config().vocab;
  std::vector<float> logits;
  Likelihood likelihood;
  for (size_t at = position; at < tokens.size(); at += chunk_tokens) {
    const Chunk chunk{
        .tokens = tokens.subspan(at, std::min<size_t>(chunk_tokens, tokens.size() - at)),
        .position = static_cast<uint32_t>(at),
        .blocks = blocks,
        .logits = Logits::kAll};
    logits.resize(chunk.tokens.size() * vocab);
    const absl::Status computed = transformer.Forward({&chunk, 1}, logits);
    if (!computed.ok()) return computed;
    const size_t foretold = std::min(chunk.tokens.size(), tokens.size() - at - 1);
    for (size_t i = 0; i < foretold; ++i) {
      const std::span row(logits.data() + i * vocab, vocab);
      likelihood.nats -= LogProbability(row, tokens[at + i + 1]);
      ++likelihood.tokens;
    }
  }
  return likelihood;
}

}  // namespace larder::worker
