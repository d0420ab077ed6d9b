// Shares a prefill out over a GPU: which thread block has which queries.
//
//   pairs     (token, q head of a kv head's group) of one chunk, a token's heads together: what
//             shares a kv head's keys. One tile is tile_rows of them, one thread block a kv head
//   tiles     of all chunks, those with the most keys first
//
// A plan depends on lengths only, so one plan serves all layers of a pass.
//
// Thread safety: pure functions of the host; no CUDA.
//
// 1. Each pair of each chunk is in exactly one tile; a tile's pairs are of one chunk.
// 2. Blocks start in the order of tiles. The one that starts last has the fewest keys, so that few
//    SMs wait at the end.
// 3. A row's result depends on its keys and on tile_rows' key tiles only, not on its tile: see
//    prefill.h, rule 3.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/kv_layout.h"

namespace larder::kernels::cuda {

inline constexpr int32_t kPrefillRowsSmall = 64;
inline constexpr int32_t kPrefillRowsLarge = 128;

struct PrefillTile {
  int32_t chunk = 0;  // index in the batch
  int32_t row = 0;    // row of q and out of the chunk's first token
  int32_t pair = 0;   // first of the tile, counted in its chunk
};

struct PrefillPlan {
  std::vector<PrefillTile> tiles;
  int32_t tile_rows = 0;  // kPrefillRowsSmall or kPrefillRowsLarge
};

struct PrefillPlanOptions {
  int32_t kv_heads = 0;
  int32_t group = 0;       // q heads a kv head
  int32_t head_dim = 0;    // large ones have small tiles only
  int32_t sms = 0;         // of the GPU
  bool quantised = false;  // K/V are codes, which have small tiles only
};

// Large tiles read a key half as often as small ones and are taken unless they leave SMs without
// any work that small ones would give them.
PrefillPlan PlanPrefill(std::span<const SequenceChunk> chunks, const PrefillPlanOptions& options);

}  // namespace larder::kernels::cuda
