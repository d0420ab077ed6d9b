#include "client/worker/tensor_names.h"

#include "absl/strings/str_cat.h"

namespace larder::worker {

std::string LayerTensor(uint32_t layer, absl::string_view name) {
  return absl::StrCat("model.layers.", layer, ".", name);
}

std::vector<WantedTensor> WantedTensors(const ModelConfig& config) {
  const uint64_t hidden = config.hidden, ffn = config.ffn;
  const uint64_t queries = uint64_t{config.heads} * config.head_dim;
  const uint64_t keys = uint64_t{config.kv_heads} * config.head_dim;
  std::vector<WantedTensor> wanted;
  wanted.push_back({kEmbedding, {config.vocab, hidden}});
  for (uint32_t layer = 0; layer < config.layers; ++layer) {
    const auto add = [&](absl::string_view name, std::vector<uint64_t> shape) {
      wanted.push_back({LayerTensor(layer, name), std::move(shape)});
    };
    add("input_layernorm.weight", {hidden});
    add("self_attn.q_proj.weight", {queries, hidden});
    add("self_attn.k_proj.weight", {keys, hidden});
    add("self_attn.v_proj.weight", {keys, hidden});
    if (config.qkv_bias) {
      add("self_attn.q_proj.bias", {queries});
      add("self_attn.k_proj.bias", {keys});
      add("self_attn.v_proj.bias", {keys});
    }
    add("self_attn.o_proj.weight", {hidden, queries});
    add("post_attention_layernorm.weight", {hidden});
    add("mlp.gate_proj.weight", {ffn, hidden});
    add("mlp.up_proj.weight", {ffn, hidden});
    add("mlp.down_proj.weight", {hidden, ffn});
  }
  wanted.push_back({kFinalNorm, {hidden}});
  if (!config.tied_embeddings) wanted.push_back({kOutput, {config.vocab, hidden}});
  return wanted;
}

}  // namespace larder::worker
