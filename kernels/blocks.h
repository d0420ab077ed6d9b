// Writing into blocks: new keys and values, and whole copies.
//
// Thread safety: calls share nothing but what they are given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/cpu.h"
#include "kernels/kv_layout.h"

namespace larder::kernels {

// Stores the keys and values of a batch at their tokens' places in one layer. float32 is rounded
// to nearest, ties to even; too large for float16 becomes infinity; a NaN stays one. One-byte
// storage: each key and value is quantised by itself (quantise.h), its scale stored with it.
struct AppendParams {
  KvLayer layer;
  const float* k = nullptr;  // [rows][kv_heads][key_dim]; latent: [rows][latent | rope]
  int64_t k_stride = 0;      // floats from a row to the next
  const float* v = nullptr;  // [rows][kv_heads][value_dim]; latent: null, values lie in the keys
  int64_t v_stride = 0;      // floats from a row to the next
  std::span<const SequenceChunk> chunks;  // rows: the sum of their tokens
};
void Append(const Cpu& cpu, const AppendParams& params);

// Copies whole blocks, such as the unfinished one of a fork. From 32 KiB on past the caches:
// who copies a block does not read it soon, and a cached store would first read what it overwrites.
struct BlockCopy {
  std::byte* to = nullptr;
  const std::byte* from = nullptr;  // must not overlap `to`
};
void CopyBlocks(const Cpu& cpu, std::span<const BlockCopy> copies, int64_t block_bytes);

}  // namespace larder::kernels
