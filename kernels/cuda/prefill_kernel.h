// Prefill for keys and values of heads. Internal: compiled once a storage type and shape.
//
//   shared memory    queries [rows], stage 0: keys, values; stage 1: keys, values
//
//   1. tile j has arrived, and everybody is done with tile j - 1            (the one barrier)
//   2. tile j + 1 is asked for, into the stage of tile j - 1
//   3. addresses of tile j + 2 are looked up
//   4. scores of tile j, masked where need be; softmax; values
//
// A lane 4g + t of a warp holds, of S and O alike, rows g and g + 8 of each 16 and columns 2t and
// 2t + 1 of each 8 (ptx.h), so S becomes the left side of the second product without an exchange.
//
// Thread safety: device code.
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/prefill.h"
#include "kernels/cuda/prefill_sight.h"
#include "kernels/cuda/softmax.h"

namespace larder::kernels::cuda {

template <int kHeadDim, int kWarpRowTiles>
struct PrefillShape {
  static constexpr int kDim = kHeadDim;
  static constexpr int kRowTiles = kWarpRowTiles;  // 16 rows each
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeys = kDim > 128 ? 32 : 64;  // of a tile
  static constexpr int kParts = kDim / 16;            // products along a head
  // 16 bytes longer than a row: the 8 rows that ldmatrix reads at once lie in different banks.
  static constexpr int kRowBytes = kDim * 2 + 16;
  static constexpr int kHalfStageBytes = kKeys * kRowBytes;
  static constexpr int kStageBytes = 2 * kHalfStageBytes;
  static constexpr size_t kSharedBytes = size_t{kRows} * kRowBytes + 2 * kStageBytes;
};

// Addresses of the keys of a tile, two tiles at a time; null: nobody sees it.
template <int kKeys>
struct PrefillAddresses {
  const std::byte* of[2][kKeys];
};

// Brings tiles to their stages.
template <typename Shape>
class PrefillFetcher {
 public:
  __device__ PrefillFetcher(const PrefillParams& p, const SequenceChunk& chunk, int kv_head,
                            const PrefillSight& sight, std::byte* stages)
      : layer_(p.layer),
        blocks_(chunk.blocks),
        head_offset_(p.layer.key_offset_bytes + kv_head * p.layer.head_stride_bytes),
        sight_(sight),
        stages_(stages),
        addresses_(StaticShared<PrefillAddresses<Shape::kKeys>>()) {}

  // Addresses of the next tile, into the slot that is its turn. Ends at the last key.
  __device__ void LookUp() {
    looked_up_ = sight_.NextTile(looked_up_ + 1, Shape::kKeys);
    if (threadIdx.x < Shape::kKeys) {
      const int32_t key = looked_up_ * Shape::kKeys + static_cast<int32_t>(threadIdx.x);
      const std::byte* row = nullptr;
      if (sight_.SeenByAny(key)) {
        const int32_t block = key / layer_.block_tokens;
        row = blocks_[block] + head_offset_ +
              (key - block * layer_.block_tokens) * layer_.token_stride_bytes;
      }
      addresses_.of[slot_][threadIdx.x] = row;
    }
    slot_ ^= 1;
  }

  // Asks for the tile whose addresses lie in `slot`. What nobody sees becomes zero.
  __device__ void Fetch(int slot) {
    constexpr int kChunks = Shape::kDim / 8;
    const int64_t value_delta = layer_.value_offset_bytes - layer_.key_offset_bytes;
    std::byte* const stage = stages_ + slot * Shape::kStageBytes;
#pragma unroll
    for (int i = 0; i < Shape::kKeys * kChunks / Shape::kThreads; ++i) {
      const int chunk = i * Shape::kThreads + static_cast<int>(threadIdx.x);
      const int key = chunk / kChunks;
      const int column = chunk % kChunks * 16;
      const auto row = reinterpret_cast<unsigned long long>(addresses_.of[slot][key]);
      // Sums of integers: what is not visible has no address to add to.
      const unsigned long long from = row + column;
      std::byte* const to = stage + key * Shape::kRowBytes + column;
      CopyAsync16(to, reinterpret_cast<const std::byte*>(from), row != 0);
      CopyAsync16(to + Shape::kHalfStageBytes,
                  reinterpret_cast<const std::byte*>(from + value_delta), row != 0);
    }
    CopyAsyncCommit();
  }

 private:
  static_assert(Shape::kKeys * (Shape::kDim / 8) % Shape::kThreads == 0);

