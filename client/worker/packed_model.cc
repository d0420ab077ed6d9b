#include "client/worker/packed_model.h"

#include <initializer_list>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "client/worker/tensor_names.h"

namespace larder::worker {
namespace {

std::vector<float> ReadVector(const Tensor& tensor) {
  std::vector<float> values(tensor.columns);
  ReadRow(tensor, 0, values);
  return values;
}

// The named weights of a layer stacked, with their biases if asked for.
absl::StatusOr<PackedMatrix> PackStack(Weights& weights, Matmul& matmul, uint32_t layer,
                                       std::initializer_list<absl::string_view> names,
                                       bool with_bias) {
  std::vector<const Tensor*> matrices, biases;
  for (const absl::string_view name : names) {
    matrices.push_back(&weights.tensor(LayerTensor(layer, absl::StrCat(name, ".weight"))));
    if (!with_bias) continue;
    biases.push_back(&weights.tensor(LayerTensor(layer, absl::StrCat(name, ".bias"))));
  }
  absl::StatusOr<PackedMatrix> packed = matmul.Pack(matrices, biases);
  for (const absl::string_view name : names) {
    weights.Release(LayerTensor(layer, absl::StrCat(name, ".weight")));
  }
  return packed;
}

absl::Status PackLayer(Weights& weights, Matmul& matmul, uint32_t index, PackedLayer& layer) {
  const auto norm = [&](absl::string_view name) {
    return ReadVector(weights.tensor(LayerTensor(index, name)));
  };
  layer.attention_norm = norm("input_layernorm.weight");
  layer.ffn_norm = norm("post_attention_layernorm.weight");
  const auto pack = [&](std::initializer_list<absl::string_view> names, bool with_bias,
                        PackedMatrix& matrix) {
    absl::StatusOr<PackedMatrix> packed = PackStack(weights, matmul, index, names, with_bias);
    if (packed.ok()) matrix = *std::move(packed);
    return packed.status();
  };
  absl::Status status = pack({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
                             weights.config().qkv_bias, layer.qkv);
  if (status.ok()) status = pack({"self_attn.o_proj"}, false, layer.attention_output);
  if (status.ok()) status = pack({"mlp.gate_proj", "mlp.up_proj"}, false, layer.gate_up);
  if (status.ok()) status = pack({"mlp.down_proj"}, false, layer.down);
  return status;
}

}  // namespace

absl::StatusOr<PackedModel> PackModel(Weights& weights, Matmul& matmul) {
  PackedModel model;
  model.layers.resize(weights.config().layers);
  for (uint32_t i = 0; i < model.layers.size(); ++i) {
    const absl::Status packed = PackLayer(weights, matmul, i, model.layers[i]);
    if (!packed.ok()) return packed;
  }
  model.final_norm = ReadVector(weights.tensor(kFinalNorm));
  const std::string output = weights.config().tied_embeddings ? kEmbedding : kOutput;
  const Tensor* const matrix = &weights.tensor(output);
  absl::StatusOr<PackedMatrix> packed = matmul.Pack({&matrix, 1});
  if (!packed.ok()) return packed.status();
  model.output = *std::move(packed);
  if (output != kEmbedding) weights.Release(output);
  return model;
}

}  // namespace larder::worker
