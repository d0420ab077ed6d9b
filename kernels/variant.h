// The inner kernels, compiled once an instruction set: what attention.cc, ops.cc, rope.cc and
// blocks.cc hand rows and tiles to. Internal to kernels/.
//
// Thread safety: constant tables of pure functions.
//
// 1. variant_*.cc are the only files with instruction set flags. They define no function with
//    external linkage but their table, and call none that a header defines: the linker keeps one
//    copy of such a function for the whole program, and it might be theirs
//    (tests/kernels/check_linkage.sh).
// 2. What a row becomes depends on that row's arguments only, not on the rows beside it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cpu.h"
#include "kernels/kv_layout.h"
#include "kernels/ops.h"
#include "kernels/rope.h"

namespace larder::kernels {

// Keys are packed and scored this many at a time; a bit each in a mask.
inline constexpr int32_t kTileTokens = 32;
inline constexpr int32_t kPieceTiles = kPieceTokens / kTileTokens;
// Rows (a token and a q head) that share a tile's conversion: 64 rows of scores are 64 KiB, which
// with keys and results stays in a level 2 cache of 1 MiB for every usual geometry.
inline constexpr int32_t kTileRows = 64;

// Value dims are padded to this in scratch, so that whole vectors can be used.
inline constexpr int32_t kPadFloats = 16;
constexpr int64_t Padded(int64_t floats) {
  return (floats + kPadFloats - 1) / kPadFloats * kPadFloats;
}

// Rows [row_begin, row_end) of one chunk and of each of kv_heads kv heads, over pieces
// [piece_begin, piece_end). A kv head's rows are the pairs (token, q head of the group), a token's
// heads together.
struct AttendTile {
  const AttentionParams* params = nullptr;
  const SequenceChunk* chunk = nullptr;
  const float* q = nullptr;  // first token's first head of the first group, strides as in params
  float* out = nullptr;      // likewise
  float* lse = nullptr;      // likewise, [tokens][q_heads]; null: not wanted
  int32_t kv_head = 0;       // the first
  int32_t kv_heads = 1;
  int32_t group = 0;  // q heads a kv head
  int32_t row_begin = 0;
  int32_t row_end = 0;  // times kv_heads at most kTileRows more
  int32_t piece_begin = 0;
  int32_t piece_end = 0;
  float* partials = nullptr;  // [piece_end - piece_begin][PartialFloats()]: a piece's results,
                              // written by attend_pieces and read by merge_pieces
};

// A piece's result for `rows` rows: weighted values [rows][padded dim], maximum [rows], sum [rows].
constexpr int64_t PartialFloats(int64_t rows, int64_t value_dim) {
  return rows * Padded(value_dim) + Padded(2 * rows);
}

// Floats of scratch for one thread.
constexpr int64_t ScratchFloats(int64_t key_dim, int64_t value_dim) {
  const int64_t row = Padded(key_dim > value_dim ? key_dim : value_dim);
  return kTileRows * (kPieceTokens + Padded(key_dim)) + kTileTokens * row +
         2 * PartialFloats(kTileRows, value_dim);
}

struct Variant {
  // Each piece for itself, into tile.partials.
  void (*attend_pieces)(const AttendTile& tile, float* scratch);
  // All pieces from left to right, into out and lse.
  void (*merge_pieces)(const AttendTile& tile, float* scratch);
  // Both at once, without partials.
  void (*attend_whole)(const AttendTile& tile, float* scratch);

  void (*merge_row)(const MergeParams& params, int64_t row);
  void (*rms_norm_row)(const RmsNormParams& params, int64_t row);
  void (*silu_mul_row)(const SiluMulParams& params, int64_t row);
  void (*rope_row)(const RopeParams& params, int64_t row);
  // `count` floats to storage, rounded to nearest even.
  void (*store_row)(DType dtype, const float* from, std::byte* to, int32_t count);
};

// CHECK: the variant is in this build and IsSupported.
const Variant& VariantOf(Isa isa);

}  // namespace larder::kernels
