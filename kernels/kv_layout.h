// Where keys and values lie inside a block.
//
//   heads    [layer][K or V][kv_head][token][head_dim]
//   latent   [layer][token][latent | rope]                   (MLA)
//
// Every kernel sees one layer of a block through a KvLayer: offsets from the block's first byte
// and strides. The latent form is the same thing to a kernel: one kv head whose keys are whole
// rows and whose values are the first `latent_dim` numbers of the same rows.
//
// Thread safety: values.
#pragma once

#include <cstddef>
#include <cstdint>

namespace larder::kernels {

// What a number in a block is stored as.
enum class DType : uint8_t { kF32 = 0, kF16 = 1, kBf16 = 2 };

constexpr int32_t BytesOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

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

constexpr int64_t BlockBytes(const HeadGeometry& g) {
  return int64_t{2} * g.layers * g.kv_heads * g.block_tokens * g.head_dim * BytesOf(g.dtype);
}
constexpr int64_t BlockBytes(const LatentGeometry& g) {
  return int64_t{g.layers} * g.block_tokens * (g.latent_dim + g.rope_dim) * BytesOf(g.dtype);
}

// `layer` counts from 0 and is less than g.layers.
constexpr KvLayer LayerOf(const HeadGeometry& g, int32_t layer) {
  const int64_t token = int64_t{g.head_dim} * BytesOf(g.dtype);
  const int64_t head = token * g.block_tokens;
  const int64_t keys = head * g.kv_heads;
  return {.dtype = g.dtype,
          .kv_heads = g.kv_heads,
          .key_dim = g.head_dim,
          .value_dim = g.head_dim,
          .block_tokens = g.block_tokens,
          .key_offset_bytes = 2 * keys * layer,
          .value_offset_bytes = 2 * keys * layer + keys,
          .head_stride_bytes = head,
          .token_stride_bytes = token,
          .latent = false};
}
constexpr KvLayer LayerOf(const LatentGeometry& g, int32_t layer) {
  const int64_t token = int64_t{g.latent_dim + g.rope_dim} * BytesOf(g.dtype);
  const int64_t offset = token * g.block_tokens * layer;
  return {.dtype = g.dtype,
          .kv_heads = 1,
          .key_dim = g.latent_dim + g.rope_dim,
          .value_dim = g.latent_dim,
          .block_tokens = g.block_tokens,
          .key_offset_bytes = offset,
          .value_offset_bytes = offset,
          .head_stride_bytes = token * g.block_tokens,
          .token_stride_bytes = token,
          .latent = true};
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
