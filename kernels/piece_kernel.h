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
// widened (vector_math.h, split order). What of that is not multiplying runs beside it. Of one-byte
// storage codes are multiplied; a key's scale is multiplied into its scores, a value's into its
// weights.
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

#include "kernels/softmax.h"
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
        unit_(layer_.dtype == DType::kF8E4M3 ? kE4m3Unit : 1),
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
      SplitRow<V>(Rotates() ? DType::kF32 : layer_.dtype, q, ordered, layer_.key_dim);
      for (int32_t i = 0; i < layer_.key_dim; i += kLanes) {
        V::Store(to + i * count + r * kLanes, V::Load(ordered + i));
      }
    }
  }

  // Keys that are rotated are in their own order, all others in their storage type's
  // (vector_math.h, split order).
  bool Rotates() const { return params_.rotation.cos_sin != nullptr; }

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

  // Scores of a head's rows for one tile, of codes before their scales.
  void ScoreTile(const TileRead& read, int32_t tile, int32_t first_row) {
    switch (PrepareKeys(read)) {
      case DType::kF32:
        return ScoresAs<DType::kF32>(tile, first_row);
      case DType::kF16:
        return ScoresAs<DType::kF16>(tile, first_row);
      case DType::kBf16:
        return ScoresAs<DType::kBf16>(tile, first_row);
      case DType::kF8E4M3:
        return ScoresAs<DType::kF8E4M3>(tile, first_row);
      case DType::kI8:
        return ScoresAs<DType::kI8>(tile, first_row);
    }
  }

  // What keys are read as: for the few rows of a decode step they are converted as they are loaded,
  // for many once, in the reader.
  DType PrepareKeys(const TileRead& read) {
    if (Rotates()) {
      reader_.Rotate(read);
      return DType::kF32;
    }
    if (Direct() && layer_.key_dim % kLanes == 0) return layer_.dtype;
    reader_.Stage(read, layer_.key_dim, true);
    return DType::kF32;
  }

  // Whether numbers are converted as they are loaded, for every block of rows anew, or once for all
  // rows, in the reader.
  bool Direct() const {
    return layer_.dtype == DType::kF32 || head_rows_ <= V::DirectRows(layer_.dtype);
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
    constexpr int kTokens = kLanes / R;
    // Of a key at a time; of codes a run of split order.
    constexpr int kVecs = D == DType::kF32 ? 1 : kBytes<D> == 1 ? V::kValueVecs : 2;
    const float* const queries = q_ + int64_t{row} * key_stride_;
    float* const to = ScoresOf(row) + tile * kTileTokens;
    const F scale = V::Set(params_.scale * unit_);
    const int32_t key_dim = layer_.key_dim;
    for (int32_t token = 0; token < kTileTokens; token += kTokens) {
      for (int32_t t = 0; kFetch && D == DType::kF32 && t < kTokens; ++t) {
        reader_.FetchRow(token + t);
      }
      F sum[kLanes];  // [R][kTokens]
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) sum[i] = V::Zero();
      int32_t dim = 0;
      for (; dim + kVecs * kLanes <= key_dim; dim += kVecs * kLanes) {
        Products<D, R, kVecs, kFetch>(queries + dim * R, token, dim, sum);
      }
      for (; dim < key_dim; dim += kLanes) {
        Products<D, R, 1, kFetch>(queries + dim * R, token, dim, sum);
      }
      float scores[kLanes];
      V::Store(scores, V::Mul(V::SumsOf(sum), scale));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        std::memcpy(to + r * kPieceTokens + token, scores + r * kTokens, sizeof(float) * kTokens);
      }
    }
  }

  // Adds the products of kVecs vectors of a group's keys, from `dim` on, and R rows' queries there.
  template <DType D, int R, int kVecs, bool kFetch>
  [[gnu::always_inline]] void Products(const float* q, int32_t token, int32_t dim,
                                       F (&sum)[kLanes]) const {
    constexpr int kTokens = kLanes / R;
    const std::byte* const* const rows = reader_.rows() + token;
    const int32_t offset_bytes = dim * kBytes<D>;
    const bool fetch = kFetch && D != DType::kF32 && offset_bytes % kLineBytes == 0;
    if constexpr (D == DType::kF8E4M3 && kVecs == V::kValueVecs) {
      // Codes come a run at a time, and the queries from memory: for both there are no registers.
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        F key[kVecs];
        LoadVecs<V, D>(rows[t] + offset_bytes, key);
        if (fetch) reader_.FetchLine(token + t, offset_bytes);
        asm("" : "+r"(q));  // GCC would keep queries, and sums in memory instead
#pragma GCC unroll 4
        for (int n = 0; n < kVecs; ++n) {
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const F query = V::Load(q + (n * R + r) * kLanes);
            sum[r * kTokens + t] = V::Fma(query, key[n], sum[r * kTokens + t]);
          }
        }
      }
      return;
    }
