// Prefill for keys and values of heads. Internal: compiled once a storage type.
//
//   1. places of tile j + 2 are looked up
//   2. tile j has arrived, and everybody is done with tile j - 1
//   3. tile j + 1 is asked for, into the stage of tile j - 1; addresses of tile j + 2 are stored
//   4. codes of tile j become f16, once for all warps
//   5. scores of tile j, masked where need be; softmax; values
//
// Warps wait for each other before step 3 and, where there are codes, before step 5.
//
// Thread safety: device code.
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/prefill.h"
#include "kernels/cuda/prefill_fetcher.h"
#include "kernels/cuda/prefill_shape.h"
#include "kernels/cuda/prefill_sight.h"
#include "kernels/cuda/prefill_warp.h"
#include "kernels/cuda/vectors.h"

namespace larder::kernels::cuda {

// The tile's queries to shared memory; zeros past its last pair.
template <typename T, typename Shape>
__device__ void LoadQueries(const PrefillParams& p, const PrefillTile& tile, int pairs, int kv_head,
                            std::byte* to) {
  constexpr int kChunks = Shape::kDim / 8;
  const int group = p.q_heads / p.layer.kv_heads;
  for (int chunk = threadIdx.x; chunk < Shape::kRows * kChunks; chunk += Shape::kThreads) {
    const int row = chunk / kChunks;
    const int pair = tile.pair + row;
    const int64_t at = (tile.row + pair / group) * p.q_stride +
                       int64_t{kv_head * group + pair % group} * Shape::kDim + chunk % kChunks * 8;
    CopyAsync16(to + row * Shape::kRowBytes + chunk % kChunks * 16,
                static_cast<const T*>(p.q) + (pair < pairs ? at : 0), pair < pairs);
  }
}

template <typename T, typename Shape>
__device__ void StoreTile(const PrefillParams& p, const PrefillTile& tile, int pairs, int kv_head,
                          const PrefillWarp<T, Shape>& warp) {
  const int group = p.q_heads / p.layer.kv_heads;
  const int first = tile.pair + static_cast<int>(threadIdx.x) / kWarpLanes * Shape::kWarpRows;
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pair = first + PrefillWarp<T, Shape>::RowOf(m, half);
      if (pair >= pairs) continue;
      const int64_t row = tile.row + pair / group;
      const int head = kv_head * group + pair % group;
      const int64_t at = row * p.out_stride + int64_t{head} * Shape::kDim;
      warp.ForOut(m, half, [&](int column, float a, float b) {
        if (p.out_dtype == DType::kF32) {
          *reinterpret_cast<float2*>(static_cast<float*>(p.out) + at + column) = make_float2(a, b);
        } else {
          *reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + at + column) = Pack<T>(a, b);
        }
      });
      if (p.lse != nullptr && threadIdx.x % 4 == 0)
        p.lse[row * p.q_heads + head] = warp.Lse(m, half);
    }
  }
}

// Eight codes as f16.
template <typename S>
__device__ uint4 HalfOfCodes(uint32_t a, uint32_t b) {
  return make_uint4(F16x2Of(S{}, a), F16x2Of(S{}, a >> 16), F16x2Of(S{}, b), F16x2Of(S{}, b >> 16));
}

// A stage's codes to f16 where they are multiplied.
template <typename S, typename Shape>
__device__ void ConvertTile(const std::byte* stage, std::byte* tile) {
  constexpr int kChunks = Shape::kStoredBytes / 16;
#pragma unroll
  for (int i = 0; i < 2 * Shape::kKeys * kChunks / Shape::kThreads; ++i) {
    // Values' rows follow keys', here and there.
    const auto [row, chunk] = RowChunkOf<Shape::kThreads, kChunks>(i, threadIdx.x);
    const uint4 codes =
        *reinterpret_cast<const uint4*>(stage + (i * Shape::kThreads + threadIdx.x) * 16);
    const uint4 low = HalfOfCodes<S>(codes.x, codes.y);
    const uint4 high = HalfOfCodes<S>(codes.z, codes.w);
    // Eight lanes store at a time, 32 bytes apart: four of them their low halves, four their high
    // ones, or each bank would be asked for twice. Heads of 96, of 6 chunks, still ask some twice:
    // their eight lanes lie in two rows.
    const unsigned swapped = chunk / 4 % 2;
    auto* const to = reinterpret_cast<uint4*>(tile + row * Shape::kRowBytes + chunk * 32);
    to[swapped] = swapped != 0 ? high : low;
    to[1 - swapped] = swapped != 0 ? low : high;
  }
}

