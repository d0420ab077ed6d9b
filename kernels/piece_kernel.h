// Attention of a tile of rows over pieces of 256 keys, written once over a vector type V
// (vec_*.h describe one; variant_*.cc have them). Internal to kernels/.
//
//                 tile 0   tile 1  ...  tile 7      32 tokens each, of one piece
//   1. keys       packed to [dim][32], so that a vector holds one number of many tokens;
//                 scores[row][token] = scale * sum over dim, in the order of dim
//   2. softmax    a row's maximum over the piece; weights exp(score - maximum); their sum,
//                 lane by lane, then over the lanes
//   3. values     o[row] = sum over tokens of weight * value, in the order of tokens
//   4. merge      pieces from left to right: (m, l, o) and (m', l', o')
//
// A row's numbers go through the same operations in the same order whatever rows share its
// tile, which is what makes decode and prefill agree bit by bit: a tile in which a row sees nothing
// adds exact zeros to its sum and is left out of its values.
//
// Thread safety: pure functions over their arguments and scratch.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/tile_reader.h"
#include "kernels/variant.h"
#include "kernels/vector_math.h"

namespace larder::kernels {

template <typename V>
class PieceKernel {
 public:
  static void AttendPieces(const AttendTile& tile, float* scratch) {
    PieceKernel kernel(tile, scratch);
    for (int32_t piece = tile.piece_begin; piece < tile.piece_end; ++piece) {
      kernel.Piece(piece, kernel.PartialOf(piece));
    }
  }

  static void MergePieces(const AttendTile& tile, float* scratch) {
    PieceKernel kernel(tile, scratch);
    kernel.Clear(kernel.total_);
    for (int32_t piece = tile.piece_begin; piece < tile.piece_end; ++piece) {
      kernel.Merge(kernel.PartialOf(piece), kernel.total_);
    }
    kernel.Finish(kernel.total_);
  }

  static void AttendWhole(const AttendTile& tile, float* scratch) {
    PieceKernel kernel(tile, scratch);
    kernel.Clear(kernel.total_);
    for (int32_t piece = tile.piece_begin; piece < tile.piece_end; ++piece) {
      kernel.Piece(piece, kernel.piece_);
      kernel.Merge(kernel.piece_, kernel.total_);
    }
    kernel.Finish(kernel.total_);
  }

 private:
  using F = typename V::F;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kRowBlock = 4;    // rows that share a load of keys or values
  static constexpr int kTilesAhead = 1;  // 8 KiB for heads of 128 in bf16

  // What rows have gathered: maximum score, sum of weights, weighted sum of values.
  struct Rows {
    float* m;  // [rows]; -infinity: nothing seen, l and o mean nothing
    float* l;  // [rows]
    float* o;  // [rows][o_stride_]
  };

  PieceKernel(const AttendTile& tile, float* scratch)
      : tile_(tile),
        params_(*tile.params),
        layer_(tile.params->layer),
        rows_(tile.row_end - tile.row_begin),
        key_stride_((layer_.key_dim + kPadFloats - 1) / kPadFloats * kPadFloats),
        o_stride_((layer_.value_dim + kPadFloats - 1) / kPadFloats * kPadFloats),
        scores_(scratch),
        keys_(scores_ + int64_t{kTileRows} * kPieceTokens),
        piece_(RowsAt(keys_ + int64_t{kTileTokens} * key_stride_)),
        total_(RowsAt(piece_.m + int64_t{kTileRows} * (2 + o_stride_))),
        reader_(tile, total_.m + int64_t{kTileRows} * (2 + o_stride_),
                key_stride_ > o_stride_ ? key_stride_ : o_stride_) {
    for (int32_t r = 0; r < rows_; ++r) {
      const int32_t row = tile.row_begin + r;
      const int32_t head = row % tile.group;
      positions_[r] = tile.chunk->position + row / tile.group;
      q_[r] = tile.q + row / tile.group * params_.q_stride + int64_t{head} * layer_.key_dim;
    }
  }

  Rows RowsAt(float* base) const { return {base, base + rows_, base + 2 * rows_}; }
  Rows PartialOf(int32_t piece) const {
    const int64_t floats = int64_t{rows_} * (2 + o_stride_);
    return RowsAt(tile_.partials + (piece - tile_.piece_begin) * floats);
  }

