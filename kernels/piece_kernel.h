// Attention of a tile of rows over pieces of 256 keys, written once over a vector type V
// (vector_math.h describes it; variant_*.cc have one each). Internal to kernels/.
//
//                 tile 0   tile 1  ...  tile 7      32 tokens each, of one piece
//   1. keys       scores[row][token] = scale * the dot product, lane by lane in the order of dims,
//                 then over the lanes, kLanes products at a time
//   2. softmax    a row's maximum over the piece; weights exp(score - maximum); their sum,
//                 lane by lane, then over the lanes
//   3. values     o[row] = sum over tokens of weight * value, in the order of tokens
//   4. merge      pieces from left to right: (m, l, o) and (m', l', o')
//
// Keys and values are multiplied as they lie: nothing is transposed, and bfloat16 is split, not
// widened (vector_math.h, split order). What of that is not multiplying runs beside it. Codes
// become numbers first, a tile at a time.
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
  static constexpr int kRowBlock = 4;  // rows that share a load of keys or values
  // Values are weighed in strips of kValueVecs vectors. Where they come from memory a strip goes
  // over so many tokens only: the hardware's own streams follow 2 KiB, and miss over 8.
  static constexpr int kValueTokens = 8;

  // What rows have gathered: maximum score, sum of weights, weighted sum of values.
  struct Rows {
    float* o;  // [rows][o_stride_]
    float* m;  // [rows]; -infinity: nothing seen, l and o mean nothing
    float* l;  // [rows]
  };

  PieceKernel(const AttendTile& tile, float* scratch)
      : tile_(tile),
        params_(*tile.params),
        layer_(tile.params->layer),
        head_rows_(tile.row_end - tile.row_begin),
        rows_(tile.kv_heads * head_rows_),
        key_stride_((layer_.key_dim + kPadFloats - 1) / kPadFloats * kPadFloats),
        o_stride_((layer_.value_dim + kPadFloats - 1) / kPadFloats * kPadFloats),
        partial_floats_(rows_ * o_stride_ + (2 * rows_ + kPadFloats - 1) / kPadFloats * kPadFloats),
        scores_(scratch),
        q_(scores_ + int64_t{kTileRows} * kPieceTokens),
        piece_(RowsAt(q_ + int64_t{kTileRows} * key_stride_)),
        total_(RowsAt(piece_.o + partial_floats_)),
        reader_(tile, total_.o + partial_floats_,
                key_stride_ > o_stride_ ? key_stride_ : o_stride_) {
    for (int32_t r = 0; r < head_rows_; ++r) {
      positions_[r] = tile.chunk->position + (tile.row_begin + r) / tile.group;
    }
    for (int32_t head = 0; head < tile.kv_heads; ++head) {
      for (int32_t r = 0; r < head_rows_; r += RowsOfBlock(r)) PackQueries(head, r);
    }
  }

  // A head's rows are scored in blocks of 4, and what is left in one of 2 and one of 1.
  int32_t RowsOfBlock(int32_t row) const {
    return head_rows_ - row >= kRowBlock ? kRowBlock : head_rows_ - row >= 2 ? 2 : 1;
  }

  // Where a row's token and q head are, counted from the tile's first.
  struct Place {
    int64_t token;
    int64_t q_head;
  };
  Place PlaceOf(int32_t head, int32_t row) const {
    const int32_t at = tile_.row_begin + row;
    return {at / tile_.group, head * tile_.group + at % tile_.group};
  }

  // The queries of a block of rows, in the order of keys: the block's vectors for the same numbers
  // of a key together.
  void PackQueries(int32_t head, int32_t row) {
    const int32_t count = RowsOfBlock(row);
    float* const to = q_ + (head * head_rows_ + row) * key_stride_;
    for (int32_t r = 0; r < count; ++r) {
      const Place place = PlaceOf(head, row + r);
      const float* const q =
          tile_.q + place.token * params_.q_stride + place.q_head * layer_.key_dim;
      float* const ordered = scores_;  // nothing is there yet
      if (SplitKeys()) {
        SplitRow<V>(q, ordered, layer_.key_dim);
      } else {
        StageRow<V>(DType::kF32, false, reinterpret_cast<const std::byte*>(q), ordered,
                    layer_.key_dim);
      }
      for (int32_t i = 0; i < layer_.key_dim; i += kLanes) {
        V::Store(to + i * count + r * kLanes, V::Load(ordered + i));
      }
    }
  }

  // Whether rows lie in split order (vector_math.h): what is read from bfloat16 and not rotated.
  bool SplitKeys() const { return SplitValues() && params_.rotation.cos_sin == nullptr; }
  bool SplitValues() const { return layer_.dtype == DType::kBf16; }

  Rows RowsAt(float* base) const {
    float* const m = base + rows_ * o_stride_;
    return {base, m, m + rows_};
  }
  Rows PartialOf(int32_t piece) const {
    return RowsAt(tile_.partials + (piece - tile_.piece_begin) * partial_floats_);
  }

  void Clear(Rows rows) const {
    for (int32_t r = 0; r < rows_; ++r) rows.m[r] = -HUGE_VALF;
  }

  // --- 1. keys -----------------------------------------------------------------------------------

  // Scores of a head's rows for one tile, -infinity where a row does not see a token.
  void ScoreTile(const TileRead& read, int32_t tile, int32_t first_row) {
    if (read.seen != 0) {
      switch (PrepareKeys(read)) {
        case DType::kF32:
          ScoresAs<DType::kF32>(tile, first_row);
          break;
        case DType::kF16:
          ScoresAs<DType::kF16>(tile, first_row);
          break;
        case DType::kBf16:
          ScoresAs<DType::kBf16>(tile, first_row);
          break;
        case DType::kF8E4M3:
        case DType::kI8:
          break;  // PrepareKeys stages them
      }
    }
    for (int32_t r = 0; r < head_rows_; ++r) Hide(~visible_[tile][r], first_row + r, tile);
  }

  // What keys are read as: for the few rows of a decode step they are converted as they are loaded,
  // for many once, in the reader.
  DType PrepareKeys(const TileRead& read) {
    if (params_.rotation.cos_sin != nullptr) {
      reader_.Rotate(read);
      return DType::kF32;
    }
    if (Direct() && layer_.key_dim % (2 * kLanes) == 0) return layer_.dtype;
    reader_.Stage(read, layer_.key_dim, SplitKeys());
    return DType::kF32;
  }

  // Whether numbers are converted as they are loaded, for every block of rows anew, or once for all
  // rows, in the reader, as codes always are.
  bool Direct() const {
    if (layer_.dtype == DType::kF32) return true;
    return !reader_.quantised() && head_rows_ <= V::DirectRows(layer_.dtype);
  }

  template <DType D>
  void ScoresAs(int32_t tile, int32_t first_row) {
    const uint32_t* const visible = visible_[tile];
    for (int32_t row = 0; row < head_rows_;) {
      const int32_t count = RowsOfBlock(row);
      uint32_t any = 0;
      for (int32_t r = row; r < row + count; ++r) any |= visible[r];
      if (any != 0) {
        if (row == 0) {
          ScoresOfBlock<D, true>(first_row, count, tile);
        } else {
          ScoresOfBlock<D, false>(first_row + row, count, tile);
        }
      }
      row += count;
    }
  }

  template <DType D, bool kFetch>
  void ScoresOfBlock(int32_t row, int32_t count, int32_t tile) {
    if (count == 4) Scores<D, 4, kFetch>(row, tile);
    if (count == 2) Scores<D, 2, kFetch>(row, tile);
    if (count == 1) Scores<D, 1, kFetch>(row, tile);
  }

  // Scores of R rows: kLanes sums at a time, each in a register of its own, and their lanes
  // are summed together.
  template <DType D, int R, bool kFetch>
  [[gnu::noinline]] void Scores(int32_t row, int32_t tile) {
    const std::byte* const* const rows = reader_.rows();
    constexpr int kTokens = kLanes / R;
    constexpr int kVecs = D == DType::kF32 ? 1 : 2;  // of a key at a time
    const float* const queries = q_ + int64_t{row} * key_stride_;
    float* const to = ScoresOf(row) + tile * kTileTokens;
    const F scale = V::Set(params_.scale);
    const int32_t key_dim = layer_.key_dim;
    for (int32_t token = 0; token < kTileTokens; token += kTokens) {
      for (int32_t t = 0; kFetch && D == DType::kF32 && t < kTokens; ++t) {
        reader_.FetchRow(token + t);
      }
      F sum[kLanes];  // [R][kTokens]
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) sum[i] = V::Zero();
      const float* q = queries;
      for (int32_t dim = 0; dim < key_dim; dim += kVecs * kLanes, q += kVecs * R * kLanes) {
#pragma GCC unroll 2
        for (int n = 0; n < kVecs; ++n) {
          F query[R];
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) query[r] = V::Load(q + (n * R + r) * kLanes);
#pragma GCC unroll 16
          for (int t = 0; t < kTokens; ++t) {
            const F key = LoadVec<V, D, kVecs>(rows[token + t] + dim * kBytes<D>, n);
            if (kFetch && D != DType::kF32 && n == 0) reader_.FetchLine(token + t, dim * kBytes<D>);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
              sum[r * kTokens + t] = V::Fma(query[r], key, sum[r * kTokens + t]);
            }
          }
        }
      }
      float scores[kLanes];
      V::Store(scores, V::Mul(V::SumsOf(sum), scale));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        std::memcpy(to + r * kPieceTokens + token, scores + r * kTokens, sizeof(float) * kTokens);
      }
    }
  }

  float* ScoresOf(int32_t row) const { return scores_ + int64_t{row} * kPieceTokens; }

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

  void Values(const TileRead& read, int32_t tile, int32_t first_row, Rows to) {
    // As with keys.
    if (!Direct()) {
      reader_.Stage(read, layer_.value_dim, SplitValues());
      return ValuesAs<DType::kF32>(tile, first_row, to);
    }
    switch (layer_.dtype) {
      case DType::kF32:
        return ValuesAs<DType::kF32>(tile, first_row, to);
      case DType::kF16:
        return ValuesAs<DType::kF16>(tile, first_row, to);
      case DType::kBf16:
        return ValuesAs<DType::kBf16>(tile, first_row, to);
      case DType::kF8E4M3:
      case DType::kI8:
        return;  // not Direct
    }
  }

  template <DType D>
  void ValuesAs(int32_t tile, int32_t first_row, Rows to) {
    const uint32_t* const visible = visible_[tile];
    int32_t row = 0;
    for (; row + kRowBlock <= head_rows_; row += kRowBlock) {
      bool same = true;
      for (int r = 1; r < kRowBlock; ++r) same = same && visible[row + r] == visible[row];
      if (same) {
        ValuesOfRuns<D, kRowBlock>(row, first_row, tile, to);
      } else {
        for (int r = 0; r < kRowBlock; ++r) ValuesOfRuns<D, 1>(row + r, first_row, tile, to);
      }
    }
    for (; row < head_rows_; ++row) ValuesOfRuns<D, 1>(row, first_row, tile, to);
  }

  // R rows that see the same tokens: each run of these in turn.
  template <DType D, int R>
  void ValuesOfRuns(int32_t row, int32_t first_row, int32_t tile, Rows to) {
    const int32_t most = head_rows_ <= 2 * kRowBlock ? kValueTokens : kTileTokens;
    uint32_t left = visible_[tile][row];
    while (left != 0) {
      const int32_t begin = __builtin_ctz(left);
      const uint32_t beyond = ~(left >> begin);
      const int32_t length = beyond == 0 ? kTileTokens - begin : __builtin_ctz(beyond);
      const int32_t end = begin + (length < most ? length : most);
      const Run run{reader_.rows(),
                    begin,
                    end,
                    ScoresOf(first_row + row) + tile * kTileTokens,
                    to.o + int64_t{first_row + row} * o_stride_,
                    row == 0};
      int32_t dim = 0;
      for (; dim + V::kValueVecs * kLanes <= layer_.value_dim; dim += V::kValueVecs * kLanes) {
        Weigh<D, R, V::kValueVecs>(run, dim);
      }
      for (; dim + 2 * kLanes <= layer_.value_dim; dim += 2 * kLanes) Weigh<D, R, 2>(run, dim);
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
    bool first;            // of the tile's rows: to fetch the next tile
  };

  // o[r][dim ...] += weight[r][t] * value[t][dim ...] for N vectors of numbers and R rows.
  template <DType D, int R, int N>
  void Weigh(const Run& run, int32_t dim) {
    F sum[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] = V::Load(run.o + r * o_stride_ + dim + n * kLanes);
    }
    for (int32_t t = run.begin; t < run.end; ++t) {
      if (D != DType::kF32) {
        for (int n = 0; run.first && n < N * kLanes * kBytes<D>; n += 64) {
          reader_.FetchLine(t, dim * kBytes<D> + n);
        }
      } else if (run.first && dim == 0) {
        reader_.FetchRow(t);
      }
      const std::byte* const from = run.rows[t] + dim * kBytes<D>;
      F value[N];
      if constexpr (N == 1) {
        value[0] = LoadSome<V, D>(from, layer_.value_dim - dim);
      } else {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) value[n] = LoadVec<V, D, N>(from, n);
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
      for (int32_t r = 0; r < head_rows_; ++r) {
        visible_[tile][r] = reader_.Visible(positions_[r], start + tile * kTileTokens);
        seen[tile] |= visible_[tile][r];
      }
      if (seen[tile] != 0) tiles = tile + 1;
    }
    const auto read = [&](int32_t tile, int32_t head, bool value) -> TileRead {
      // Past the heads the next tile; past the keys values; past these most likely the next piece.
      tile += head / tile_.kv_heads;
      head %= tile_.kv_heads;
      if (value && tile == tiles) return FirstRead(piece + 1);
      const int32_t at = tile % tiles;
      return {start + at * kTileTokens, seen[at], tile_.kv_head + head, value || tile == tiles};
    };
    for (int32_t tile = 0; tile < tiles; ++tile) {
      for (int32_t head = 0; head < tile_.kv_heads; ++head) {
        if (seen[tile] != 0) reader_.Turn(read(tile, head, false), read(tile, head + 1, false));
        ScoreTile(read(tile, head, false), tile, head * head_rows_);
      }
    }
    for (int32_t r = 0; r < rows_; ++r) Softmax(r, tiles, to);
    std::memset(to.o, 0, sizeof(float) * rows_ * o_stride_);
    for (int32_t tile = 0; tile < tiles; ++tile) {
      if (seen[tile] == 0) continue;
      for (int32_t head = 0; head < tile_.kv_heads; ++head) {
        reader_.Turn(read(tile, head, true), read(tile, head + 1, true));
        Values(read(tile, head, true), tile, head * head_rows_, to);
      }
    }
  }

  // The first keys of a piece, as far as the first row sees them; nothing beyond the last piece.
  TileRead FirstRead(int32_t piece) const {
    const int64_t token = int64_t{piece} * kPieceTokens;
    const bool none = piece == tile_.piece_end;
    return {token, none ? 0 : reader_.Visible(positions_[0], token), tile_.kv_head, false};
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
      const Place place = PlaceOf(r / head_rows_, r % head_rows_);
      const bool empty = rows.m[r] == -HUGE_VALF;
      float* const out =
          tile_.out + place.token * params_.out_stride + place.q_head * layer_.value_dim;
      const F sum = V::Set(rows.l[r]);
      float* const o = rows.o + int64_t{r} * o_stride_;
      for (int32_t i = 0; i < o_stride_; i += kLanes) {
        V::Store(o + i, empty ? V::Zero() : V::Div(V::Load(o + i), sum));
      }
      if (SplitValues()) {
        JoinRow<V>(o, out, layer_.value_dim);
      } else {
        std::memcpy(out, o, sizeof(float) * layer_.value_dim);
      }
      if (tile_.lse != nullptr) {
        tile_.lse[place.token * params_.q_heads + place.q_head] =
            empty ? -HUGE_VALF : rows.m[r] + logf(rows.l[r]);
      }
    }
  }

  const AttendTile& tile_;
  const AttentionParams& params_;
  const KvLayer& layer_;
  const int32_t head_rows_;  // of a kv head
  const int32_t rows_;       // of all kv heads, the first one's first
  const int64_t key_stride_;
  const int64_t o_stride_;
  const int64_t partial_floats_;  // PartialFloats(rows_, value_dim)
  // Scratch, in this order; after it the reader's.
  float* const scores_;  // [kTileRows][kPieceTokens]; weights after the softmax
  float* const q_;       // [kTileRows][key_stride_], in the order of keys
  const Rows piece_;
  const Rows total_;
  TileReader<V> reader_;
  int32_t positions_[kTileRows];
  uint32_t visible_[kPieceTiles][kTileRows];
};

}  // namespace larder::kernels
