// Decode for keys and values of heads. Internal: compiled once a storage type and head dim.
//
//      ring of stages of one warp                 registers of one warp
//   +------------------------------+
//   | 16 keys    16 values         |  -- K (16 x d) * Q^T (d x 8) --> S^T (16 keys x 8 heads)
//   | 16 keys    16 values         |      softmax over keys: rows of S^T, across lanes 4 apart
//   | 16 keys    16 values         |  -- V^T (d x 16) * P^T (16 x 8) --> O^T (d x 8 heads)
//   +------------------------------+
//
// 1. Warp w takes the steps w, w + 4, w + 8 ... of the piece: 16 tokens each, from a multiple
//    of 16 on.
// 2. A step that was asked for kStages steps ago has arrived; scores, weights, values; then its
//    stage is asked for anew. Lanes only wait for lanes of their own warp.
// 3. In fragments a lane holds two heads, 2t and 2t + 1, of S^T and O^T alike, so a new maximum
//    scales O without an exchange; P^T becomes the right side of a product by one transposition
//    (movmatrix).
// 4. The four warps' results meet in shared memory, then those of the group's pieces
//    (group_merge.h).
//
// Thread safety: device code.
#pragma once

#include "kernels/cuda/decode.h"
#include "kernels/cuda/decode_shape.h"
#include "kernels/cuda/decode_variants.h"
#include "kernels/cuda/group_merge.h"
#include "kernels/cuda/key_ring.h"
#include "kernels/cuda/key_rows.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/softmax.h"

namespace larder::kernels::cuda {

// What one warp has of a piece.
template <typename T, typename BlockShape>
class DecodeWarp {
 public:
  using Shape = BlockShape;
  static constexpr int kDim = Shape::kDim;
  static constexpr int kTiles = Shape::kTiles;

  // Queries as right sides of products: lane 4g + t has head g's numbers 2t, 2t+1, 2t+8, 2t+9 of
  // each 16.
  __device__ void LoadQueries(const T* q, int heads) {
    const int lane = threadIdx.x % kWarpLanes;
    for (int tile = 0; tile < kTiles; ++tile) {
      const int head = tile * kTileHeads + lane / 4;
      const T* const row = q + static_cast<int64_t>(head) * kDim + lane % 4 * 2;
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part) {
        for (int half = 0; half < 2; ++half) {
          q_[tile][part][half] =
              head < heads ? *reinterpret_cast<const uint32_t*>(row + part * 16 + half * 8) : 0;
        }
      }
    }
  }

  __device__ void Run(const KeyRows& rows, const DecodePiece& piece, int64_t value_delta,
                      float scale_log2, std::byte* ring) {
    Clear();
    RunRing<Shape>(
        piece, ring, [&](int step) { return rows.Place(step * kStepTokens + LaneToken()); },
        [&](const KeyPlace& place, std::byte* stage) { Fetch(rows.Key(place), value_delta, stage); },
        [&](int step, std::byte* stage) { Step(rows, step * kStepTokens, scale_log2, stage); });
    // Lanes 4 apart hold the same heads and other keys.
    for (int tile = 0; tile < kTiles; ++tile) {
      for (RunningSoftmax& head : softmax_[tile]) {
        for (int apart = 4; apart < kWarpLanes; apart *= 2) {
          head.sum += __shfl_xor_sync(kAllLanes, head.sum, apart);
        }
      }
    }
  }