  void Clear(Rows rows) const {
    for (int32_t r = 0; r < rows_; ++r) rows.m[r] = -HUGE_VALF;
  }

  // --- 1. keys -----------------------------------------------------------------------------------

  void Keys(int64_t token, uint32_t seen) {
    TokenRows rows;
    reader_.Addresses(token, seen, false, rows);
    if (params_.rotation.cos_sin != nullptr) {
      reader_.Rotate(token, seen, rows);
      return Pack<DType::kF32>(rows);
    }
    switch (layer_.dtype) {
      case DType::kF32:
        return Pack<DType::kF32>(rows);
      case DType::kF16:
        return Pack<DType::kF16>(rows);
      case DType::kBf16:
        return Pack<DType::kBf16>(rows);
      case DType::kF8E4M3:
      case DType::kI8:
        return;  // Attend refuses them
    }
  }

  // keys_[dim][token] = rows[token][dim], kLanes tokens and as many dims at a time.
  template <DType D>
  void Pack(const TokenRows& rows) {
    for (int32_t token = 0; token < kTileTokens; token += kLanes) {
      int32_t dim = 0;
      if constexpr (D == DType::kBf16) {
        // Two neighbours are one word and travel through the transposition together.
        for (; dim + 2 * kLanes <= layer_.key_dim; dim += 2 * kLanes) {
          F block[kLanes];
          for (int i = 0; i < kLanes; ++i) block[i] = V::LoadWords(rows[token + i] + dim * 2);
          V::Transpose(block);
          for (int i = 0; i < kLanes; ++i) {
            float* const to = keys_ + int64_t{dim + 2 * i} * kTileTokens + token;
            V::Store(to, V::LowHalf(block[i]));
            V::Store(to + kTileTokens, V::HighHalf(block[i]));
          }
        }
      }
      for (; dim < layer_.key_dim; dim += kLanes) PackSquare<D>(&rows[token], token, dim);
    }
  }

  template <DType D>
  void PackSquare(const std::byte* const* rows, int32_t token, int32_t dim) {
    constexpr int kBytes = D == DType::kF32 ? 4 : 2;
    const int32_t count = layer_.key_dim - dim < kLanes ? layer_.key_dim - dim : kLanes;
    F block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = LoadSome<V, D>(rows[i] + dim * kBytes, count);
    V::Transpose(block);
    for (int i = 0; i < count; ++i) {
      V::Store(keys_ + int64_t{dim + i} * kTileTokens + token, block[i]);
    }
  }

  template <int R>
  void Scores(int32_t row, int32_t tile) {
    for (int32_t token = 0; token < kTileTokens; token += 2 * kLanes) {
      F sum[R][2];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = V::Zero();
      const float* key = keys_ + token;
      const bool ahead = reader_.ahead() && row == 0 && token == 0;
      int32_t dim = 0;
      for (int32_t i = 0; i < kTileTokens; ++i) {
        if (ahead) reader_.FetchRow(i);
        for (const int32_t end = (i + 1) * layer_.key_dim / kTileTokens; dim < end; ++dim) {
          const F key0 = V::Load(key);
          const F key1 = V::Load(key + kLanes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const F q = V::Set(q_[row + r][dim]);
            sum[r][0] = V::Fma(q, key0, sum[r][0]);
            sum[r][1] = V::Fma(q, key1, sum[r][1]);
          }
          key += kTileTokens;
        }
      }
      const F scale = V::Set(params_.scale);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        float* const to = ScoresOf(row + r) + tile * kTileTokens + token;
        V::Store(to, V::Mul(sum[r][0], scale));
        V::Store(to + kLanes, V::Mul(sum[r][1], scale));
      }
    }
  }

  // The same sums for all rows, when these are few: straight from each square of keys in
  // registers, as packed keys would not be read again. A third less time for a group of 4.
  template <int R>
  void ScoresInPlace(const TokenRows& rows, int32_t tile) {
    constexpr int kDims = 2 * kLanes;
    const int32_t squares = kTileTokens / kLanes * (layer_.key_dim / kDims);
    int32_t square = 0;
    int32_t fetched = 0;
    for (int32_t token = 0; token < kTileTokens; token += kLanes) {
      F sum[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r] = V::Zero();
      for (int32_t dim = 0; dim < layer_.key_dim; dim += kDims) {
        const int32_t fetch_end = reader_.ahead() ? ++square * kTileTokens / squares : 0;
        for (; fetched < fetch_end; ++fetched) reader_.FetchRow(fetched);
        F block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = V::LoadWords(rows[token + i] + dim * 2);
        V::Transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const F low = V::LowHalf(block[i]);
          const F high = V::HighHalf(block[i]);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            sum[r] = V::Fma(V::Set(q_[r][dim + 2 * i]), low, sum[r]);
            sum[r] = V::Fma(V::Set(q_[r][dim + 2 * i + 1]), high, sum[r]);
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V::Store(ScoresOf(r) + tile * kTileTokens + token, V::Mul(sum[r], V::Set(params_.scale)));
      }
    }
  }

