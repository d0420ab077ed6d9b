// Model: geometry and identity of one kind of K/V.
//
// Thread safety: values.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "storage/types.h"

namespace larder {

// Numbers are those of larder.v1.DType; they are part of the fingerprint.
enum class DType : uint32_t { kF32 = 1, kF16 = 2, kBf16 = 3, kF8E4M3 = 4, kI8 = 5 };

// The fields of larder.v1.ModelSpec, whose comments give units and bounds.
struct ModelSpec {
  std::string name;
  std::string weights_revision;
  std::string lora;
  std::string salt;
  uint32_t layers = 0;
  uint32_t kv_heads = 0;
  uint32_t head_dim = 0;
  uint32_t mla_latent_dim = 0;
  uint32_t mla_rope_dim = 0;
  DType dtype = DType::kBf16;
  uint32_t block_tokens = 0;
  uint32_t shards = 1;

  friend bool operator==(const ModelSpec&, const ModelSpec&) = default;
};

// Bound of ModelSpec::shards.
inline constexpr uint32_t kShardsMax = 16;

using ModelId = uint64_t;

struct Model {
  ModelId id = 0;
  BlockKey fingerprint;      // also the parent key of every first block
  uint32_t block_bytes = 0;  // per shard; of all shards together at most 1 GiB
  ModelSpec spec;

  // What is moved and stored: the parts of all shards, in rank order.
  uint32_t WholeBlockBytes() const { return block_bytes * spec.shards; }
  // What a block's slot takes: in GPU one shard's part, at the same place in each rank's memory;
  // in HOST and on NVME the whole block.
  uint32_t SlotBytes(Tier tier) const {
    return tier == Tier::kGpu ? block_bytes : WholeBlockBytes();
  }
};

// INVALID_ARGUMENT names the field, its value and its bound. The encoding that is hashed
// is written down in proto/larder/v1/types.proto.
absl::StatusOr<Model> MakeModel(const ModelSpec& spec);

}  // namespace larder
