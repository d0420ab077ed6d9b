// How large the parts of a prefill block are, for each head dim. Internal.
//
//   16 bits       queries [rows], stage 0: keys, values; stage 1: keys, values
//   codes         queries [rows], a tile of f16: keys, values;
//                 stage 0: codes of keys, of values, scales of keys, of values; stage 1: likewise
//
// Thread safety: constants.
#pragma once

#include <cstddef>

#include "kernels/cuda/device.h"
#include "kernels/kv_layout.h"

namespace larder::kernels::cuda {

template <int kHeadDim, int kWarpRowTiles>
struct PrefillShape {
  using Smaller = PrefillShape<kHeadDim, 1>;
  static constexpr bool kQuantised = false;
  static constexpr int kDim = kHeadDim;
  static constexpr int kRowTiles = kWarpRowTiles;  // 16 rows each
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeys = kDim > 128 ? 32 : 64;  // of a tile
  static constexpr int kParts = kDim / 16;            // products along a head
  // What is multiplied. 16 bytes longer than a row: the 8 rows that ldmatrix reads at once lie in
  // different banks.
  static constexpr int kRowBytes = kDim * 2 + 16;
  static constexpr int kHalfTileBytes = kKeys * kRowBytes;
  static constexpr int kTileBytes = 2 * kHalfTileBytes;
  // What is fetched: the same.
  static constexpr int kStoredBytes = kDim * 2;  // of a row
  static constexpr int kStageRowBytes = kRowBytes;
  static constexpr int kHalfStageBytes = kHalfTileBytes;
  static constexpr int kStageBytes = kTileBytes;
  static constexpr size_t kSharedBytes = size_t{kRows} * kRowBytes + 2 * kStageBytes;
  static constexpr int kBlocksLeast = 0;  // an SM; 0: as ptxas likes
};

// With one row tile a warp: two and what scales need are more than 255 registers.
template <int kHeadDim>
struct PrefillCodesShape : PrefillShape<kHeadDim, 1> {
  using Base = PrefillShape<kHeadDim, 1>;
  static constexpr bool kQuantised = true;
  static constexpr int kStoredBytes = kHeadDim;
  static constexpr int kStageRowBytes = kHeadDim;
  static constexpr int kHalfStageBytes = Base::kKeys * kStageRowBytes;
  static constexpr int kScalesAt = 2 * kHalfStageBytes;
  static constexpr int kStageBytes = kScalesAt + 2 * Base::kKeys * kScaleBytes;
  static constexpr size_t kSharedBytes =
      size_t{Base::kRows} * Base::kRowBytes + Base::kTileBytes + 2 * kStageBytes;
  // For a third block of heads of 96 ptxas would spill.
  static constexpr int kBlocksLeast = 2;
};

}  // namespace larder::kernels::cuda
