// ModelConfig: the geometry of a transformer and the arithmetic between its weights, as a
// Hugging Face `config.json` states them.
//
// Thread safety: values and free functions.
//
// Invariants:
//   1. What ParseModelConfig accepts passes Validate: every number is inside the limits below,
//      heads are a multiple of kv_heads, head_dim is even.
//   2. What the file says and this worker does not do (another architecture or activation, an
//      unknown RoPE scaling, a sliding window of the model's own) is an error, never ignored.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace larder::worker {

// Both are pre-norm decoders with RMSNorm, rotary positions, grouped queries and a SwiGLU
// feed-forward; Qwen2 adds biases to the query, key and value projections.
enum class Architecture : uint8_t { kLlama, kQwen2 };

// "LlamaForCausalLM", "Qwen2ForCausalLM".
std::string_view ArchitectureName(Architecture architecture);

enum class RopeScalingType : uint8_t { kNone, kLinear, kLlama3 };

// How the rotary frequencies are stretched beyond the trained length. kLinear divides all by
// `factor`; kLlama3 divides long wavelengths by `factor`, keeps short ones and blends between
// (Llama 3.1; transformers, modeling_rope_utils.py, _compute_llama3_parameters).
struct RopeScaling {
  RopeScalingType type = RopeScalingType::kNone;
  double factor = 1;                        // 1 or more
  double low_freq_factor = 1;               // kLlama3 only, as the next two
  double high_freq_factor = 4;              // above low_freq_factor
  uint32_t original_max_positions = 8'192;  // tokens

  friend bool operator==(const RopeScaling&, const RopeScaling&) = default;
};

inline constexpr uint32_t kLayersMax = 1'024;
inline constexpr uint32_t kWidthMax = 1 << 17;  // hidden and ffn, elements
inline constexpr uint32_t kHeadsMax = 1'024;    // query heads, and so K/V heads
inline constexpr uint32_t kHeadDimMax = 512;    // elements
inline constexpr uint32_t kVocabMax = 1 << 20;  // tokens
inline constexpr uint32_t kPositionsMax = 1 << 24;

struct ModelConfig {
  Architecture architecture = Architecture::kLlama;
  uint32_t layers = 0;
  uint32_t hidden = 0;           // width of the residual stream, elements
  uint32_t heads = 0;            // query heads
  uint32_t kv_heads = 0;         // divides heads
  uint32_t head_dim = 0;         // elements; heads * head_dim need not be `hidden`
  uint32_t ffn = 0;              // width of the feed-forward, elements
  uint32_t vocab = 0;            // tokens
  uint32_t max_positions = 0;    // tokens the model was made for
  bool tied_embeddings = false;  // the logits' matrix is the embedding
  bool qkv_bias = false;
  double rope_theta = 10'000;
  RopeScaling rope_scaling;
  double rms_norm_eps = 1e-6;

  friend bool operator==(const ModelConfig&, const ModelConfig&) = default;
};

// INVALID_ARGUMENT naming the field, its value and the bound.
absl::Status Validate(const ModelConfig& config);

// Reads the text of a config.json, of transformers 4 (`rope_theta`, `rope_scaling`) or 5
// (`rope_parameters`). Unknown keys are passed over; what changes the arithmetic is not.
// INVALID_ARGUMENT for what is not JSON or out of bounds, UNIMPLEMENTED for what this worker
// does not do.
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json);

// The same from a file; NOT_FOUND when there is none. Refuses files above 1 MiB.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& path);

}  // namespace larder::worker