  const KvLayer& layer_;
  std::byte* const* const blocks_;
  const int64_t head_offset_;
  const PrefillSight& sight_;
  std::byte* const stages_;
  PrefillAddresses<Shape::kKeys>& addresses_;
  int32_t looked_up_ = -1;
  int slot_ = 0;
};

// What one warp has of a tile.
template <typename T, typename Shape>
class PrefillWarp {
 public:
  // `queries`: the warp's rows in shared memory; row r of them is pair `pair` + r of the chunk.
  __device__ PrefillWarp(const std::byte* queries, const PrefillSight& sight, int32_t position,
                         int32_t pair, int32_t group)
      : queries_(queries), sight_(sight) {
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        softmax_[m][half].Clear();
        positions_[m][half] = position + (pair + RowOf(m, half)) / group;
      }
#pragma unroll
      for (auto& column : out_[m]) {
#pragma unroll
        for (float& x : column) x = 0;
      }
    }
  }

  // Row of the warp that this lane holds as half `half` of row tile m.
  __device__ static int RowOf(int m, int half) {
    return m * 16 + half * 8 + static_cast<int>(threadIdx.x) % kWarpLanes / 4;
  }

  // All of one tile of keys, the first of which is `key`.
  __device__ void Step(const std::byte* stage, int32_t key, float scale_log2) {
    float scores[Shape::kRowTiles][Shape::kKeys / 8][4];
    Scores(stage, scores);
    const bool all_seen = sight_.AllSeen(key, Shape::kKeys);
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t at = key + n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
          const bool seen = all_seen || sight_.Seen(at, positions_[m][i / 2]);
          scores[m][n][i] = seen ? scores[m][n][i] * scale_log2 : NegativeInfinity();
        }
      }
      Weigh(scores[m], softmax_[m], out_[m]);
    }
    Values(stage + Shape::kHalfStageBytes, scores);
  }

  // Sums of lanes that share a row become the row's.
  __device__ void Finish() {
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
      for (RunningSoftmax& row : softmax_[m]) {
        row.sum += __shfl_xor_sync(kAllLanes, row.sum, 1);
        row.sum += __shfl_xor_sync(kAllLanes, row.sum, 2);
      }
    }
  }

  // The lane's numbers of RowOf(m, half), two neighbours at a time: f(column, a, b).
  template <typename F>
  __device__ void ForOut(int m, int half, F&& f) const {
    const float sum = softmax_[m][half].sum;
    const float factor = sum == 0 ? 0 : 1 / sum;
#pragma unroll
    for (int n = 0; n < Shape::kDim / 8; ++n) {
      f(n * 8 + static_cast<int>(threadIdx.x) % 4 * 2, out_[m][n][2 * half] * factor,
        out_[m][n][2 * half + 1] * factor);
    }
  }
  __device__ float Lse(int m, int half) const { return softmax_[m][half].LogSum() * kLn2; }

 private:
  using Scored = float[Shape::kRowTiles][Shape::kKeys / 8][4];

  __device__ void Scores(const std::byte* keys, Scored& scores) const {
    const int lane = threadIdx.x % kWarpLanes;
#pragma unroll
    for (auto& tile : scores) {
#pragma unroll
      for (auto& column : tile) {
#pragma unroll
        for (float& x : column) x = 0;
      }
    }
    const std::byte* const q = queries_ + lane % 16 * Shape::kRowBytes + lane / 16 * 16;
    const std::byte* const k =
        keys + (lane % 8 + lane / 16 * 8) * Shape::kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
      uint32_t left[Shape::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m) {
        LoadMatrix4(left[m], q + m * 16 * Shape::kRowBytes + part * 32);
      }
#pragma unroll
      for (int pair = 0; pair < Shape::kKeys / 16; ++pair) {
        uint32_t right[4];
        LoadMatrix4(right, k + pair * 16 * Shape::kRowBytes + part * 32);
#pragma unroll
        for (int m = 0; m < Shape::kRowTiles; ++m) {
          Mma<T>(scores[m][2 * pair], left[m], {right[0], right[1]});
          Mma<T>(scores[m][2 * pair + 1], left[m], {right[2], right[3]});
        }
      }
    }
  }

  // Scores to weights; brings sums and out to the new maxima.
  __device__ static void Weigh(float (&scores)[Shape::kKeys / 8][4], RunningSoftmax (&softmax)[2],
                               float (&out)[Shape::kDim / 8][4]) {
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = NegativeInfinity();
#pragma unroll
      for (const auto& column : scores) {
        most = fmaxf(most, fmaxf(column[2 * half], column[2 * half + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      factors[half] = softmax[half].Raise(most);
      const float base = softmax[half].Base();
      float sum = 0;
#pragma unroll
      for (auto& column : scores) {
        column[2 * half] = Exp2(column[2 * half] - base);
        column[2 * half + 1] = Exp2(column[2 * half + 1] - base);
        sum += column[2 * half] + column[2 * half + 1];
      }
      softmax[half].sum += sum;
    }
#pragma unroll
    for (auto& column : out) {
#pragma unroll
      for (int i = 0; i < 4; ++i) column[i] *= factors[i / 2];
    }
  }

  __device__ void Values(const std::byte* values, const Scored& weights) {
    const int lane = threadIdx.x % kWarpLanes;
    const std::byte* const v = values + lane % 16 * Shape::kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int part = 0; part < Shape::kKeys / 16; ++part) {
      uint32_t left[Shape::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const two = &weights[m][2 * part + i / 2][i % 2 * 2];
          left[m][i] = Pack<T>(two[0], two[1]);
        }
      }
#pragma unroll
      for (int pair = 0; pair < Shape::kParts; ++pair) {
        uint32_t right[4];
        LoadMatrix4Transposed(right, v + part * 16 * Shape::kRowBytes + pair * 32);
#pragma unroll
        for (int m = 0; m < Shape::kRowTiles; ++m) {
          Mma<T>(out_[m][2 * pair], left[m], {right[0], right[1]});
          Mma<T>(out_[m][2 * pair + 1], left[m], {right[2], right[3]});
        }
      }
    }
  }

  const std::byte* const queries_;
  const PrefillSight& sight_;
  int32_t positions_[Shape::kRowTiles][2];
  RunningSoftmax softmax_[Shape::kRowTiles][2];
  float out_[Shape::kRowTiles][Shape::kDim / 8][4];
};

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

