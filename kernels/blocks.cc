#include "kernels/blocks.h"

#include <algorithm>
#include <cstring>

#include "kernels/quantise.h"
#include "kernels/variant.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace larder::kernels {
namespace {

// One token of one chunk, all its kv heads.
struct TokenRow {
  const SequenceChunk& chunk;
  int32_t position;
  int64_t row;
};

// One key or value to its place, its scale to its own.
struct Place {
  std::byte* numbers;
  std::byte* scale;  // means nothing unless quantised
};
void StoreRow(const Variant& variant, DType dtype, const float* from, Place to, int32_t count) {
  if (!IsQuantised(dtype)) return variant.store_row(dtype, from, to.numbers, count);
  const float scale = QuantiseRow(dtype, from, to.numbers, count);
  std::memcpy(to.scale, &scale, kScaleBytes);
}

void AppendToken(const Variant& variant, const AppendParams& params, const TokenRow& token) {
  const KvLayer& layer = params.layer;
  std::byte* const block = token.chunk.blocks[token.position / layer.block_tokens];
  const int32_t slot = token.position % layer.block_tokens;
  for (int32_t head = 0; head < layer.kv_heads; ++head) {
    std::byte* const numbers =
        block + slot * layer.token_stride_bytes + head * layer.head_stride_bytes;
    std::byte* const scale = block + slot * kScaleBytes + head * layer.head_scale_stride_bytes;
    const float* const k = params.k + token.row * params.k_stride;
    StoreRow(variant, layer.dtype, k + int64_t{head} * layer.key_dim,
             {numbers + layer.key_offset_bytes, scale + layer.key_scale_offset_bytes},
             layer.key_dim);
    if (layer.latent) continue;
    const float* const v = params.v + token.row * params.v_stride;
    StoreRow(variant, layer.dtype, v + int64_t{head} * layer.value_dim,
             {numbers + layer.value_offset_bytes, scale + layer.value_scale_offset_bytes},
             layer.value_dim);
  }
}

constexpr int64_t kStreamFromBytes = 32 << 10;

void Copy(std::byte* to, const std::byte* from, int64_t bytes) {
#if defined(__SSE2__)
  constexpr int64_t kLine = 64;
  if (bytes >= kStreamFromBytes && reinterpret_cast<uintptr_t>(to) % kLine == 0) {
    const int64_t lines = bytes / kLine;
    auto* out = reinterpret_cast<__m128i*>(to);
    auto* in = reinterpret_cast<const __m128i*>(from);
    for (int64_t i = 0; i < lines; ++i, in += 4, out += 4) {
      for (int part = 0; part < 4; ++part) _mm_stream_si128(out + part, _mm_loadu_si128(in + part));
    }
    _mm_sfence();
    to += lines * kLine;
    from += lines * kLine;
    bytes -= lines * kLine;
  }
#endif
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

}  // namespace

void Append(const Cpu& cpu, const AppendParams& params) {
  const Variant& variant = VariantOf(cpu.isa);
  int64_t first_row = 0;
  for (const SequenceChunk& chunk : params.chunks) {
    cpu.pool.ParallelFor(chunk.tokens, [&](int64_t i, int) {
      AppendToken(variant, params,
                  {chunk, chunk.position + static_cast<int32_t>(i), first_row + i});
    });
    first_row += chunk.tokens;
  }
}

void CopyBlocks(const Cpu& cpu, std::span<const BlockCopy> copies, int64_t block_bytes) {
  // One thread does not use up what the memory can do, so large blocks are cut.
  constexpr int64_t kPartBytes = 256 << 10;
  const int64_t parts = (block_bytes + kPartBytes - 1) / kPartBytes;
  cpu.pool.ParallelFor(static_cast<int64_t>(copies.size()) * parts, [&](int64_t i, int) {
    const BlockCopy& copy = copies[i / parts];
    const int64_t begin = i % parts * kPartBytes;
    Copy(copy.to + begin, copy.from + begin, std::min(kPartBytes, block_bytes - begin));
  });
}

}  // namespace larder::kernels
