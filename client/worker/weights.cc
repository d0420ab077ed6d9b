#include "client/worker/weights.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/worker/bf16.h"
#include "client/worker/checkpoint.h"
#include "client/worker/tensor_names.h"
#include "xxhash.h"

namespace larder::worker {
namespace {

constexpr size_t kTensorAlign = 64;  // bytes; a cache line

Tensor AsTensor(Dtype dtype, const std::vector<uint64_t>& shape, std::span<const std::byte> bytes) {
  return {.dtype = dtype,
          .rows = shape.size() == 2 ? shape[0] : 1,
          .columns = shape.back(),
          .bytes = bytes};
}

// Tensors that files carry although they say nothing that the configuration does not.
bool IsRedundant(const ModelConfig& config, const std::string& name) {
  return absl::EndsWith(name, ".rotary_emb.inv_freq") ||
         (config.tied_embeddings && name == kOutput);
}

std::string ShapeText(const std::vector<uint64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

// Every field that the arithmetic depends on, exactly.
std::string CanonicalText(const ModelConfig& c) {
  const RopeScaling& s = c.rope_scaling;
  return absl::StrFormat(
      "%d %d %d %d %d %d %d %d tied %d bias %d theta %a eps %a scaling %d %a %a %a %d",
      static_cast<int>(c.architecture), c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, c.ffn,
      c.vocab, c.tied_embeddings, c.qkv_bias, c.rope_theta, c.rms_norm_eps,
      static_cast<int>(s.type), s.factor, s.low_freq_factor, s.high_freq_factor,
      s.original_max_positions);
}

std::string Revision(const ModelConfig& config,
                     const absl::btree_map<std::string, Tensor>& tensors) {
  XXH3_state_t* const state = XXH3_createState();
  XXH3_128bits_reset(state);
  const auto update = [&](const std::string& text) {
    XXH3_128bits_update(state, text.data(), text.size());
  };
  update(CanonicalText(config));
  for (const auto& [name, tensor] : tensors) {
    update(absl::StrCat("\n", name, " ", DtypeName(tensor.dtype), " "));
    XXH3_128bits_update(state, tensor.bytes.data(), tensor.bytes.size());
  }
  const XXH128_hash_t hash = XXH3_128bits_digest(state);
  XXH3_freeState(state);
  return absl::StrFormat("xxh3:%016x%016x", hash.high64, hash.low64);
}

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
constexpr uint64_t Mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58'476d'1ce4'e5b9;
  x ^= x >> 27;
  x *= 0x94d0'49bb'1331'11eb;
  return x ^ (x >> 31);
}

// Uniform in (-bound, bound), four elements of one 64-bit word.
void FillUniform(uint64_t seed, float bound, std::span<uint16_t> out) {
  for (size_t i = 0; i < out.size(); i += 4) {
    uint64_t word = Mix(seed + (i + 1) * 0x9e37'79b9'7f4a'7c15);
    for (size_t j = i; j < std::min(i + 4, out.size()); ++j, word >>= 16) {
      const float unit = (static_cast<float>(word & 0xffff) - 32'767.5f) / 32'768.0f;
      out[j] = ToBf16(unit * bound);
    }
  }
}

void FillRandom(const WantedTensor& wanted, uint64_t seed, std::span<uint16_t> out) {
  if (absl::EndsWith(wanted.name, "norm.weight")) {
    std::fill(out.begin(), out.end(), ToBf16(1));
    return;
  }
  constexpr float kBiasBound = 0.125f;
  // A uniform distribution's deviation is its bound / sqrt(3).
  const float bound =
      wanted.shape.size() == 1 ? kBiasBound : std::sqrt(3.0f / static_cast<float>(wanted.shape[1]));
  FillUniform(Mix(seed) ^ XXH3_64bits(wanted.name.data(), wanted.name.size()), bound, out);
}

// The exponent's bias is moved by a product, which also makes subnormals what they are.
float FromF16(uint16_t bits) {
  const uint32_t magnitude = uint32_t{bits} & 0x7fff;
  uint32_t wide = magnitude << 13;
  if (magnitude >= 0x7c00) {
    wide |= 0x7f80'0000;  // infinity or NaN
  } else {
    wide = std::bit_cast<uint32_t>(std::bit_cast<float>(wide) * 0x1p112f);
  }
  return std::bit_cast<float>(wide | (uint32_t{bits} & 0x8000) << 16);
}

}  // namespace

void ReadRow(const Tensor& tensor, uint64_t row, std::span<float> out) {
  const size_t row_bytes = tensor.columns * DtypeBytes(tensor.dtype);
  const std::byte* const bytes = tensor.bytes.data() + row * row_bytes;
  if (tensor.dtype == Dtype::kF32) {
    std::memcpy(out.data(), bytes, row_bytes);
    return;
  }
  const auto* const halves = reinterpret_cast<const uint16_t*>(bytes);
  if (tensor.dtype == Dtype::kBf16) {
    for (uint64_t i = 0; i < tensor.columns; ++i) out[i] = FromBf16(halves[i]);
  } else {
    for (uint64_t i = 0; i < tensor.columns; ++i) out[i] = FromF16(halves[i]);
  }
}

Weights::Weights(const ModelConfig& config, Tensors tensors)
    : config_(config), revision_(Revision(config, tensors)), tensors_(std::move(tensors)) {}

absl::StatusOr<Weights> Weights::Load(const std::string& directory) {
  const absl::StatusOr<ModelConfig> config =
      ReadModelConfig(absl::StrCat(directory, "/config.json"));
  if (!config.ok()) return config.status();
  absl::StatusOr<Checkpoint> checkpoint = OpenCheckpoint(directory);
  if (!checkpoint.ok()) return checkpoint.status();
  Tensors tensors;
  for (const WantedTensor& wanted : WantedTensors(*config)) {
    const auto found = checkpoint->tensors.find(wanted.name);
    if (found == checkpoint->tensors.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(directory, ": ", wanted.name, ": missing; config.json calls for it"));
    }
    const SafetensorsEntry& entry = found->second;
    if (entry.shape != wanted.shape) {
      return absl::InvalidArgumentError(
          absl::StrCat(directory, ": ", wanted.name, ".shape: ", ShapeText(entry.shape),
                       "; allowed by config.json: ", ShapeText(wanted.shape)));
    }
    tensors.emplace(wanted.name, AsTensor(entry.dtype, entry.shape, entry.bytes));
    checkpoint->tensors.erase(found);
  }
  for (const auto& [name, entry] : checkpoint->tensors) {
    if (IsRedundant(*config, name)) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(directory, ": ", name, ": config.json calls for no such tensor"));
  }
  Weights weights(*config, std::move(tensors));
  weights.files_ = std::move(checkpoint->files);
  return weights;
}

absl::StatusOr<Weights> Weights::Random(const ModelConfig& config, uint64_t seed) {
  const absl::Status valid = Validate(config);
  if (!valid.ok()) return valid;
  const std::vector<WantedTensor> wanted = WantedTensors(config);
  const auto elements = [](const WantedTensor& tensor) {
    return tensor.shape[0] * (tensor.shape.size() == 2 ? tensor.shape[1] : 1);
  };
  const auto padded_bytes = [&](const WantedTensor& tensor) {
    const uint64_t bytes = elements(tensor) * DtypeBytes(Dtype::kBf16);
    return (bytes + kTensorAlign - 1) / kTensorAlign * kTensorAlign;
  };
  uint64_t total_bytes = 0;
  for (const WantedTensor& tensor : wanted) total_bytes += padded_bytes(tensor);
  absl::StatusOr<Buffer> buffer = Buffer::Allocate(total_bytes);
  if (!buffer.ok()) return buffer.status();

  Tensors tensors;
  std::byte* place = buffer->data();
  for (const WantedTensor& tensor : wanted) {
    const std::span halves(reinterpret_cast<uint16_t*>(place), elements(tensor));
    FillRandom(tensor, seed, halves);
    tensors.emplace(tensor.name, AsTensor(Dtype::kBf16, tensor.shape, std::as_bytes(halves)));
    place += padded_bytes(tensor);
  }
  Weights weights(config, std::move(tensors));
  weights.random_ = *std::move(buffer);
  return weights;
}

const Tensor& Weights::tensor(const std::string& name) const { return tensors_.at(name); }

void Weights::Release(const std::string& name) {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) return;
  // Only pages that hold nothing else. A mapped file's can be read again, but need not be.
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(found->second.bytes.data());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + found->second.bytes.size()) / page * page;
  if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  tensors_.erase(found);
}

}  // namespace larder::worker