  bool InPlace() const {
    return rows_ <= kRowBlock && layer_.dtype == DType::kBf16 &&
           params_.rotation.cos_sin == nullptr && layer_.key_dim % (2 * kLanes) == 0;
  }

  void ScoreTileInPlace(int32_t tile, int64_t token, uint32_t seen) {
    TokenRows rows;
    reader_.Addresses(token, seen, false, rows);
    if (rows_ == 4) ScoresInPlace<4>(rows, tile);
    if (rows_ == 3) ScoresInPlace<3>(rows, tile);
    if (rows_ == 2) ScoresInPlace<2>(rows, tile);
    if (rows_ == 1) ScoresInPlace<1>(rows, tile);
    for (int32_t r = 0; r < rows_; ++r) Hide(~visible_[tile][r], r, tile);
  }

  float* ScoresOf(int32_t row) const { return scores_ + int64_t{row} * kPieceTokens; }

  // Scores of all rows for one tile, -infinity where a row does not see a token.
  void ScoreTile(int32_t tile) {
    const uint32_t* const visible = visible_[tile];
    int32_t row = 0;
    for (int32_t count = 0; row < rows_; row += count) {
      count = rows_ - row < kRowBlock ? rows_ - row : kRowBlock;
      uint32_t any = 0;
      for (int32_t r = row; r < row + count; ++r) any |= visible[r];
      if (any != 0) {
        if (count == 4) Scores<4>(row, tile);
        if (count == 3) Scores<3>(row, tile);
        if (count == 2) Scores<2>(row, tile);
        if (count == 1) Scores<1>(row, tile);
      }
      for (int32_t r = row; r < row + count; ++r) Hide(~visible[r], r, tile);
    }
  }

  void Hide(uint32_t hidden, int32_t row, int32_t tile) {
    float* const scores = ScoresOf(row) + tile * kTileTokens;
    for (; hidden != 0; hidden &= hidden - 1) scores[__builtin_ctz(hidden)] = -HUGE_VALF;
  }

  // --- 2. softmax --------------------------------------------------------------------------------

  void Softmax(int32_t row, int32_t tiles, Rows to) {
    float* const scores = ScoresOf(row);
    const int32_t tokens = tiles * kTileTokens;
    F most = V::Set(-HUGE_VALF);
    for (int32_t i = 0; i < tokens; i += kLanes) most = V::Max(most, V::Load(scores + i));
    to.m[row] = V::MaxOf(most);
    if (to.m[row] == -HUGE_VALF) return;
    const F maximum = V::Set(to.m[row]);
    F sum = V::Zero();
    for (int32_t i = 0; i < tokens; i += kLanes) {
      const F weight = Exp<V>(V::Sub(V::Load(scores + i), maximum));
      V::Store(scores + i, weight);
      sum = V::Add(sum, weight);
    }
    to.l[row] = V::SumOf(sum);
  }

  // --- 3. values ---------------------------------------------------------------------------------

  void Values(int64_t token, uint32_t seen, int32_t tile, Rows to) {
    TokenRows rows;
    reader_.Addresses(token, seen, true, rows);
    // Converted as they are loaded for the few rows of a decode step, once for many.
    if (rows_ > kRowBlock && layer_.dtype != DType::kF32) {
      reader_.Stage(seen, rows, layer_.value_dim);
      return ValuesAs<DType::kF32>(rows, tile, to);
    }
    switch (layer_.dtype) {
      case DType::kF32:
        return ValuesAs<DType::kF32>(rows, tile, to);
      case DType::kF16:
        return ValuesAs<DType::kF16>(rows, tile, to);
      case DType::kBf16:
        return ValuesAs<DType::kBf16>(rows, tile, to);
      case DType::kF8E4M3:
      case DType::kI8:
        return;  // Attend refuses them
    }
  }

