// KvGeometry: what a block of this model's K/V is, as the wire's ModelSpec wants to know it.
// It names no wire type: this half of the worker links no gRPC.
//
// Thread safety: a value.
#pragma once

#include <cstdint>
#include <string>

namespace larder::worker {

// Of one element of K/V, and of a tensor in a file.
enum class Dtype : uint8_t { kBf16, kF16, kF32 };

constexpr uint32_t DtypeBytes(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }
constexpr const char* DtypeName(Dtype dtype) {
  return dtype == Dtype::kF32 ? "f32" : dtype == Dtype::kF16 ? "f16" : "bf16";
}

// A block is [layer][K or V][kv_head][token][head_dim], contiguous (root README).
struct KvGeometry {
  uint32_t layers = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;  // elements
  Dtype dtype = Dtype::kBf16;
  uint32_t block_tokens = 0;
  // Everything else that K/V depends on: a hash of configuration and weights, then the
  // arithmetic, the window and where RoPE is applied. Equal text, equal K/V. At most 256 bytes.
  std::string weights_revision;

  uint64_t BlockBytes() const {
    return uint64_t{layers} * 2 * kv_heads * block_tokens * head_dim * DtypeBytes(dtype);
  }
  friend bool operator==(const KvGeometry&, const KvGeometry&) = default;
};

}  // namespace larder::worker
