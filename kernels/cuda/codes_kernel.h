// Decode for keys and values of one-byte codes, each row with a scale (kernels/quantise.h).
// Internal: compiled once a storage type. As decode_kernel.h, but for these:
//
// 1. Codes become f16 on their way from shared memory to registers, exactly; no ldmatrix. Dims are
//    permuted so that a lane reads whole words: of each 16 of a key, 4t to 4t + 3 stand where 2t,
//    2t + 1, 2t + 8, 2t + 9 do; of each 32 of a value, 4g to 4g + 3 are rows g, g + 8 of two tiles.
// 2. A key's scale multiplies its score. A value's scale is an exponent: the weight that meets the
//    codes is exp2(score + log2(scale) - a maximum of its own), so that it fills f16 whatever the
//    scales are; the sum of weights has none of it. The two maxima meet at the end.
// 3. Scales lie in words of their own, and come by cp.async like the rows: a lane's is that of its
//    token's key below lane 16, of its value above.
//
// Thread safety: device code.
#pragma once

#include "kernels/cuda/decode_kernel.h"
#include "kernels/cuda/vectors.h"

namespace larder::kernels::cuda {

// DecodeShape with stages of codes.
template <int kHeadDim, int kHeadTiles, int kStagesOfWarp = 3>
struct CodesShape : DecodeShape<kHeadDim, kHeadTiles, kStagesOfWarp> {
  using Base = DecodeShape<kHeadDim, kHeadTiles, kStagesOfWarp>;
  using Smaller = CodesShape<kHeadDim, kHeadTiles, kStagesOfWarp - 1>;
  // A word of 8 rows each, and of one row's neighbours, lie in different banks.
  static constexpr int kRowBytes = kHeadDim + 16;
  static constexpr int kRowsBytes = kStepTokens * kRowBytes;
  static constexpr int kStageBytes = 2 * kRowsBytes + 2 * kStepTokens * kScaleBytes;
  static constexpr int kWarpBytes = Base::kStages * kStageBytes;
  static constexpr size_t kSharedBytes =
      size_t{Base::kWarps} * std::max(kWarpBytes, Base::kHeads* Base::kOutRow * 4);
  static constexpr int kBlocks = BlocksOfSm(kSharedBytes, 6 / Base::kTiles);
  static_assert(kHeadDim % 32 == 0);
};

// What one warp has of a piece. S: the codes.
template <typename S, typename BlockShape>
class CodesWarp {
 public:
  using Shape = BlockShape;
  static constexpr int kDim = Shape::kDim;
  static constexpr int kTiles = Shape::kTiles;

  __device__ CodesWarp(const KvLayer& layer, const KeyRows& rows, int kv_head)
      : rows_(rows),
        value_delta_(layer.value_offset_bytes - layer.key_offset_bytes),
        scale_offset_(
            (Lane() < kStepTokens ? layer.key_scale_offset_bytes : layer.value_scale_offset_bytes) +
            kv_head * layer.head_scale_stride_bytes) {}

  // Queries as right sides of products, permuted as rule 1 says.
  __device__ void LoadQueries(const F16* q, int heads) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int head = tile * kTileHeads + Lane() / 4;
      const F16* const row = q + int64_t{head} * kDim + Lane() % 4 * 4;
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          q_[tile][part][half] =
              head < heads ? *reinterpret_cast<const uint32_t*>(row + part * 16 + half * 2) : 0;
        }
      }
    }
  }

  __device__ void Run(const DecodePiece& piece, float scale_log2, std::byte* ring) {
    Clear();
    RunRing<Shape>(
        piece, ring,
        [&](int step) { return rows_.Place(step * kStepTokens + Lane() % kStepTokens); },
        [&](const KeyPlace& place, std::byte* stage) { Fetch(place, stage); },
        [&](int step, std::byte* stage) { Step(step * kStepTokens, scale_log2, stage); });
    Settle();
  }

  // out [kHeads][kOutRow], most and sum [kHeads], in shared memory.
  __device__ void Store(float* out, float* most, float* sum) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = tile * kTileHeads + Lane() % 4 * 2 + i;
        if (Lane() / 4 == 0) {
          most[head] = softmax_[tile][i].most;
          sum[head] = softmax_[tile][i].sum;
        }