  template <DType D>
  void ValuesAs(const TokenRows& rows, int32_t tile, Rows to) {
    const uint32_t* const visible = visible_[tile];
    int32_t row = 0;
    for (; row + kRowBlock <= rows_; row += kRowBlock) {
      bool same = true;
      for (int r = 1; r < kRowBlock; ++r) same = same && visible[row + r] == visible[row];
      if (same) {
        ValuesOfRuns<D, kRowBlock>(rows, row, tile, to);
      } else {
        for (int r = 0; r < kRowBlock; ++r) ValuesOfRuns<D, 1>(rows, row + r, tile, to);
      }
    }
    for (; row < rows_; ++row) ValuesOfRuns<D, 1>(rows, row, tile, to);
  }

  // R rows that see the same tokens: each run of these in turn.
  template <DType D, int R>
  void ValuesOfRuns(const TokenRows& rows, int32_t row, int32_t tile, Rows to) {
    uint32_t left = visible_[tile][row];
    while (left != 0) {
      const int32_t begin = __builtin_ctz(left);
      const uint32_t beyond = ~(left >> begin);
      const int32_t end = begin + (beyond == 0 ? kTileTokens - begin : __builtin_ctz(beyond));
      const Run run{rows,
                    begin,
                    end,
                    ScoresOf(row) + tile * kTileTokens,
                    to.o + int64_t{row} * o_stride_,
                    reader_.ahead() && row == 0};
      int32_t dim = 0;
      for (; dim + V::kValueVecs * kLanes <= layer_.value_dim; dim += V::kValueVecs * kLanes) {
        Weigh<D, R, V::kValueVecs>(run, dim);
      }
      for (; dim < layer_.value_dim; dim += kLanes) Weigh<D, R, 1>(run, dim);
      left = end == kTileTokens ? 0 : left >> end << end;
    }
  }

  struct Run {
    const std::byte* const* rows;  // [kTileTokens]
    int32_t begin;
    int32_t end;
    const float* weights;  // [kTileTokens] of the first row; the next is kPieceTokens on
    float* o;              // of the first row; the next is o_stride_ on
    bool ahead;            // fetch the next tile meanwhile
  };

