// Attention of a batch of tokens over K/V in blocks: decode and prefill, MHA to MQA, and MLA.
//
//   score(r, t) = scale * q[r] . k[t]
//   out[r]      = sum over visible t of exp(score(r, t) - lse[r]) v[t]
//   lse[r]      = log of the sum over visible t of exp(score(r, t))
//
// A token at position p sees the keys t <= p (its own included, so Append comes before Attend),
// and of those, with a window, only t < sinks and t > p - window.
//
// Thread safety: calls share nothing but what they are given.
//
// 1. Batch invariance. A row's out and lse are bitwise the same whether its token is decoded alone
//    or prefilled in a chunk of any length, in any batch, with any number of threads, any block
//    size and any placement of blocks. Keys are taken in pieces of kPieceTokens, counted from
//    position 0; inside a piece sums run in a fixed order; pieces are merged from left to right.
//    A cached prefix therefore changes nothing in what a model generates.
// 2. Nothing past a row's last visible key is read for it, no masked token contributes (not even
//    a NaN), and nothing but the keys and values of visible tokens enters a result.
// 3. Products and sums are float32; storage is converted exactly. Codes are multiplied as they are:
//    a key's scale is multiplied into its score, a value's into its weight, which is taken for zero
//    if it is below 2^-86 of the greatest of its piece.
// 4. Nothing is allocated; scratch comes from `workspace`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "kernels/cpu.h"
#include "kernels/kv_layout.h"

namespace larder::kernels {

// The unit of splitting and of summation; results depend on it.
inline constexpr int32_t kPieceTokens = 256;

// Keys that are stored as they were before RoPE and are rotated when they are read, each at its
// index in the block table: what StreamingLLM (Xiao et al. 2023, section 3.2) needs after blocks
// have been taken out of the middle of a table. Queries come rotated at their index, too.
struct KeyRotation {
  const float* cos_sin = nullptr;  // [tokens in the longest table][2][dim / 2], see RopeAngles;
                                   // null: keys are used as they are stored
  int32_t begin = 0;               // first rotated number of a key; MLA: latent_dim
  int32_t dim = 0;                 // rotated numbers, even; MLA: rope_dim
};

struct AttentionParams {
  KvLayer layer;
  int32_t q_heads =
      0;            // a multiple of layer.kv_heads; head h reads kv head h / (q_heads / kv_heads)
  float scale = 0;  // usually 1 / sqrt(head_dim); MLA: of the head before absorption
  int32_t window = 0;  // last keys that are visible, the token's own among them; 0: all
  int32_t sinks = 0;   // first keys that are visible besides; without a window of no effect

  const float* q = nullptr;  // [rows][q_heads][layer.key_dim]. MLA, absorbed: [latent | rope]
  int64_t q_stride = 0;      // floats from a row to the next
  float* out = nullptr;      // [rows][q_heads][layer.value_dim], written
  int64_t out_stride = 0;    // floats from a row to the next
  float* lse = nullptr;      // [rows][q_heads], written; null: not wanted

  // Only keys in [key_begin, key_end) are attended to, for results that are merged later
  // (MergeAttention). A row that sees none of them gets out 0 and lse -infinity.
  int32_t key_begin = 0;
  int32_t key_end = std::numeric_limits<int32_t>::max();

  KeyRotation rotation;
  std::span<const SequenceChunk> chunks;  // rows: the sum of their tokens
};

// What Attend needs as workspace for this call. Grows with threads and head dims; for few rows
// over long tables also with rows and keys, up to 64 MiB.
size_t AttentionWorkspaceBytes(const Cpu& cpu, const AttentionParams& params);

// Decode, prefill or both. `workspace`: AttentionWorkspaceBytes or more, aligned to 64 bytes;
// its contents do not matter and do not survive.
void Attend(const Cpu& cpu, const AttentionParams& params, std::span<std::byte> workspace);

// Results over disjoint sets of keys, merged into the result over their union:
//   lse = log sum_i exp(lse_i);  out = sum_i exp(lse_i - lse) out_i
// (FlashInfer, Ye et al. 2025, section 2.2). Merged from part 0 on; where all lse_i are -infinity,
// out is 0 and lse -infinity.
struct MergeParams {
  int32_t parts = 0;                   // >= 1
  int64_t rows = 0;                    // tokens times q heads
  int32_t dim = 0;                     // numbers in a value
  const float* const* outs = nullptr;  // [parts] of [rows][dim]
  const float* const* lses = nullptr;  // [parts] of [rows]
  float* out = nullptr;                // [rows][dim], written; may be outs[0]
  float* lse = nullptr;                // [rows], written; may be lses[0]; null: not wanted
};
void MergeAttention(const Cpu& cpu, const MergeParams& params);

}  // namespace larder::kernels
