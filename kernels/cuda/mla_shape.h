// How large the parts of a block of MLA decode are. Internal.
//
// Thread safety: constants.
#pragma once

#include <cstddef>
#include <type_traits>

#include "kernels/cuda/decode_shape.h"

namespace larder::kernels::cuda {

inline constexpr int kLatentDim = 512;
inline constexpr int kLatentRowDim = kLatentDim + 64;  // with the rotated part
inline constexpr int kMlaTokens = 32;                  // of a tile; a lane looks each up

// Few heads (a rank of many) are bound by memory. Many share a tile among 64, or 128 heads would
// fetch each key eight times from level 2 instead of twice.
template <int kHeadTiles, int kBlockWarps, int kTileStages>
struct MlaShape {
  // Two stages where three are too large, then few heads. The number of stages changes no bit.
  using Smaller =
      std::conditional_t<kTileStages == 3, MlaShape<kHeadTiles, kBlockWarps, 2>, MlaShape<2, 4, 3>>;
  static constexpr int kTiles = kHeadTiles;
  static constexpr int kWarps = kBlockWarps;
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kHeads = kTiles * kTileHeads;
  static constexpr int kTokenTiles = kMlaTokens / kStepTokens;
  static constexpr int kScoreTiles = kTiles * kTokenTiles / kWarps;  // head tiles a warp scores
  static constexpr int kValues = kLatentDim / kWarps;                // of a warp
  static constexpr int kParts = kValues / 16;
  static constexpr int kRowBytes = kLatentRowDim * 2 + 16;  // see DecodeShape
  static constexpr int kStageBytes = kMlaTokens * kRowBytes;
  static constexpr int kStages = kTileStages;
  static constexpr int kQueryBytes = kHeads * kRowBytes;
  static constexpr size_t kSharedBytes = size_t{kQueryBytes} + kStages * kStageBytes;
};
using MlaNarrow = MlaShape<2, 4, 3>;
using MlaWide = MlaShape<8, 8, 3>;

template <typename F>
auto WithMlaShape(int heads, F f) {
  return heads <= MlaNarrow::kHeads ? WithFittingShape<MlaNarrow>(f) : WithFittingShape<MlaWide>(f);
}

}  // namespace larder::kernels::cuda
