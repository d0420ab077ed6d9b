#include "server/cache/model.h"

#include <limits>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "server/cache/block_key.h"

namespace larder {
namespace {

constexpr uint64_t kBlockBytesMax = uint64_t{1} << 30;

absl::Status CheckLength(const char* field, const std::string& value, size_t min, size_t max) {
  if (value.size() >= min && value.size() <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("spec.", field, ": ", value.size(),
                                                 " bytes given, allowed are ", min, " to ", max));
}

absl::Status CheckRange(const char* field, uint32_t value, uint32_t min, uint32_t max) {
  if (value >= min && value <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("spec.", field, ": ", value, " given, allowed are ", min, " to ", max));
}

uint32_t ElementBytes(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kF16:
    case DType::kBf16:
      return 2;
    case DType::kF8E4M3:
    case DType::kI8:
      return 1;
  }
  return 0;
}

// Of one token in one layer of one shard: its numbers, and a float32 scale for each key and value
// (MLA: for each row) where numbers are one byte.
uint64_t TokenLayerBytes(const ModelSpec& spec) {
  const bool mla = spec.mla_latent_dim != 0;
  const uint64_t heads = uint64_t{2} * spec.kv_heads / spec.shards;  // keys' and values'
  const uint64_t elements =
      mla ? uint64_t{spec.mla_latent_dim} + spec.mla_rope_dim : heads * spec.head_dim;
  const uint64_t scales = mla ? 1 : heads;
  const uint64_t element_bytes = ElementBytes(spec.dtype);
  return elements * element_bytes + (element_bytes == 1 ? scales * sizeof(float) : 0);
}

void Append(std::string& out, uint32_t value) {
  for (int shift = 0; shift < 32; shift += 8) out.push_back(static_cast<char>(value >> shift));
}

void Append(std::string& out, const std::string& value) {
  Append(out, static_cast<uint32_t>(value.size()));
  out += value;
}

std::string CanonicalEncoding(const ModelSpec& spec) {
  std::string out("larder.model.v1\0", 16);
  for (const std::string* text : {&spec.name, &spec.weights_revision, &spec.lora, &spec.salt}) {
    Append(out, *text);
  }
  for (uint32_t value :
       {spec.layers, spec.kv_heads, spec.head_dim, spec.mla_latent_dim, spec.mla_rope_dim,
        static_cast<uint32_t>(spec.dtype), spec.block_tokens, spec.shards}) {
    Append(out, value);
  }
  return out;
}

absl::Status CheckGeometry(const ModelSpec& spec) {
  const bool mla = spec.mla_latent_dim != 0 || spec.mla_rope_dim != 0;
  const uint32_t attention_min = mla ? 0 : 1;
  for (absl::Status status : {CheckRange("layers", spec.layers, 1, 1024),
                              CheckRange("kv_heads", spec.kv_heads, attention_min, mla ? 0 : 1024),
                              CheckRange("head_dim", spec.head_dim, attention_min, mla ? 0 : 4096),
                              CheckRange("mla_latent_dim", spec.mla_latent_dim, mla ? 1 : 0, 8192),
                              CheckRange("mla_rope_dim", spec.mla_rope_dim, 0, 8192),
                              CheckRange("dtype", static_cast<uint32_t>(spec.dtype), 1, 5),
                              CheckRange("block_tokens", spec.block_tokens, 1, 1024),
                              CheckRange("shards", spec.shards, 1, kShardsMax)}) {
    if (!status.ok()) return status;
  }
  if (mla || spec.kv_heads % spec.shards == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "spec.kv_heads: ", spec.kv_heads, " given, must be a multiple of shards, ", spec.shards));
}

}  // namespace

absl::StatusOr<Model> MakeModel(const ModelSpec& given) {
  ModelSpec spec = given;
  if (spec.shards == 0) spec.shards = 1;
  for (absl::Status status : {CheckLength("name", spec.name, 1, 256),
                              CheckLength("weights_revision", spec.weights_revision, 0, 256),
                              CheckLength("lora", spec.lora, 0, 256),
                              CheckLength("salt", spec.salt, 0, 64), CheckGeometry(spec)}) {
    if (!status.ok()) return status;
  }
  const uint64_t block_bytes = TokenLayerBytes(spec) * spec.layers * spec.block_tokens;
  if (block_bytes * spec.shards > kBlockBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("spec: a block of ", block_bytes * spec.shards,
                                                   " bytes, at most ", kBlockBytesMax));
  }
  Model model;
  model.fingerprint = Sha256(CanonicalEncoding(spec));
  model.id = model.fingerprint.Prefix64();
  model.block_bytes = static_cast<uint32_t>(block_bytes);
  model.spec = std::move(spec);
  return model;
}

}  // namespace larder