#pragma unroll
        for (int part = 0; part < Shape::kParts; ++part) {
          float* const to =
              out + head * Shape::kOutRow + part / 2 * 32 + Lane() / 4 * 4 + part % 2 * 2;
          to[0] = out_[tile][part][i];
          to[1] = out_[tile][part][i + 2];
        }
      }
    }
  }

 private:
  __device__ static int Lane() { return static_cast<int>(threadIdx.x) % kWarpLanes; }

  __device__ void Clear() {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        softmax_[tile][i].Clear();
        value_softmax_[tile][i].Clear();
      }
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part) {
#pragma unroll
        for (float& x : out_[tile][part]) x = 0;
      }
    }
  }

  // Asks for 16 keys and values; what is not visible becomes zero, with scales of zero.
  __device__ void Fetch(const KeyPlace& place, std::byte* stage) const {
    constexpr int kRowChunks = kDim / 16;
    const unsigned long long address = rows_.Key(place);
#pragma unroll
    for (int i = 0; i < kStepTokens * kRowChunks / kWarpLanes; ++i) {
      const auto [token, chunk] = RowChunkOf<kWarpLanes, kRowChunks>(i, Lane());
      const unsigned column = chunk * 16;
      const unsigned long long key = __shfl_sync(kAllLanes, address, static_cast<int>(token));
      // Sums of integers: what is not visible has no address to add to.
      const unsigned long long from = key + column;
      std::byte* const to = stage + token * Shape::kRowBytes + column;
      CopyAsync16(to, reinterpret_cast<const std::byte*>(from), key != 0);
      CopyAsync16(to + Shape::kRowsBytes, reinterpret_cast<const std::byte*>(from + value_delta_),
                  key != 0);
    }
    const unsigned long long scale = place.block + scale_offset_ + place.slot * kScaleBytes;
    CopyAsync4(Scales(stage) + Lane(), reinterpret_cast<const std::byte*>(scale), address != 0);
  }

  // Keys' [16], then values' [16].
  __device__ static float* Scales(std::byte* stage) {
    return reinterpret_cast<float*>(stage + 2 * Shape::kRowsBytes);
  }

  __device__ void Step(int token, float scale_log2, std::byte* stage) {
    const int g = Lane() / 4;
    const float* const scales = Scales(stage);
    float scores[kTiles][4] = {};
    Scores(stage, scores);
    uint32_t weights[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = g + i / 2 * 8;
        const float score = scores[tile][i] * scales[key] * scale_log2;
        scores[tile][i] = rows_.Visible(token + key) ? score : NegativeInfinity();
      }
      const float logs[2] = {Log2(scales[kStepTokens + g]), Log2(scales[kStepTokens + g + 8])};
      Weigh(scores[tile], logs, tile);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        weights[tile][i] = TransposeMatrix(Pack<F16>(scores[tile][2 * i], scores[tile][2 * i + 1]));
      }
    }
    Values(stage + Shape::kRowsBytes, weights);
  }

  __device__ void Scores(const std::byte* keys, float (&scores)[kTiles][4]) const {
    const std::byte* const row = keys + Lane() / 4 * Shape::kRowBytes + Lane() % 4 * 4;
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
      const auto low = *reinterpret_cast<const uint32_t*>(row + part * 16);
      const auto high = *reinterpret_cast<const uint32_t*>(row + 8 * Shape::kRowBytes + part * 16);
      const uint32_t k[4] = {F16x2Of(S{}, low), F16x2Of(S{}, high), F16x2Of(S{}, low >> 16),
                             F16x2Of(S{}, high >> 16)};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) MmaF16(scores[tile], k, q_[tile][part]);
    }
  }

  // Scores to the weights that meet the codes; `logs`: log2 of the scales of this lane's values.
  __device__ void Weigh(float (&scores)[4], const float (&logs)[2], int tile) {
    float factors[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      RunningSoftmax& softmax = softmax_[tile][i];
      RunningSoftmax& value_softmax = value_softmax_[tile][i];
      const float scaled[2] = {scores[i] + logs[0], scores[i + 2] + logs[1]};
      softmax.Raise(LargestOfKeys(fmaxf(scores[i], scores[i + 2])));
      factors[i] = value_softmax.Raise(LargestOfKeys(fmaxf(scaled[0], scaled[1])));
      softmax.sum += Exp2(scores[i] - softmax.Base()) + Exp2(scores[i + 2] - softmax.Base());
      scores[i] = Exp2(scaled[0] - value_softmax.Base());
      scores[i + 2] = Exp2(scaled[1] - value_softmax.Base());
    }
#pragma unroll
    for (int part = 0; part < Shape::kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[tile][part][i] *= factors[i % 2];
    }
  }

  // Lanes 4 apart hold the same heads and other keys.
  __device__ static float LargestOfKeys(float x) {
#pragma unroll
    for (int apart = 4; apart < kWarpLanes; apart *= 2) {
      x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, apart));
    }
    return x;
  }

  __device__ void Values(const std::byte* values, const uint32_t (&weights)[kTiles][2]) {
    const std::byte* const row = values + Lane() % 4 * 2 * Shape::kRowBytes + Lane() / 4 * 4;
#pragma unroll
    for (int pair = 0; pair < kDim / 32; ++pair) {
      uint32_t words[4];  // of keys 2t, 2t + 1, 2t + 8, 2t + 9
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = *reinterpret_cast<const uint32_t*>(row + (i % 2 + i / 2 * 8) * Shape::kRowBytes +
                                                      pair * 32);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // Byte b of two words: 2 half + i % 2.
          const unsigned b = 2 * half + i % 2;
          v[i] =
              F16x2Of(S{}, __byte_perm(words[i / 2 * 2], words[i / 2 * 2 + 1], b | (4 + b) << 4));
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          MmaF16(out_[tile][2 * pair + half], v, weights[tile]);
        }
      }
    }
  }

  // Sums of all lanes' keys; out in units of the scores' maximum.
  __device__ void Settle() {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        RunningSoftmax& softmax = softmax_[tile][i];
#pragma unroll
        for (int apart = 4; apart < kWarpLanes; apart *= 2) {
          softmax.sum += __shfl_xor_sync(kAllLanes, softmax.sum, apart);
        }
        // Where all values are zeros the maximum is -infinity and the factor 0.
        const float factor = Exp2(value_softmax_[tile][i].most - softmax.Base());
#pragma unroll
        for (int part = 0; part < Shape::kParts; ++part) {
          out_[tile][part][i] *= factor;
          out_[tile][part][i + 2] *= factor;
        }
      }
    }
  }

  const KeyRows& rows_;
  const int64_t value_delta_;
  const int64_t scale_offset_;
  uint32_t q_[kTiles][Shape::kParts][2];
  float out_[kTiles][Shape::kParts][4];
  RunningSoftmax softmax_[kTiles][2];
  RunningSoftmax value_softmax_[kTiles][2];  // of score + log2(value's scale); no sum
};