// T: what is multiplied. S: what is stored, T itself or codes. A plan's tile is one block's, or,
// where the device has no shared memory for that, the share of two with half the rows each.
template <typename T, typename S, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksLeast)
    PrefillKernel(const PrefillParams p) {
  const unsigned blocks_of_tile = p.plan.tile_rows / Shape::kRows;
  PrefillTile tile = p.plan.tiles[blockIdx.x / blocks_of_tile];
  tile.pair += static_cast<int32_t>(blockIdx.x % blocks_of_tile) * Shape::kRows;
  const SequenceChunk chunk = p.chunks[tile.chunk];
  const int kv_head = static_cast<int>(blockIdx.y);
  const int group = p.q_heads / p.layer.kv_heads;
  const int pairs = chunk.tokens * group;
  if (tile.pair >= pairs) return;
  const int last_pair = min(tile.pair + Shape::kRows, pairs) - 1;
  const PrefillSight sight(p, chunk.position + tile.pair / group,
                           chunk.position + last_pair / group);
  std::byte* const queries = DynamicShared();
  std::byte* const converted = queries + Shape::kRows * Shape::kRowBytes;
  std::byte* const stages = converted + (Shape::kQuantised ? Shape::kTileBytes : 0);
  PrefillFetcher<Shape> fetcher(p, chunk, kv_head, sight, stages);

  LoadQueries<T, Shape>(p, tile, pairs, kv_head, queries);
  const KeyPlace first = fetcher.LookUp();
  const KeyPlace second = fetcher.LookUp();
  fetcher.Store(first);
  __syncthreads();
  fetcher.Fetch(0);
  fetcher.Store(second);

  const int warp_row = static_cast<int>(threadIdx.x) / kWarpLanes * Shape::kWarpRows;
  PrefillWarp<T, Shape> warp(queries + warp_row * Shape::kRowBytes, sight, chunk.position,
                             tile.pair + warp_row, group);
  int stage = 0;
  const auto next = [&](int32_t from) { return sight.NextTile(from, Shape::kKeys); };
  for (int32_t t = next(0); t * Shape::kKeys < sight.end; t = next(t + 1)) {
    const KeyPlace place = fetcher.LookUp();
    CopyAsyncWait<0>();
    __syncthreads();
    if (next(t + 1) * Shape::kKeys < sight.end) fetcher.Fetch(stage ^ 1);
    fetcher.Store(place);
    const std::byte* tile = stages + stage * Shape::kStageBytes;
    const float* scales = nullptr;
    if constexpr (Shape::kQuantised) {
      scales = reinterpret_cast<const float*>(tile + Shape::kScalesAt);
      ConvertTile<S, Shape>(tile, converted);
      __syncthreads();
      tile = converted;
    }
    warp.Step(tile, scales, t * Shape::kKeys, p.scale * kLog2E);
    stage ^= 1;
  }
  CopyAsyncWait<0>();
  warp.Finish();
  StoreTile(p, tile, pairs, kv_head, warp);
}

template <typename T, typename S, typename Shape>
cudaError_t LaunchPrefill(const PrefillParams& p, cudaStream_t stream) {
  const int blocks_of_tile = p.plan.tile_rows / Shape::kRows;
  const LaunchShape shape{.blocks = dim3(static_cast<unsigned>(p.plan.tile_count * blocks_of_tile),
                                         static_cast<unsigned>(p.layer.kv_heads)),
                          .threads = Shape::kThreads,
                          .shared_bytes = Shape::kSharedBytes};
  return Launch(PrefillKernel<T, S, Shape>, shape, stream, p);
}

template <typename T, int kDim>
cudaError_t LaunchEitherTile(const PrefillParams& p, cudaStream_t stream) {
  const auto launch = [&](auto shape) { return LaunchPrefill<T, T, decltype(shape)>(p, stream); };
  return p.plan.tile_rows == kPrefillRowsLarge ? WithFittingShape<PrefillShape<kDim, 2>>(launch)
                                               : launch(PrefillShape<kDim, 1>());
}

template <typename T>
cudaError_t PrefillAs(const PrefillParams& p, cudaStream_t stream) {
  switch (p.layer.key_dim) {
    case 16:
      return LaunchEitherTile<T, 16>(p, stream);
    case 32:
      return LaunchEitherTile<T, 32>(p, stream);
    case 64:
      return LaunchEitherTile<T, 64>(p, stream);
    case 80:
      return LaunchEitherTile<T, 80>(p, stream);
    case 96:
      return LaunchEitherTile<T, 96>(p, stream);
    case 128:
      return LaunchEitherTile<T, 128>(p, stream);
    case 256:
      if (p.plan.tile_rows == kPrefillRowsLarge) return cudaErrorInvalidValue;
      return LaunchPrefill<T, T, PrefillShape<256, 1>>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename S>
cudaError_t PrefillCodesAs(const PrefillParams& p, cudaStream_t stream) {
  if (p.plan.tile_rows == kPrefillRowsLarge) return cudaErrorInvalidValue;
  switch (p.layer.key_dim) {
    case 64:
      return LaunchPrefill<F16, S, PrefillCodesShape<64>>(p, stream);
    case 96:
      return LaunchPrefill<F16, S, PrefillCodesShape<96>>(p, stream);
    case 128:
      return LaunchPrefill<F16, S, PrefillCodesShape<128>>(p, stream);
    case 256:
      return LaunchPrefill<F16, S, PrefillCodesShape<256>>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace larder::kernels::cuda
