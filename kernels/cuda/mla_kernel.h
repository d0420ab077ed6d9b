// Decode for latent rows (MLA, absorbed): keys are rows of 512 + 64 numbers, values their first
// 512, and all heads read the same. Internal: compiled once a storage type.
//
//   tile     32 rows, in a ring of three that the whole block reads
//   scores   S^T = K Q^T: warp w has 16 of the 32 tokens and some of the heads;
//            queries lie in shared memory
//   values   O^T += V^T P^T: warp w has all heads and its part of the 512 numbers
//
// 1. After the first barrier of a tile it has arrived, and nobody reads the tile before it any
//    more: its place is asked for anew.
// 2. Before the second each warp leaves its heads' largest scores, before the third its weights, as
//    fragments: the transposed right side of the second product, lane by lane.
// 3. Every warp keeps the running maximum of every head that it multiplies values for, and computes
//    the same from the same numbers.
//
// Thread safety: device code.
#pragma once

#include "kernels/cuda/decode.h"
#include "kernels/cuda/decode_variants.h"
#include "kernels/cuda/group_merge.h"
#include "kernels/cuda/key_rows.h"
#include "kernels/cuda/mla_shape.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/softmax.h"

namespace larder::kernels::cuda {

template <typename Shape>
struct MlaExchange {
  float most[Shape::kTokenTiles][Shape::kHeads];
  float sum[Shape::kTokenTiles][Shape::kHeads];
  uint32_t weights[Shape::kTokenTiles][Shape::kTiles][2][kWarpLanes];
};

template <typename T, typename Shape>
class MlaWarp {
 public:
  __device__ MlaWarp(const KeyRows& rows, float scale_log2, std::byte* shared,
                     MlaExchange<Shape>& exchange)
      : rows_(rows),
        scale_log2_(scale_log2),
        queries_(shared),
        ring_(shared + Shape::kQueryBytes),
        exchange_(exchange) {
    for (auto& tile : scored_) {
      for (RunningSoftmax& head : tile) head.Clear();
    }
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
      for (float& most : most_[tile]) most = NegativeInfinity();
      for (auto& part : out_[tile]) {
        for (float& x : part) x = 0;
      }
    }
  }

  __device__ void FetchQueries(const T* q, int heads) const {
    for (int i = threadIdx.x; i < Shape::kHeads * kRowChunks; i += Shape::kThreads) {
      const int head = i / kRowChunks;
      const int column = i % kRowChunks * 16;
      const auto* const from =
          reinterpret_cast<const std::byte*>(q + int64_t{head} * kLatentRowDim);
      CopyAsync16(queries_ + head * Shape::kRowBytes + column, from + column, head < heads);
    }
  }

  __device__ void Run(int begin, int end) {
    const int last = CeilDiv(end, kMlaTokens);
    int fetched = begin / kMlaTokens;
    const auto place = [&](int tile) { return rows_.Place(tile * kMlaTokens + Lane()); };
    // Looked up a tile before it is fetched, so that nobody waits for the table but the first
    // fetch, and that once for all stages.
    KeyPlace next = place(fetched + Shape::kStages - 1);
    const auto fetch = [&](const KeyPlace& from) {
      if (fetched < last) Fetch(rows_.Key(from), fetched % Shape::kStages);
      ++fetched;
      CopyAsyncCommit();
    };
    // The queries come with the first tile.
    KeyPlace first[Shape::kStages - 1];
#pragma unroll
    for (int i = 0; i < Shape::kStages - 1; ++i) first[i] = place(fetched + i);
#pragma unroll
    for (int i = 0; i < Shape::kStages - 1; ++i) fetch(first[i]);
    for (int tile = begin / kMlaTokens; tile < last; ++tile) {
      CopyAsyncWait<Shape::kStages - 2>();
      __syncthreads();
      fetch(next);
      next = place(fetched);
      const std::byte* const stage = ring_ + tile % Shape::kStages * Shape::kStageBytes;
      float scores[Shape::kScoreTiles][4];
      Score(stage, tile * kMlaTokens, scores);
      __syncthreads();
      Weigh(scores);
      __syncthreads();
      AddValues(stage);
    }
    CopyAsyncWait<0>();
  }