template <typename T, int kDim, int kRowTiles>
__global__ void __launch_bounds__(PrefillShape<kDim, kRowTiles>::kThreads)
    PrefillKernel(const PrefillParams p) {
  using Shape = PrefillShape<kDim, kRowTiles>;
  const PrefillTile tile = p.plan.tiles[blockIdx.x];
  const SequenceChunk chunk = p.chunks[tile.chunk];
  const int kv_head = static_cast<int>(blockIdx.y);
  const int group = p.q_heads / p.layer.kv_heads;
  const int pairs = chunk.tokens * group;
  const int last_pair = min(tile.pair + Shape::kRows, pairs) - 1;
  const PrefillSight sight(p, chunk.position + tile.pair / group,
                           chunk.position + last_pair / group);
  std::byte* const queries = DynamicShared();
  std::byte* const stages = queries + Shape::kRows * Shape::kRowBytes;
  PrefillFetcher<Shape> fetcher(p, chunk, kv_head, sight, stages);

  LoadQueries<T, Shape>(p, tile, pairs, kv_head, queries);
  fetcher.LookUp();
  __syncthreads();
  fetcher.Fetch(0);
  fetcher.LookUp();

  const int warp_row = static_cast<int>(threadIdx.x) / kWarpLanes * Shape::kWarpRows;
  PrefillWarp<T, Shape> warp(queries + warp_row * Shape::kRowBytes, sight, chunk.position,
                             tile.pair + warp_row, group);
  int stage = 0;
  const auto next = [&](int32_t from) { return sight.NextTile(from, Shape::kKeys); };
  for (int32_t t = next(0); t * Shape::kKeys < sight.end; t = next(t + 1)) {
    CopyAsyncWait<0>();
    __syncthreads();
    if (next(t + 1) * Shape::kKeys < sight.end) fetcher.Fetch(stage ^ 1);
    fetcher.LookUp();
    warp.Step(stages + stage * Shape::kStageBytes, t * Shape::kKeys, p.scale * kLog2E);
    stage ^= 1;
  }
  CopyAsyncWait<0>();
  warp.Finish();
  StoreTile(p, tile, pairs, kv_head, warp);
}

template <typename T, int kDim, int kRowTiles>
cudaError_t LaunchPrefill(const PrefillParams& p, cudaStream_t stream) {
  using Shape = PrefillShape<kDim, kRowTiles>;
  const LaunchShape shape{.blocks = dim3(static_cast<unsigned>(p.plan.tile_count),
                                         static_cast<unsigned>(p.layer.kv_heads)),
                          .threads = Shape::kThreads,
                          .shared_bytes = Shape::kSharedBytes};
  return Launch(PrefillKernel<T, kDim, kRowTiles>, shape, stream, p);
}

template <typename T>
cudaError_t PrefillAs(const PrefillParams& p, cudaStream_t stream) {
  const bool large = p.plan.tile_rows == kPrefillRowsLarge;
  switch (p.layer.key_dim) {
    case 16:
      return large ? LaunchPrefill<T, 16, 2>(p, stream) : LaunchPrefill<T, 16, 1>(p, stream);
    case 32:
      return large ? LaunchPrefill<T, 32, 2>(p, stream) : LaunchPrefill<T, 32, 1>(p, stream);
    case 64:
      return large ? LaunchPrefill<T, 64, 2>(p, stream) : LaunchPrefill<T, 64, 1>(p, stream);
    case 80:
      return large ? LaunchPrefill<T, 80, 2>(p, stream) : LaunchPrefill<T, 80, 1>(p, stream);
    case 96:
      return large ? LaunchPrefill<T, 96, 2>(p, stream) : LaunchPrefill<T, 96, 1>(p, stream);
    case 128:
      return large ? LaunchPrefill<T, 128, 2>(p, stream) : LaunchPrefill<T, 128, 1>(p, stream);
    case 256:
      return large ? cudaErrorInvalidValue : LaunchPrefill<T, 256, 1>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace larder::kernels::cuda
