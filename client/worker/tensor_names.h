// TensorNames: which tensors a configuration calls for, by their Hugging Face names.
//
// Thread safety: free functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "client/worker/model_config.h"

namespace larder::worker {

inline constexpr char kEmbedding[] = "model.embed_tokens.weight";  // [vocab][hidden]
inline constexpr char kFinalNorm[] = "model.norm.weight";          // [hidden]
inline constexpr char kOutput[] = "lm_head.weight";                // [vocab][hidden], unless tied

// E.g. LayerTensor(3, "mlp.up_proj.weight") is "model.layers.3.mlp.up_proj.weight".
std::string LayerTensor(uint32_t layer, absl::string_view name);

struct WantedTensor {
  std::string name;
  std::vector<uint64_t> shape;  // [columns] or [rows][columns]
};

// In the order of the forward pass. `config` passes Validate.
std::vector<WantedTensor> WantedTensors(const ModelConfig& config);

}  // namespace larder::worker
