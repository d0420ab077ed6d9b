// How large the parts of a decode block are, for each head dim. Internal.
//
// Thread safety: constants.
#pragma once

#include <algorithm>
#include <cstddef>

#include "kernels/cuda/device.h"

namespace larder::kernels::cuda {

inline constexpr int kStepTokens = 16;  // rows of a product
inline constexpr int kTileHeads = 8;    // columns of a product

// Of a block that works for kTiles times 8 heads.
template <int kHeadDim, int kHeadTiles>
struct DecodeShape {
  static constexpr int kDim = kHeadDim;
  static constexpr int kTiles = kHeadTiles;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kHeads = kTiles * kTileHeads;
  static constexpr int kParts = kDim / 16;  // products along a head
  // Rows of a stage are 16 bytes longer than a key, so that the 8 rows that ldmatrix reads at once
  // lie in different banks whatever the head dim.
  static constexpr int kRowBytes = kDim * 2 + 16;
  static constexpr int kStageBytes = 2 * kStepTokens * kRowBytes;
  static constexpr int kStages = kDim <= 128 ? 3 : 2;
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static constexpr int kOutRow =
      kDim + 4;  // floats; 8 lanes of 2 heads each write without conflict
  static constexpr size_t kSharedBytes = size_t{kWarps} * std::max(kWarpBytes, kHeads* kOutRow * 4);
};

// f(DecodeShape) for this head dim and number of q heads a kv head; `unsupported` where there is
// none.
template <typename F, typename R>
R WithDecodeShape(int head_dim, int group, F f, R unsupported) {
  const bool wide = group > kTileHeads;
  switch (head_dim) {
    case 16:
      return f(DecodeShape<16, 1>());
    case 32:
      return f(DecodeShape<32, 1>());
    case 64:
      return wide ? f(DecodeShape<64, 2>()) : f(DecodeShape<64, 1>());
    case 80:
      return f(DecodeShape<80, 1>());
    case 96:
      return f(DecodeShape<96, 1>());
    case 128:
      return wide ? f(DecodeShape<128, 2>()) : f(DecodeShape<128, 1>());
    case 256:
      return f(DecodeShape<256, 1>());
    default:
      return unsupported;
  }
}

}  // namespace larder::kernels::cuda
