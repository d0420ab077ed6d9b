// Weights: a model's configuration and its tensors, from a Hugging Face directory or random.
//
// Thread safety: immutable; const calls from any thread.
//
// Invariants:
//   1. Every tensor the configuration calls for is there with the shape it calls for; nothing
//      of a tensor is outside the file.
//   2. Equal revision(), equal configuration and equal bytes of all tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "client/worker/kv_geometry.h"
#include "client/worker/model_config.h"

namespace larder::worker {

// A row-major matrix, or a vector of one row. Borrowed from Weights.
struct Tensor {
  Dtype dtype = Dtype::kF32;
  uint64_t rows = 1;
  uint64_t columns = 0;
  std::span<const std::byte> bytes;  // rows * columns elements, little endian
};

// Writes row `row` of `tensor` as f32; `out` has tensor.columns elements.
void ReadRow(const Tensor& tensor, uint64_t row, std::span<float> out);

class Weights {
 public:
  // `directory` holds config.json and model.safetensors, the latter mapped, not read.
  // NOT_FOUND for a missing file; INVALID_ARGUMENT for a file that is damaged or does not fit
  // its configuration, naming the tensor, what it has and what is wanted.
  static absl::StatusOr<Weights> Load(const std::string& directory);

  // Weights of any geometry for tests and measurements, bf16, derived from `seed` alone:
  // matrices uniform with the deviation that keeps a row's size, norms 1, biases small.
  static absl::StatusOr<Weights> Random(const ModelConfig& config, uint64_t seed);

  Weights(Weights&&) noexcept;
  Weights& operator=(Weights&&) noexcept;
  ~Weights();

  const ModelConfig& config() const { return config_; }
  // "xxh3:" and 32 hexadecimal digits over the configuration and every byte of the tensors.
  const std::string& revision() const { return revision_; }
  // By its Hugging Face name, e.g. "model.layers.0.self_attn.q_proj.weight"; one that the
  // configuration calls for.
  const Tensor& tensor(std::string_view name) const;

 private:
  class Storage;  // the mapped file, or the random bytes

  Weights(ModelConfig config, std::unique_ptr<Storage> storage,
          absl::flat_hash_map<std::string, Tensor> tensors);

  ModelConfig config_;
  std::string revision_;
  std::unique_ptr<Storage> storage_;
  absl::flat_hash_map<std::string, Tensor> tensors_;
};

}  // namespace larder::worker
