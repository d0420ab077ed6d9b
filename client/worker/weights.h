// Weights: a model's configuration and its tensors, from a Hugging Face directory or random.
//
// Thread safety: const calls from any thread.
//
// Invariants:
//   1. Every tensor that the configuration calls for is there with the shape it calls for, and
//      no other that could change what the model computes.
//   2. Equal revision(), equal configuration and equal bytes of all tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/status/statusor.h"
#include "client/worker/buffer.h"
#include "client/worker/kv_geometry.h"
#include "client/worker/mapped_file.h"
#include "client/worker/model_config.h"

namespace larder::worker {

// A row-major matrix, or a vector as one row. Borrowed from Weights.
struct Tensor {
  Dtype dtype = Dtype::kF32;
  uint64_t rows = 1;
  uint64_t columns = 0;
  std::span<const std::byte> bytes;  // rows * columns elements, little endian
};

// Row `row` of `tensor` as f32, exactly; `out` has tensor.columns elements.
void ReadRow(const Tensor& tensor, uint64_t row, std::span<float> out);

class Weights {
 public:
  // `directory` holds config.json and a checkpoint (checkpoint.h), which is mapped, not read, and
  // must not be changed while this object lives. NOT_FOUND for a missing file;
  // INVALID_ARGUMENT for a file that is damaged or does not fit its configuration, naming the
  // tensor, what it has and what is wanted.
  static absl::StatusOr<Weights> Load(const std::string& directory);

  // Weights of any geometry for tests and measurements, in bf16, from `seed` alone: matrices
  // uniform with deviation 1 / sqrt(columns), norms 1, biases within 1/8 of zero.
  // INVALID_ARGUMENT as Validate, RESOURCE_EXHAUSTED where memory does not suffice.
  static absl::StatusOr<Weights> Random(const ModelConfig& config, uint64_t seed);

  const ModelConfig& config() const { return config_; }
  // "xxh3:" and 32 hexadecimal digits over the configuration and every byte of the tensors.
  const std::string& revision() const { return revision_; }
  // By its Hugging Face name, e.g. "model.layers.0.self_attn.q_proj.weight"; one that the
  // configuration calls for and that was not released.
  const Tensor& tensor(const std::string& name) const;
  // Gives the memory of a tensor back, once a packed copy of it exists.
  void Release(const std::string& name);

 private:
  using Tensors = absl::btree_map<std::string, Tensor>;

  Weights(const ModelConfig& config, Tensors tensors);

  ModelConfig config_;
  std::string revision_;
  Tensors tensors_;
  std::vector<MappedFile> files_;  // either these are where the tensors lie,
  Buffer random_;                  // or this
};

}  // namespace larder::worker
