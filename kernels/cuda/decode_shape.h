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

// Blocks for which an SM of 228 KiB has the shared memory, 1 KiB a block for the system and 512
// bytes for WarpSums; at most those that have registers enough not to spill. ptxas, told so, uses
// what they leave; left alone it saves registers for blocks that there is no room for, and loads
// and products wait for each other. 228 KiB are sm_90's, whatever is compiled for: an SM of sm_80
// has 164 KiB and room for fewer blocks, with fewer registers each than it could give them. It is
// not tuned.
constexpr int BlocksOfSm(size_t shared_bytes, int most) {
  return std::min(static_cast<int>(228 * 1024 / (shared_bytes + 1536)), most);
}

// Of a block that works for kTiles times 8 heads. The number of stages changes no bit.
template <int kHeadDim, int kHeadTiles, int kStagesOfWarp = kHeadDim <= 128 ? 3 : 2>
struct DecodeShape {
  using Smaller = DecodeShape<kHeadDim, kHeadTiles, kStagesOfWarp - 1>;
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
  static constexpr int kStages = kStagesOfWarp;
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static constexpr int kOutRow =
      kDim + 4;  // floats; 8 lanes of 2 heads each write without conflict
  static constexpr size_t kSharedBytes = size_t{kWarps} * std::max(kWarpBytes, kHeads* kOutRow * 4);
  static constexpr int kBlocks = BlocksOfSm(kSharedBytes, 8 / kTiles);
};

// f(DecodeShape) for this head dim and number of q heads a kv head, with as many stages as the
// current device has shared memory for; `unsupported` where there is none.
template <typename F, typename R>
R WithDecodeShape(int head_dim, int group, F f, R unsupported) {
  const bool wide = group > kTileHeads;
  switch (head_dim) {
    case 16:
      return WithFittingShape<DecodeShape<16, 1>>(f);
    case 32:
      return WithFittingShape<DecodeShape<32, 1>>(f);
    case 64:
      return wide ? WithFittingShape<DecodeShape<64, 2>>(f)
                  : WithFittingShape<DecodeShape<64, 1>>(f);
    case 80:
      return WithFittingShape<DecodeShape<80, 1>>(f);
    case 96:
      return WithFittingShape<DecodeShape<96, 1>>(f);
    case 128:
      return wide ? WithFittingShape<DecodeShape<128, 2>>(f)
                  : WithFittingShape<DecodeShape<128, 1>>(f);
    case 256:
      return WithFittingShape<DecodeShape<256, 1>>(f);
    default:
      return unsupported;
  }
}

}  // namespace larder::kernels::cuda
