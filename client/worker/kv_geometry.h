// KvGeometry: what a block of this model's K/V is, as the wire's ModelSpec wants to know it.
// It names no wire type: this half of the worker links no gRPC.
//
// Thread safety: a value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace larder::worker {

// Of one element of K/V; of a tensor in a file the first three. Of the last two an element is a
// code, which means nothing without its row's scale (kernels/quantise.h).
enum class Dtype : uint8_t { kBf16, kF16, kF32, kF8E4M3, kI8 };

constexpr bool IsQuantised(Dtype dtype) { return dtype == Dtype::kF8E4M3 || dtype == Dtype::kI8; }
constexpr uint32_t DtypeBytes(Dtype dtype) {
  return dtype == Dtype::kF32 ? 4 : IsQuantised(dtype) ? 1 : 2;
}
constexpr const char* DtypeName(Dtype dtype) {
  constexpr const char* kNames[] = {"bf16", "f16", "f32", "f8_e4m3", "i8"};
  return kNames[static_cast<size_t>(dtype)];
}

// A block is [layer][K or V][kv_head][token][head_dim], contiguous (root README); quantised, then
// the rows' scales (kernels/kv_layout.h).
struct KvGeometry {
  uint32_t layers = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;  // elements
  Dtype dtype = Dtype::kBf16;
  uint32_t block_tokens = 0;
  // Everything else that K/V depends on: a hash of configuration and weights, then the
  // arithmetic, the window and where RoPE is applied. Equal text, equal K/V. At most 256 bytes.
  std::string weights_revision;

  // Of a token's key or value in one layer and head, its scale included.
  uint64_t RowBytes() const {
    return uint64_t{head_dim} * DtypeBytes(dtype) + (IsQuantised(dtype) ? sizeof(float) : 0);
  }
  uint64_t BlockBytes() const {
    return uint64_t{layers} * 2 * kv_heads * block_tokens * RowBytes();
  }
  friend bool operator==(const KvGeometry&, const KvGeometry&) = default;
};

}  // namespace larder::worker
