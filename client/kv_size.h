// KvSize: how many bytes a model's K/V take, a token, a block, a tier.
//
// Thread safety: values and pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "larder/v1/types.pb.h"

namespace larder::cli {

// What a token leaves behind in each layer: a key and a value of kv_heads * head_dim elements
// or, with MLA, one row of mla_latent_dim + mla_rope_dim elements that serves as both. With elements
// of one byte each of these has a float32 scale.
struct KvShape {
  uint64_t layers = 0;
  uint64_t kv_heads = 0;
  uint64_t head_dim = 0;
  uint64_t mla_latent_dim = 0;  // 0: not MLA
  uint64_t mla_rope_dim = 0;
  v1::DType dtype = v1::DTYPE_BF16;

  bool mla() const { return mla_latent_dim != 0; }
  uint64_t TokenLayerBytes() const;
  uint64_t TokenBytes() const { return layers * TokenLayerBytes(); }
};

uint64_t ElementBytes(v1::DType dtype);

// OK, or INVALID_ARGUMENT with field, value and bound: those of larder.v1.ModelSpec.
absl::Status Check(const KvShape& shape);

// What a Hugging Face config.json says of a model.
struct ModelShape {
  std::string architecture;  // "LlamaForCausalLM"; empty where the file does not say
  KvShape kv;
  uint64_t query_heads = 0;   // 0: unknown
  uint64_t seq_len_max = 0;   // tokens; 0: unknown
  // Of the weights; 0: unknown. Counted for dense Llama- and Qwen2-like models: embeddings
  // (twice unless tied), per layer Q, K, V (with Qwen2's biases), O, three of the MLP and two
  // norms, and the last norm.
  uint64_t params = 0;
};
// INVALID_ARGUMENT names the key, its value and what is allowed.
absl::StatusOr<ModelShape> ParseModelShape(std::string_view config_json);

// "8030261248", "8B", "8.03B", "494M": parameters. nullopt: anything else.
std::optional<uint64_t> ParseParams(std::string_view text);

// How many tokens a batch must hold before its K/V take more bytes than the weights.
uint64_t TokensToOutgrow(uint64_t weights_bytes, const KvShape& shape);

// Blocks of so many bytes that larderd fits into a tier when one model has all of it: it cuts
// the tier into slabs, and each slab into slots that are a multiple of 4 KiB.
uint64_t BlocksInTier(uint64_t tier_bytes, uint32_t block_bytes);

// The same width with other kinds of heads: MHA (a K/V head a query head), GQA (as given), MQA
// (one), MLA (a latent of 512 and 64 for RoPE, as DeepSeek-V2 has it, or as given). Without
// query heads there is no MHA, and nothing but MLA without a head_dim.
struct HeadsVariant {
  std::string name;
  KvShape kv;
};
std::vector<HeadsVariant> HeadsVariants(const KvShape& shape, uint64_t query_heads);

}  // namespace larder::cli