  // out [kHeads][kOutRow], most and sum [kHeads], in shared memory.
  __device__ void Store(float* out, float* most, float* sum) const {
    const int lane = threadIdx.x % kWarpLanes;
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int i = 0; i < 2; ++i) {
        const int head = tile * kTileHeads + lane % 4 * 2 + i;
        if (lane / 4 == 0) {
          most[head] = softmax_[tile][i].most;
          sum[head] = softmax_[tile][i].sum;
        }
#pragma unroll
        for (int part = 0; part < Shape::kParts; ++part) {
          float* const to = out + head * Shape::kOutRow + part * 16 + lane / 4;
          to[0] = out_[tile][part][i];
          to[8] = out_[tile][part][i + 2];
        }
      }
    }
  }

 private:
  static constexpr int kRowChunks = kDim / 8;  // of 16 bytes

  __device__ static int LaneToken() { return threadIdx.x % kStepTokens; }

  __device__ void Clear() {
    for (int tile = 0; tile < kTiles; ++tile) {
      for (RunningSoftmax& head : softmax_[tile]) head.Clear();
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part) {
        for (float& x : out_[tile][part]) x = 0;
      }
    }
  }

  // Asks for 16 keys and values. `key`: of LaneToken(); what is not visible becomes zero, so that a
  // weight of zero makes nothing of it.
  __device__ static void Fetch(unsigned long long key, int64_t value_delta, std::byte* stage) {
    const unsigned lane = threadIdx.x % kWarpLanes;
#pragma unroll
    for (int i = 0; i < kStepTokens * kRowChunks / kWarpLanes; ++i) {
      const auto [token, chunk] = RowChunkOf<kWarpLanes, kRowChunks>(i, lane);
      const unsigned column = chunk * 16;
      const unsigned long long row = __shfl_sync(kAllLanes, key, static_cast<int>(token));
      // Sums of integers: what is not visible has no address to add to.
      const unsigned long long from = row + column;
      std::byte* const to = stage + token * Shape::kRowBytes + column;
      CopyAsync16(to, reinterpret_cast<const std::byte*>(from), row != 0);
      CopyAsync16(to + Shape::kStageBytes / 2,
                  reinterpret_cast<const std::byte*>(from + value_delta), row != 0);
    }
  }

  // Scores, weights and values of the 16 tokens from `token` on.
  __device__ void Step(const KeyRows& rows, int token, float scale_log2, const std::byte* stage) {
    const int lane = threadIdx.x % kWarpLanes;
    float scores[kTiles][4] = {};
    const std::byte* const keys = stage + lane % 16 * Shape::kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
      uint32_t k[4];
      LoadMatrix4(k, keys + part * 32);
      for (int tile = 0; tile < kTiles; ++tile) Mma<T>(scores[tile], k, q_[tile][part]);
    }
    const bool visible[2] = {rows.Visible(token + lane / 4), rows.Visible(token + lane / 4 + 8)};
    uint32_t weights[kTiles][2];
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int i = 0; i < 4; ++i) {
        scores[tile][i] = visible[i / 2] ? scores[tile][i] * scale_log2 : NegativeInfinity();
      }
      Weigh(scores[tile], softmax_[tile], out_[tile]);
      for (int i = 0; i < 2; ++i) {
        weights[tile][i] = TransposeMatrix(Pack<T>(scores[tile][2 * i], scores[tile][2 * i + 1]));
      }
    }
    const std::byte* const values = stage + Shape::kStageBytes / 2 +
                                    (lane % 8 + lane / 16 * 8) * Shape::kRowBytes +
                                    lane / 8 % 2 * 16;
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
      uint32_t v[4];
      LoadMatrix4Transposed(v, values + part * 32);
      for (int tile = 0; tile < kTiles; ++tile) Mma<T>(out_[tile][part], v, weights[tile]);
    }
  }

  // Turns scores into weights; brings sums and out to the new maxima.
  __device__ static void Weigh(float (&scores)[4], RunningSoftmax (&softmax)[2],
                               float (&out)[Shape::kParts][4]) {
    float factors[2];
    for (int i = 0; i < 2; ++i) {
      float most = fmaxf(scores[i], scores[i + 2]);
      for (int apart = 4; apart < kWarpLanes; apart *= 2) {
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, apart));
      }
      factors[i] = softmax[i].Raise(most);
      scores[i] = Exp2(scores[i] - softmax[i].Base());
      scores[i + 2] = Exp2(scores[i + 2] - softmax[i].Base());
      softmax[i].sum += scores[i] + scores[i + 2];
    }
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
      for (int i = 0; i < 4; ++i) out[part][i] *= factors[i % 2];
    }
  }

  uint32_t q_[kTiles][Shape::kParts][2];
  float out_[kTiles][Shape::kParts][4];
  RunningSoftmax softmax_[kTiles][2];
};

