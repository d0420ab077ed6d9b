// Shares a decode step out over a GPU: which thread block reads which keys.
//
//   row            one query token: one entry of the batch, all its q heads
//   piece          [begin, end) of the keys of one row and one kv head: one thread block's work
//   group          the pieces of one row and kv head when there are several; their results are
//                  merged, in the order of their keys, by the block that ends last
//
// A plan depends on lengths only, so one plan serves all layers of a step.
//
// Thread safety: pure functions of the host; no CUDA.
//
// 1. Each visible key of each row and kv head is in exactly one piece; a row that sees no key has
//    one empty piece a kv head, so that its result is written.
// 2. Pieces begin and end at multiples of piece_tokens counted from position 0, but for the first
//    and last key that is visible. With the same piece_tokens a row's pieces, and so its bits, do
//    not depend on the batch around it; the choice of piece_tokens, unless given, does.
// 3. The longest pieces come first: blocks start in this order, so the last to end is at most one
//    piece later than the average.
// 4. A group has at most kGroupPiecesMax pieces: a row that sees more than kGroupPiecesMax - 4
//    times piece_tokens has longer ones, multiples of 64, by its own number of keys.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace larder::kernels::cuda {

inline constexpr int32_t kGroupPiecesMax = 64;
inline constexpr int32_t kPieceTokensMin = 128;
// What a block costs besides its keys, in keys: it fills its pipeline (some 2 us at 35 keys of 512
// bytes a us) and writes a result that is read again.
inline constexpr int32_t kPieceCostTokens = 96;

struct DecodeRow {
  int32_t chunk = 0;     // index of the sequence in the batch's chunks
  int32_t row = 0;       // row of q and out
  int32_t position = 0;  // sees keys up to this one
};

struct alignas(16) DecodePiece {  // two loads
  int32_t chunk = 0;
  int32_t row = 0;  // below 0: nobody's, see DevicePlan
  int32_t position = 0;
  int32_t kv_head = 0;
  int32_t begin = 0;
  int32_t end = 0;
  int32_t group = -1;  // index in groups; -1: the only piece
  int32_t slot = -1;   // place of its partial result in the workspace; -1: the only piece
};

struct DecodeGroup {
  int32_t slot_begin = 0;  // slots in the order of keys
  int32_t slot_count = 0;
};

struct DecodePlanOptions {
  int32_t kv_heads = 0;
  int32_t window = 0;  // as in AttentionParams
  int32_t sinks = 0;
  int32_t key_begin = 0;
  int32_t key_end = std::numeric_limits<int32_t>::max();
  int32_t blocks_at_once = 0;  // pieces that the GPU works on at a time, see DecodeBlocksAtOnce
  int32_t piece_tokens = 0;    // a multiple of 64; 0: chosen. See rule 4
};

struct DecodePlan {
  std::vector<DecodePiece> pieces;
  std::vector<DecodeGroup> groups;
  int32_t slots = 0;         // of all groups
  int32_t piece_tokens = 0;  // as given or chosen; see rule 4
};

DecodePlan PlanDecode(std::span<const DecodeRow> rows, const DecodePlanOptions& options);

}  // namespace larder::kernels::cuda
