// A warp's way through the keys of a piece: every Shape::kWarps-th step of kStepTokens, each
// fetched into one of the Shape::kStages of the warp's own ring in shared memory before it is its
// turn.
//
// Thread safety: device code; all lanes of a warp call it together.
#pragma once

#include <cstddef>

#include "kernels/cuda/decode_shape.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/key_rows.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/ptx.h"

namespace larder::kernels::cuda {

// place(step): where this lane's keys of a step lie. fetch(place, stage): starts their copies.
// compute(step, stage), once all lanes' have arrived.
//
// 1. A step's place is looked up before the fetch of the step before it, so that nobody waits for
//    the table but the first fetch, and that once for all stages.
// 2. A stage is fetched again when all lanes have read it.
template <typename Shape, typename Place, typename Fetch, typename Compute>
__device__ void RunRing(const DecodePiece& piece, std::byte* ring, const Place& place,
                        const Fetch& fetch, const Compute& compute) {
  constexpr int kAhead = Shape::kStages * Shape::kWarps;
  const int last = CeilDiv(piece.end, kStepTokens);
  int step = piece.begin / kStepTokens + static_cast<int>(threadIdx.x) / kWarpLanes;
  KeyPlace first[Shape::kStages];
#pragma unroll
  for (int i = 0; i < Shape::kStages; ++i) first[i] = place(step + i * Shape::kWarps);
  KeyPlace next = place(step + kAhead);
#pragma unroll
  for (int i = 0; i < Shape::kStages; ++i) {
    if (step + i * Shape::kWarps < last) fetch(first[i], ring + i * Shape::kStageBytes);
    CopyAsyncCommit();
  }
  for (int stage = 0; step < last; step += Shape::kWarps) {
    std::byte* const at = ring + stage * Shape::kStageBytes;
    CopyAsyncWait<Shape::kStages - 1>();
    __syncwarp();
    compute(step, at);
    __syncwarp();
    if (step + kAhead < last) {
      fetch(next, at);
      next = place(step + kAhead + Shape::kWarps);
    }
    CopyAsyncCommit();
    stage = stage + 1 == Shape::kStages ? 0 : stage + 1;
  }
  CopyAsyncWait<0>();
}

}  // namespace larder::kernels::cuda