template <int kHeads>
struct WarpSums {
  float most[4][kHeads];
  float sum[4][kHeads];
};

// What the block's warps have, merged, to where the piece's result goes. `mine` is a warp's; every
// thread of the block calls.
template <typename T, typename Shape, typename Warp>
__device__ void FinishPiece(const DecodeParams& p, const DecodePiece& piece, int head_in_group,
                            int heads, const Warp& mine) {
  // Every warp is done with its ring before results go there.
  __syncthreads();
  const int warp = threadIdx.x / kWarpLanes;
  auto* const outs = reinterpret_cast<float*>(DynamicShared());
  auto& sums = StaticShared<WarpSums<Shape::kHeads>>();
  mine.Store(outs + warp * Shape::kHeads * Shape::kOutRow, sums.most[warp], sums.sum[warp]);
  __syncthreads();
  PieceResult<T> result(p, piece, head_in_group, heads);
  for (int i = threadIdx.x; i < heads * Shape::kDim; i += Shape::kThreads) {
    const int h = i / Shape::kDim;
    RunningSoftmax total;
    total.Clear();
    float out = 0;
    for (int w = 0; w < Shape::kWarps; ++w) total.most = fmaxf(total.most, sums.most[w][h]);
    for (int w = 0; w < Shape::kWarps; ++w) {
      const float factor = Exp2(sums.most[w][h] - total.Base());
      total.sum = fmaf(factor, sums.sum[w][h], total.sum);
      out = fmaf(factor, outs[(w * Shape::kHeads + h) * Shape::kOutRow + i % Shape::kDim], out);
    }
    result.Set(h, i % Shape::kDim, total.sum == 0 ? 0 : out / total.sum);
    if (i % Shape::kDim == 0) result.SetLogSum(h, total.LogSum());
  }
  result.Finish();
}

// What a block of a decode kernel works on: a piece, and up to kHeads q heads of its kv head.
struct BlockShare {
  __device__ BlockShare(const DecodeParams& p, int heads_max)
      : piece(p.plan.pieces[blockIdx.x]),
        head_in_group(static_cast<int>(blockIdx.y) * heads_max),
        heads(min(heads_max, p.q_heads / p.layer.kv_heads - head_in_group)),
        q(piece.row * p.q_stride +
          int64_t{piece.kv_head * (p.q_heads / p.layer.kv_heads) + head_in_group} *
              p.layer.key_dim) {}

  const DecodePiece piece;
  const int head_in_group;
  const int heads;
  const int64_t q;  // of its first head, in numbers from the first query's
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    DecodeKernel(const DecodeParams p) {
  const BlockShare share(p, Shape::kHeads);
  const DecodePiece& piece = share.piece;
  if (piece.row < 0) return;
  const int warp = threadIdx.x / kWarpLanes;
  std::byte* const shared = DynamicShared();

  DecodeWarp<T, Shape> mine;
  mine.LoadQueries(static_cast<const T*>(p.q) + share.q, share.heads);
  const KeyRows rows(p.layer, p.chunks[piece.chunk], piece, p.window, p.sinks);
  mine.Run(rows, piece, p.layer.value_offset_bytes - p.layer.key_offset_bytes, p.scale * kLog2E,
           shared + warp * Shape::kWarpBytes);
  FinishPiece<T, Shape>(p, piece, share.head_in_group, share.heads, mine);
}

template <typename T>
DecodeVariant DecodeOf(const KvLayer& layer, int group) {
  return WithDecodeShape(
      layer.key_dim, group,
      [](auto shape) {
        using Shape = decltype(shape);
        return DecodeVariant{DecodeKernel<T, Shape>, Shape::kHeads, Shape::kThreads,
                             Shape::kSharedBytes};
      },
      DecodeVariant());
}

}  // namespace larder::kernels::cuda
