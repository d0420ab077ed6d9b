// What one warp of a prefill block does with a tile: scores, softmax, values. Internal.
//
// A lane 4g + t of a warp holds, of S and O alike, rows g and g + 8 of each 16 and columns 2t and
// 2t + 1 of each 8 (ptx.h), so S becomes the left side of the second product without an exchange.
//
// Codes lie in the tile as f16, exactly. A key's scale multiplies its score. A value's scale
// multiplies the weight that meets its codes, in float32 and in a unit of the row's own; the sum of
// weights has none of it, and the two meet at the end.
//
// Thread safety: device code.
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/prefill_sight.h"
#include "kernels/cuda/softmax.h"

namespace larder::kernels::cuda {

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
        units_[m][half].Clear();
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

  // All of one tile of keys, the first of which is `key`. `scales`, of codes: keys', then values'.
  __device__ void Step(const std::byte* tile, const float* scales, int32_t key, float scale_log2) {
    float scores[Shape::kRowTiles][Shape::kKeys / 8][4];
    Scores(tile, scores);
    const bool all_seen = sight_.AllSeen(key, Shape::kKeys);
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (Shape::kQuantised) scores[m][n][i] *= scales[ColumnOf(n) + i % 2];
          scores[m][n][i] *= scale_log2;
        }
      }
    }
    if (!all_seen) {
#pragma unroll
      for (int m = 0; m < Shape::kRowTiles; ++m) Mask(scores[m], positions_[m], key);
    }
#pragma unroll
    for (int m = 0; m < Shape::kRowTiles; ++m) {
      float factors[2];
      Weigh(scores[m], softmax_[m], factors);
      if constexpr (Shape::kQuantised) {
        WeighScales(scores[m], softmax_[m], scales + Shape::kKeys, units_[m], factors);
      }
#pragma unroll
      for (auto& column : out_[m]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) column[i] *= factors[i / 2];
      }
    }
    Values(tile + Shape::kHalfTileBytes, scores);
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
    float factor = sum == 0 ? 0 : 1 / sum;
    // Where all values are zeros the unit is -infinity and its power 0.
    if constexpr (Shape::kQuantised) {
      factor *= Exp2(units_[m][half].most - softmax_[m][half].Base());
    }
#pragma unroll
    for (int n = 0; n < Shape::kDim / 8; ++n) {
      f(ColumnOf(n), out_[m][n][2 * half] * factor, out_[m][n][2 * half + 1] * factor);
    }
  }
  __device__ float Lse(int m, int half) const { return softmax_[m][half].LogSum() * kLn2; }

 private:
  // The first of two neighbouring columns that this lane holds of each 8.
  __device__ static int ColumnOf(int n) { return n * 8 + static_cast<int>(threadIdx.x) % 4 * 2; }

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

  using Row = float[Shape::kKeys / 8][4];  // two rows' keys

  // Scores of what a row does not see become -infinity.
  __device__ void Mask(Row& scores, const int32_t (&positions)[2], int32_t key) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[n][2 * half + i];
          score = sight_.Seen(key + ColumnOf(n) + i, positions[half]) ? score : NegativeInfinity();
        }
      }
    }
  }

  // Largest over the lanes that share a row.
  __device__ static float LargestOfRow(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
  }

  // Scores to weights; brings sums to the new maxima, and says what out is to be multiplied with.
  __device__ static void Weigh(Row& scores, RunningSoftmax (&softmax)[2], float (&factors)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = NegativeInfinity();
#pragma unroll
      for (const auto& column : scores) {
        most = fmaxf(most, fmaxf(column[2 * half], column[2 * half + 1]));
      }
      factors[half] = softmax[half].Raise(LargestOfRow(most));
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
  }

  // Weights to what meets the codes: times the values' scales, over a unit of the row's own so that
  // they fill f16 whatever the scales are.
  __device__ static void WeighScales(Row& weights, const RunningSoftmax (&softmax)[2],
                                     const float* scales, RunningSoftmax (&units)[2],
                                     float (&factors)[2]) {
    constexpr float kLeast = 0x1p-126f;  // below it lg2 takes all for zero
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = 0;
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& weight = weights[n][2 * half + i];
          weight *= scales[ColumnOf(n) + i];
          largest = fmaxf(largest, weight);
        }
      }
      largest = LargestOfRow(largest);
      const bool none = largest < kLeast;
      const float base = softmax[half].Base();
      factors[half] = units[half].Raise(none ? NegativeInfinity() : base + Log2(largest));
      const float fill = none ? 0 : Exp2(base - units[half].Base());
#pragma unroll
      for (auto& column : weights) {
        column[2 * half] *= fill;
        column[2 * half + 1] *= fill;
      }
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
  // Of codes: log2 of what out counts in, the largest score plus log2 of its value's scale. No sum.
  RunningSoftmax units_[Shape::kRowTiles][2];
  float out_[Shape::kRowTiles][Shape::kDim / 8][4];
};

}  // namespace larder::kernels::cuda