  __device__ void Store(PieceResult<T>& result, int heads) {
    for (int tile = 0; tile < Shape::kScoreTiles; ++tile) {
      for (int i = 0; i < 2; ++i) {
        float sum = scored_[tile][i].sum;
        for (int apart = 4; apart < kWarpLanes; apart *= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, apart);
        }
        if (Lane() / 4 == 0) exchange_.sum[TokenTile()][ScoredHead(tile, i)] = sum;
      }
    }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
      for (int i = 0; i < 2; ++i) {
        const int head = tile * kTileHeads + Lane() % 4 * 2 + i;
        if (head >= heads) continue;
        RunningSoftmax total;
        total.most = most_[tile][i];
        total.sum = exchange_.sum[0][head] + exchange_.sum[1][head];
#pragma unroll
        for (int part = 0; part < Shape::kParts; ++part) {
          const int value = Warp() * Shape::kValues + part * 16 + Lane() / 4;
          result.Set(head, value, total.sum == 0 ? 0 : out_[tile][part][i] / total.sum);
          result.Set(head, value + 8, total.sum == 0 ? 0 : out_[tile][part][i + 2] / total.sum);
        }
        if (Warp() == 0 && Lane() / 4 == 0) result.SetLogSum(head, total.LogSum());
      }
    }
  }

 private:
  static constexpr int kRowChunks = kLatentRowDim / 8;  // of 16 bytes

  __device__ static int Lane() { return threadIdx.x % kWarpLanes; }
  __device__ static int Warp() { return threadIdx.x / kWarpLanes; }
  __device__ static int TokenTile() { return Warp() % Shape::kTokenTiles; }
  __device__ static int FirstScoredTile() {
    return Warp() / Shape::kTokenTiles * Shape::kScoreTiles;
  }
  __device__ static int ScoredHead(int tile, int i) {
    return (FirstScoredTile() + tile) * kTileHeads + Lane() % 4 * 2 + i;
  }

  // `key`: of the tile's token with this lane's number.
  __device__ void Fetch(unsigned long long key, int stage) const {
    std::byte* const to = ring_ + stage * Shape::kStageBytes;
    for (int i = threadIdx.x; i < kMlaTokens * kRowChunks; i += Shape::kThreads) {
      const int row = i / kRowChunks;
      const int column = i % kRowChunks * 16;
      const unsigned long long from = __shfl_sync(kAllLanes, key, row);
      CopyAsync16(to + row * Shape::kRowBytes + column,
                  reinterpret_cast<const std::byte*>(from + column), from != 0);
    }
  }

  __device__ void Score(const std::byte* stage, int token, float (&scores)[Shape::kScoreTiles][4]) {
    const std::byte* const keys =
        stage + (TokenTile() * kStepTokens + Lane() % 16) * Shape::kRowBytes + Lane() / 16 * 16;
    // Matrices 0 to 3 of a load: numbers 0-7, 8-15, 16-23, 24-31 of eight heads.
    const std::byte* const queries =
        queries_ + (FirstScoredTile() * kTileHeads + Lane() % 8) * Shape::kRowBytes +
        Lane() / 8 * 16;
    // Sums of every other product: a warp of one tile has two chains of 18 instead of one of 36.
    constexpr int kOdd = Shape::kScoreTiles == 1 ? 1 : 0;
    float sums[1 + kOdd][Shape::kScoreTiles][4] = {};
#pragma unroll 2
    for (int part = 0; part < kLatentRowDim / 16; part += 2) {
      uint32_t k[2][4];
      LoadMatrix4(k[0], keys + part * 32);
      LoadMatrix4(k[1], keys + part * 32 + 32);
      for (int tile = 0; tile < Shape::kScoreTiles; ++tile) {
        uint32_t q[4];
        LoadMatrix4(q, queries + tile * kTileHeads * Shape::kRowBytes + part * 32);
        Mma<T>(sums[0][tile], k[0], {q[0], q[1]});
        Mma<T>(sums[kOdd][tile], k[1], {q[2], q[3]});
      }
    }
    const int first = token + TokenTile() * kStepTokens + Lane() / 4;
    const bool visible[2] = {rows_.Visible(first), rows_.Visible(first + 8)};
    for (int tile = 0; tile < Shape::kScoreTiles; ++tile) {
      for (int i = 0; i < 4; ++i) {
        const float sum = kOdd == 0 ? sums[0][tile][i] : sums[0][tile][i] + sums[kOdd][tile][i];
        scores[tile][i] = visible[i / 2] ? sum * scale_log2_ : NegativeInfinity();
      }
      for (int i = 0; i < 2; ++i) {
        float most = fmaxf(scores[tile][i], scores[tile][i + 2]);
        for (int apart = 4; apart < kWarpLanes; apart *= 2) {
          most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, apart));
        }
        if (Lane() / 4 == 0) exchange_.most[TokenTile()][ScoredHead(tile, i)] = most;
      }
    }
  }

  __device__ float TileMost(int head) const {
    return fmaxf(exchange_.most[0][head], exchange_.most[1][head]);
  }

  __device__ void Weigh(const float (&scores)[Shape::kScoreTiles][4]) {
    for (int tile = 0; tile < Shape::kScoreTiles; ++tile) {
      float weights[4];
      for (int i = 0; i < 2; ++i) {
        RunningSoftmax& head = scored_[tile][i];
        head.Raise(TileMost(ScoredHead(tile, i)));
        weights[i] = Exp2(scores[tile][i] - head.Base());
        weights[i + 2] = Exp2(scores[tile][i + 2] - head.Base());
        head.sum += weights[i] + weights[i + 2];
      }
      for (int half = 0; half < 2; ++half) {
        exchange_.weights[TokenTile()][FirstScoredTile() + tile][half][Lane()] =
            TransposeMatrix(Pack<T>(weights[2 * half], weights[2 * half + 1]));
      }
    }
    // Out of the running maxima of all heads: what values so far are worth.
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
      for (int i = 0; i < 2; ++i) {
        RunningSoftmax head{most_[tile][i], 0};
        const float factor = head.Raise(TileMost(tile * kTileHeads + Lane() % 4 * 2 + i));
        most_[tile][i] = head.most;
#pragma unroll
        for (int part = 0; part < Shape::kParts; ++part) {
          out_[tile][part][i] *= factor;
          out_[tile][part][i + 2] *= factor;
        }
      }
    }
  }

  __device__ void AddValues(const std::byte* stage) {
    const std::byte* const values = stage + (Lane() % 8 + Lane() / 16 * 8) * Shape::kRowBytes +
                                    Lane() / 8 % 2 * 16 + Warp() * Shape::kValues * 2;
#pragma unroll
    for (int step = 0; step < Shape::kTokenTiles; ++step) {
      uint32_t weights[Shape::kTiles][2];
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; ++tile) {
        for (int half = 0; half < 2; ++half) {
          weights[tile][half] = exchange_.weights[step][tile][half][Lane()];
        }
      }
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part) {
        uint32_t v[4];
        LoadMatrix4Transposed(v, values + step * kStepTokens * Shape::kRowBytes + part * 32);
#pragma unroll
        for (int tile = 0; tile < Shape::kTiles; ++tile) Mma<T>(out_[tile][part], v, weights[tile]);
      }
    }
  }

  const KeyRows rows_;
  const float scale_log2_;
  std::byte* const queries_;
  std::byte* const ring_;
  MlaExchange<Shape>& exchange_;
  RunningSoftmax scored_[Shape::kScoreTiles][2];
  float most_[Shape::kTiles][2];
  float out_[Shape::kTiles][Shape::kParts][4];
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1) MlaKernel(const DecodeParams p) {
  const DecodePiece piece = p.plan.pieces[blockIdx.x];
  if (piece.row < 0) return;
  const int head = static_cast<int>(blockIdx.y) * Shape::kHeads;
  const int heads = min(Shape::kHeads, p.q_heads - head);
  const KeyRows rows(p.layer, p.chunks[piece.chunk], piece, p.window, p.sinks);
  MlaWarp<T, Shape> mine(rows, p.scale * kLog2E, DynamicShared(),
                         StaticShared<MlaExchange<Shape>>());
  mine.FetchQueries(
      static_cast<const T*>(p.q) + piece.row * p.q_stride + int64_t{head} * kLatentRowDim, heads);
  mine.Run(piece.begin, piece.end);
  PieceResult<T> result(p, piece, head, heads);
  mine.Store(result, heads);
  result.Finish();
}

template <typename T>
DecodeVariant MlaOf(int group) {
  return WithMlaShape(group, [](auto shape) {
    using Shape = decltype(shape);
    return DecodeVariant{MlaKernel<T, Shape>, Shape::kHeads, Shape::kThreads, Shape::kSharedBytes};
  });
}

}  // namespace larder::kernels::cuda