template <typename S, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    CodesKernel(const DecodeParams p) {
  const BlockShare share(p, Shape::kHeads);
  const DecodePiece& piece = share.piece;
  if (piece.row < 0) return;
  const KeyRows rows(p.layer, p.chunks[piece.chunk], piece, p.window, p.sinks);

  CodesWarp<S, Shape> mine(p.layer, rows, piece.kv_head);
  mine.LoadQueries(static_cast<const F16*>(p.q) + share.q, share.heads);
  mine.Run(piece, p.scale * kLog2E, DynamicShared() + threadIdx.x / kWarpLanes * Shape::kWarpBytes);
  FinishPiece<F16, Shape>(p, piece, share.head_in_group, share.heads, mine);
}

template <typename S>
DecodeVariant CodesOf(const KvLayer& layer, int group) {
  const auto variant = [](auto shape) {
    using Shape = decltype(shape);
    return DecodeVariant{CodesKernel<S, Shape>, Shape::kHeads, Shape::kThreads,
                         Shape::kSharedBytes};
  };
  const bool wide = group > kTileHeads;
  switch (layer.key_dim) {
    case 64:
      return wide ? WithFittingShape<CodesShape<64, 2>>(variant)
                  : WithFittingShape<CodesShape<64, 1>>(variant);
    case 96:
      return WithFittingShape<CodesShape<96, 1>>(variant);
    case 128:
      return wide ? WithFittingShape<CodesShape<128, 2>>(variant)
                  : WithFittingShape<CodesShape<128, 1>>(variant);
    case 256:
      return WithFittingShape<CodesShape<256, 1>>(variant);
    default:
      return {};
  }
}

}  // namespace larder::kernels::cuda