#pragma GCC unroll 4
    for (int n = 0; n < kVecs; ++n) {
      F query[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) query[r] = V::Load(q + (n * R + r) * kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const F key = LoadVec<V, D, kVecs>(rows[t] + offset_bytes, n);
        if (fetch && n == 0) reader_.FetchLine(token + t, offset_bytes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          sum[r * kTokens + t] = V::Fma(query[r], key, sum[r * kTokens + t]);
        }
      }
    }
  }

  float* ScoresOf(int32_t row) const { return scores_ + int64_t{row} * kPieceTokens; }

  // --- 2. softmax --------------------------------------------------------------------------------

  // Weights of a head's rows for the piece that starts at `start`. A key's scale is multiplied into
  // its scores, a value's into its weights once these are summed.
  void Weights(int64_t start, int32_t head, int32_t tiles, const uint32_t* seen, Rows to) {
    alignas(64) float key_scales[kPieceTokens];
    alignas(64) float value_scales[kPieceTokens];
    if (reader_.quantised()) {
      reader_.Scales({start, 0, tile_.kv_head + head, false}, tiles, seen, key_scales);
      reader_.Scales({start, 0, tile_.kv_head + head, true}, tiles, seen, value_scales);
    }
    for (int32_t r = 0; r < head_rows_; ++r) {
      const int32_t row = head * head_rows_ + r;
      float* const scores = ScoresOf(row);
      const int32_t tokens = tiles * kTileTokens;
      if (reader_.quantised()) MultiplyRow<V>(scores, key_scales, tokens, -HUGE_VALF);
      for (int32_t tile = 0; tile < tiles; ++tile) {
        Hide<V>(scores + tile * kTileTokens, ~visible_[tile][r]);
      }
      Softmax<V>(scores, tokens, to.m[row], to.l[row]);
      if (reader_.quantised()) MultiplyRow<V>(scores, value_scales, tokens, kWeightMin);
    }
  }

  // --- 3. values ---------------------------------------------------------------------------------

  void Values(const TileRead& read, int32_t tile, int32_t first_row, Rows to) {
    // As with keys.
    if (!Direct()) {
      reader_.Stage(read, layer_.value_dim, true);
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
        return ValuesAs<DType::kF8E4M3>(tile, first_row, to);
      case DType::kI8:
        return ValuesAs<DType::kI8>(tile, first_row, to);
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
    const int32_t offset_bytes = dim * kBytes<D>;
    const bool fetch = run.first && offset_bytes % kLineBytes == 0;
    F sum[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] = V::Load(run.o + r * o_stride_ + dim + n * kLanes);
    }
    for (int32_t t = run.begin; t < run.end; ++t) {
      if (D != DType::kF32) {
        for (int n = 0; fetch && n < N * kLanes * kBytes<D>; n += kLineBytes) {
          reader_.FetchLine(t, offset_bytes + n);
        }
      } else if (run.first && dim == 0) {
        reader_.FetchRow(t);
      }
      const std::byte* const from = run.rows[t] + offset_bytes;
      F value[N];
      if constexpr (N == 1) {
        value[0] = LoadSome<V, D>(from, layer_.value_dim - dim);
      } else {
        LoadVecs<V, D>(from, value);
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
        if (seen[tile] == 0) continue;
        reader_.Turn(read(tile, head, false), read(tile, head + 1, false));
        ScoreTile(read(tile, head, false), tile, head * head_rows_);
      }
    }
    for (int32_t head = 0; head < tile_.kv_heads; ++head) Weights(start, head, tiles, seen, to);
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
      const F sum = V::Set(rows.l[r] / unit_);
      float* const o = rows.o + int64_t{r} * o_stride_;
      for (int32_t i = 0; i < o_stride_; i += kLanes) {
        V::Store(o + i, empty ? V::Zero() : V::Div(V::Load(o + i), sum));
      }
      JoinRow<V>(layer_.dtype, o, out, layer_.value_dim);
      if (tile_.lse != nullptr) {
        tile_.lse[place.token * params_.q_heads + place.q_head] =
            empty ? -HUGE_VALF : rows.m[r] + logf(rows.l[r]);
      }
    }
  }

  const AttendTile& tile_;
  const AttentionParams& params_;
  const KvLayer& layer_;
  const float unit_;         // of what is loaded
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