  // o[r][dim ...] += weight[r][t] * value[t][dim ...] for N vectors of numbers and R rows.
  template <DType D, int R, int N>
  void Weigh(const Run& run, int32_t dim) {
    constexpr int kBytes = D == DType::kF32 ? 4 : 2;
    const int32_t count = layer_.value_dim - dim;
    const bool whole = N > 1 || count >= kLanes;
    F sum[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] = V::Load(run.o + r * o_stride_ + dim + n * kLanes);
    }
    for (int32_t t = run.begin; t < run.end; ++t) {
      if (run.ahead && dim == 0) reader_.FetchRow(t);
      const std::byte* const from = run.rows[t] + dim * kBytes;
      F value[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        value[n] =
            whole ? V::template LoadAs<D>(from + n * kLanes * kBytes) : LoadSome<V, D>(from, count);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const F weight = V::Set(run.weights[r * kPieceTokens + t]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[r][n] = V::Fma(weight, value[n], sum[r][n]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) V::Store(run.o + r * o_stride_ + dim + n * kLanes, sum[r][n]);
    }
  }

  // --- the piece ---------------------------------------------------------------------------------

  void Piece(int32_t piece, Rows to) {
    const int64_t start = int64_t{piece} * kPieceTokens;
    // The gap between sinks and window may be most of a long table.
    const bool gap = params_.window > 0 && start >= params_.sinks &&
                     start + kPieceTokens <= int64_t{positions_[0]} - params_.window + 1;
    if (gap) return Clear(to);
    uint32_t seen[kPieceTiles];
    int32_t tiles = 0;  // up to the last that any row sees something of
    for (int32_t tile = 0; tile < kPieceTiles; ++tile) {
      seen[tile] = 0;
      for (int32_t r = 0; r < rows_; ++r) {
        visible_[tile][r] = reader_.Visible(positions_[r], start + tile * kTileTokens);
        seen[tile] |= visible_[tile][r];
      }
      if (seen[tile] != 0) tiles = tile + 1;
    }
    for (int32_t tile = 0; tile < tiles; ++tile) {
      LookAhead(piece, tile + kTilesAhead, tiles, seen);
      if (seen[tile] != 0 && InPlace()) {
        ScoreTileInPlace(tile, start + tile * kTileTokens, seen[tile]);
        continue;
      }
      if (seen[tile] != 0) Keys(start + tile * kTileTokens, seen[tile]);
      ScoreTile(tile);
    }
    for (int32_t r = 0; r < rows_; ++r) Softmax(r, tiles, to);
    std::memset(to.o, 0, sizeof(float) * rows_ * o_stride_);
    for (int32_t tile = 0; tile < tiles; ++tile) {
      LookAhead(piece, tiles + tile + kTilesAhead, tiles, seen);
      if (seen[tile] != 0) Values(start + tile * kTileTokens, seen[tile], tile, to);
    }
  }

  // Has the reader look at the `step`th tile of those read for this piece and the next: all tiles'
  // keys, then all tiles' values.
  void LookAhead(int32_t piece, int32_t step, int32_t tiles, const uint32_t (&seen)[kPieceTiles]) {
    const int64_t start = int64_t{piece} * kPieceTokens;
    const int32_t tile = step % tiles;
    if (step < 2 * tiles) {
      return reader_.LookAhead(start + tile * kTileTokens, seen[tile], step >= tiles);
    }
    const int64_t token = start + kPieceTokens + tile * kTileTokens;
    const bool last = piece + 1 == tile_.piece_end;
    reader_.LookAhead(token, last ? 0 : reader_.Visible(positions_[0], token), false);
  }

  // --- 4. merge ----------------------------------------------------------------------------------

  void Merge(Rows from, Rows into) {
    for (int32_t r = 0; r < rows_; ++r) {
      if (from.m[r] == -HUGE_VALF) continue;
      float* const o = into.o + int64_t{r} * o_stride_;
      const float* const piece_o = from.o + int64_t{r} * o_stride_;
      if (into.m[r] == -HUGE_VALF) {
        into.m[r] = from.m[r];
        into.l[r] = from.l[r];
        std::memcpy(o, piece_o, sizeof(float) * o_stride_);
        continue;
      }
      const float m = into.m[r] > from.m[r] ? into.m[r] : from.m[r];
      const F old_weight = Exp<V>(V::Set(into.m[r] - m));
      const F new_weight = Exp<V>(V::Set(from.m[r] - m));
      into.m[r] = m;
      into.l[r] =
          V::First(V::Fma(new_weight, V::Set(from.l[r]), V::Mul(old_weight, V::Set(into.l[r]))));
      for (int32_t i = 0; i < o_stride_; i += kLanes) {
        V::Store(o + i,
                 V::Fma(new_weight, V::Load(piece_o + i), V::Mul(old_weight, V::Load(o + i))));
      }
    }
  }

  void Finish(Rows rows) {
    for (int32_t r = 0; r < rows_; ++r) {
      const int32_t row = tile_.row_begin + r;
      const int64_t token = row / tile_.group;
      const int64_t head = row % tile_.group;
      const bool empty = rows.m[r] == -HUGE_VALF;
      float* const out = tile_.out + token * params_.out_stride + head * layer_.value_dim;
      const F sum = V::Set(rows.l[r]);
      const float* const o = rows.o + int64_t{r} * o_stride_;
      for (int32_t i = 0; i < layer_.value_dim; i += kLanes) {
        const F mean = empty ? V::Zero() : V::Div(V::Load(o + i), sum);
        StoreSome<V, DType::kF32>(reinterpret_cast<std::byte*>(out + i), mean,
                                  layer_.value_dim - i);
      }
      if (tile_.lse != nullptr) {
        tile_.lse[token * params_.q_heads + head] =
            empty ? -HUGE_VALF : rows.m[r] + logf(rows.l[r]);
      }
    }
  }

  const AttendTile& tile_;
  const AttentionParams& params_;
  const KvLayer& layer_;
  const int32_t rows_;
  const int64_t key_stride_;
  const int64_t o_stride_;
  // Scratch, in this order; after it the reader's.
  float* const scores_;  // [kTileRows][kPieceTokens]; weights after the softmax
  float* const keys_;    // [key_dim][kTileTokens]
  const Rows piece_;
  const Rows total_;
  TileReader<V> reader_;
  const float* q_[kTileRows];
  int32_t positions_[kTileRows];
  uint32_t visible_[kPieceTiles][kTileRows];
};

}  // namespace larder::kernels
