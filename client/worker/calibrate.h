// Calibrate: measures a PrefillRate.
//
// Thread safety: a free function.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "client/worker/block_pool.h"
#include "client/worker/prefill_rate.h"
#include "client/worker/transformer.h"

namespace larder::worker {

// Computes a chunk at the start of a prompt twice, the first time to warm up, and one as far
// behind as `context` allows, at most kFarMax tokens. One block of the pool plays all blocks: the
// time does not depend on what is in it.
absl::StatusOr<PrefillRate> Calibrate(Transformer& transformer, BlockPool& pool,
                                      uint32_t chunk_tokens, uint64_t context);

}  // namespace larder::worker
