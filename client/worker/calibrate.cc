#include "client/worker/calibrate.h"

#include <algorithm>
#include <chrono>
#include <vector>

namespace larder::worker {
namespace {

using SteadyClock = std::chrono::steady_clock;

// Far enough for attention to be seen next to the matrices.
constexpr uint64_t kFarMax = 4'096;

}  // namespace

absl::StatusOr<PrefillRate> Calibrate(Transformer& transformer, BlockPool& pool,
                                      uint32_t chunk_tokens, uint64_t context) {
  const auto tokens = static_cast<uint32_t>(std::clamp<uint64_t>(context / 2, 1, chunk_tokens));
  const auto far = static_cast<uint32_t>(std::min(context - tokens, kFarMax));
  const uint32_t block_tokens = transformer.options().block_tokens;
  const BlockRef block = pool.Take();
  const std::vector<std::byte*> table((far + tokens + block_tokens - 1) / block_tokens,
                                      block.get());
  const std::vector<uint32_t> prompt(tokens, 0);
  PrefillRate::Measured measured;
  measured.tokens = tokens;
  measured.far_begin = far;
  for (absl::Duration* took : {&measured.at_start, &measured.at_start, &measured.far}) {
    const Chunk chunk{.tokens = prompt,
                      .position = took == &measured.far ? far : 0,
                      .blocks = table,
                      .logits = Logits::kNone};
    const SteadyClock::time_point start = SteadyClock::now();
    if (absl::Status computed = transformer.Forward({&chunk, 1}, {}); !computed.ok()) {
      return computed;
    }
    *took = absl::FromChrono(SteadyClock::now() - start);
  }
  return PrefillRate(measured);
}

}  // namespace larder::worker
