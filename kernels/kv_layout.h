// Where keys and values lie inside a block.
//
//   heads    [layer][K or V][kv_head][token][head_dim]
//            [layer][K or V][kv_head][token]                 scales, of one-byte numbers only
//   latent   [layer][token][latent | rope]                   (MLA)
//            [layer][token]                                  scales, likewise
//
// Every kernel sees one layer of a block through a KvLayer: offsets from the block's first byte
// and strides. The latent form is the same thing to a kernel: one kv head whose keys are whole
// rows and whose values are the first `latent_dim` numbers of the same rows.
//
// One-byte numbers are codes: a key is its codes times its scale, a float32 of its own, and so is
// a value (quantise.h). Scales lie behind all layers' numbers, so that rows of numbers keep their
// alignment and a kv head's tokens have theirs in one line. A latent row has one scale, as key and
// as value.
//
// Thread safety: values.
#pragma once

#include <cstddef>
#include <cstdint>

namespace larder::kernels {

// What a number in a block is stored as.
enum class DType : uint8_t { kF32 = 0, kF16 = 1, kBf16 = 2, kF8E4M3 = 3, kI8 = 4 };

// Whether numbers are codes that mean nothing without their row's scale.
constexpr bool IsQuantised(DType dtype) { return dtype == DType::kF8E4M3 || dtype == DType::kI8; }

constexpr int32_t BytesOf(DType dtype) {
  return dtype == DType::kF32 ? 4 : IsQuantised(dtype) ? 1 : 2;
}

inline constexpr int32_t kScaleBytes = 4;

// One layer of a block, in numbers of K or V and in bytes.
struct KvLayer {
  DType dtype = DType::kBf16;
  int32_t kv_heads = 0;
  int32_t key_dim = 0;             // numbers in a key
  int32_t value_dim = 0;           // numbers in a value
  int32_t block_tokens = 0;        // tokens in a block
  int64_t key_offset_bytes = 0;    // block's start to the first key of kv head 0
  int64_t value_offset_bytes = 0;  // block's start to the first value of kv head 0
  int64_t head_stride_bytes = 0;   // a kv head's keys to the next head's, values likewise
  int64_t token_stride_bytes = 0;  // a token's key to the next token's, values likewise
  bool latent = false;             // values are the first numbers of the keys

  // Quantised only, else 0. A token's scale lies kScaleBytes behind the one before it. Latent: the
  // two offsets are equal.
  int64_t key_scale_offset_bytes = 0;    // block's start to the first key's scale of kv head 0
  int64_t value_scale_offset_bytes = 0;  // block's start to the first value's scale of kv head 0
  int64_t head_scale_stride_bytes = 0;   // a kv head's scales to the next head's
};

// MHA, GQA and MQA: by the number of kv heads.
struct HeadGeometry {
  DType dtype = DType::kBf16;
  int32_t layers = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t block_tokens = 0;
};

// MLA: a token's latent vector and the rotated part that all heads share.
struct LatentGeometry {
  DType dtype = DType::kBf16;
  int32_t layers = 0;
  int32_t latent_dim = 0;
  int32_t rope_dim = 0;
  int32_t block_tokens = 0;
};

// Bytes of a block's numbers; scales begin there.
constexpr int64_t NumberBytes(const HeadGeometry& g) {
  return int64_t{2} * g.layers * g.kv_heads * g.block_tokens * g.head_dim * BytesOf(g.dtype);
}
constexpr int64_t NumberBytes(const LatentGeometry& g) {
  return int64_t{g.layers} * g.block_tokens * (g.latent_dim + g.rope_dim) * BytesOf(g.dtype);
}

constexpr int64_t ScaleBytes(const HeadGeometry& g) {
  if (!IsQuantised(g.dtype)) return 0;
  return int64_t{2} * g.layers * g.kv_heads * g.block_tokens * kScaleBytes;
}
constexpr int64_t ScaleBytes(const LatentGeometry& g) {
  return IsQuantised(g.dtype) ? int64_t{g.layers} * g.block_tokens * kScaleBytes : 0;
}

// What larderd calls the model's block_bytes.
constexpr int64_t BlockBytes(const HeadGeometry& g) { return NumberBytes(g) + ScaleBytes(g); }
constexpr int64_t BlockBytes(const LatentGeometry& g) { return NumberBytes(g) + ScaleBytes(g); }

// `layer` counts from 0 and is less than g.layers.
constexpr KvLayer LayerOf(const HeadGeometry& g, int32_t layer) {
  const int64_t token = int64_t{g.head_dim} * BytesOf(g.dtype);
  const int64_t head = token * g.block_tokens;
  const int64_t keys = head * g.kv_heads;
  KvLayer of{.dtype = g.dtype,
             .kv_heads = g.kv_heads,
             .key_dim = g.head_dim,
             .value_dim = g.head_dim,
             .block_tokens = g.block_tokens,
             .key_offset_bytes = 2 * keys * layer,
             .value_offset_bytes = 2 * keys * layer + keys,
             .head_stride_bytes = head,
             .token_stride_bytes = token,
             .latent = false};
  if (IsQuantised(g.dtype)) {
    of.head_scale_stride_bytes = int64_t{g.block_tokens} * kScaleBytes;
    const int64_t key_scales = of.head_scale_stride_bytes * g.kv_heads;
    of.key_scale_offset_bytes = NumberBytes(g) + 2 * key_scales * layer;
    of.value_scale_offset_bytes = of.key_scale_offset_bytes + key_scales;
  }
  return of;
}
constexpr KvLayer LayerOf(const LatentGeometry& g, int32_t layer) {
  const int64_t token = int64_t{g.latent_dim + g.rope_dim} * BytesOf(g.dtype);
  const int64_t offset = token * g.block_tokens * layer;
  KvLayer of{.dtype = g.dtype,
             .kv_heads = 1,
             .key_dim = g.latent_dim + g.rope_dim,
             .value_dim = g.latent_dim,
             .block_tokens = g.block_tokens,
             .key_offset_bytes = offset,
             .value_offset_bytes = offset,
             .head_stride_bytes = token * g.block_tokens,
             .token_stride_bytes = token,
             .latent = true};
  if (IsQuantised(g.dtype)) {
    of.head_scale_stride_bytes = int64_t{g.block_tokens} * kScaleBytes;
    of.key_scale_offset_bytes = NumberBytes(g) + of.head_scale_stride_bytes * layer;
    of.value_scale_offset_bytes = of.key_scale_offset_bytes;
  }
  return of;
}

// The tokens of one sequence that a forward pass computes: [position, position + tokens). One
// token is a decode step, more are a prefill or a part of one; a batch may hold both. The rows
// of all chunks of a batch follow each other in q, k, v and out.
struct SequenceChunk {
  std::byte* const* blocks = nullptr;  // [ceil((position + tokens) / block_tokens)] first bytes of
                                       // the sequence's blocks, in any arenas, aligned to 4 bytes.
                                       // Attend only reads; Append writes the chunk's tokens only
  int32_t position = 0;                // index of the first token in the block table
  int32_t tokens = 0;                  // >= 0
};

}  // namespace larder::kernels
