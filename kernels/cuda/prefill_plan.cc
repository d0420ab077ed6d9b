#include "kernels/cuda/prefill_plan.h"

#include <algorithm>

namespace larder::kernels::cuda {
namespace {

constexpr int32_t kLargeTileDimMax = 128;

int64_t TilesOf(std::span<const SequenceChunk> chunks, int32_t group, int32_t tile_rows) {
  int64_t tiles = 0;
  for (const SequenceChunk& chunk : chunks) {
    tiles += (int64_t{chunk.tokens} * group + tile_rows - 1) / tile_rows;
  }
  return tiles;
}

}  // namespace

PrefillPlan PlanPrefill(std::span<const SequenceChunk> chunks, const PrefillPlanOptions& options) {
  const int64_t large = TilesOf(chunks, options.group, kPrefillRowsLarge) * options.kv_heads;
  PrefillPlan plan;
  const bool small =
      options.quantised || options.head_dim > kLargeTileDimMax || large < options.sms;
  plan.tile_rows = small ? kPrefillRowsSmall : kPrefillRowsLarge;
  int32_t row = 0;
  for (size_t i = 0; i < chunks.size(); ++i) {
    const int32_t pairs = chunks[i].tokens * options.group;
    for (int32_t pair = 0; pair < pairs; pair += plan.tile_rows) {
      plan.tiles.push_back({static_cast<int32_t>(i), row, pair});
    }
    row += chunks[i].tokens;
  }
  const auto keys = [&](const PrefillTile& tile) {
    const SequenceChunk& chunk = chunks[tile.chunk];
    const int32_t last = (tile.pair + plan.tile_rows - 1) / options.group;
    return chunk.position + std::min(last, chunk.tokens - 1);
  };
  std::stable_sort(plan.tiles.begin(), plan.tiles.end(),
                   [&](const PrefillTile& a, const PrefillTile& b) { return keys(a) > keys(b); });
  return plan;
}

}  // namespace larder::kernels::cuda
