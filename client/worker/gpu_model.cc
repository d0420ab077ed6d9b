#include "client/worker/gpu_model.h"

#include <initializer_list>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/worker/forward_pass.h"
#include "client/worker/tensor_names.h"
#include "kernels/cuda/rows.h"

namespace larder::worker {
namespace {

using kernels::DType;

class Uploader {
 public:
  Uploader(Weights& weights, Gpu& gpu) : weights_(weights), gpu_(gpu) {}

  // The named tensors one below the other, as `type`.
  void Upload(std::initializer_list<std::string> names, DType type, GpuBuffer& to) {
    size_t numbers = 0;
    for (const std::string& name : names) {
      numbers += weights_.tensor(name).rows * weights_.tensor(name).columns;
    }
    absl::StatusOr<GpuBuffer> buffer = GpuBuffer::Device(numbers * kernels::BytesOf(type));
    if (!buffer.ok()) return gpu_.Check(buffer.status());
    to = *std::move(buffer);
    auto* at = to.As<std::byte>();
    for (const std::string& name : names) {
      const Tensor& tensor = weights_.tensor(name);
      Write(tensor, type, at);
      at += tensor.rows * tensor.columns * kernels::BytesOf(type);
      // A copy of pageable memory may read it until then, and the staged tensor is read by a kernel.
      if (gpu_.Finish().ok()) weights_.Release(name);
    }
  }

 private:
  void Write(const Tensor& tensor, DType type, std::byte* to) {
    const DType from = KernelDtype(tensor.dtype);
    std::byte* target = to;
    if (from != type) {
      gpu_.Check(staging_.Grow(tensor.bytes.size(), GpuBuffer::Device));
      target = staging_.As<std::byte>();
      if (staging_.bytes() < tensor.bytes.size()) return;
    }
    gpu_.Check(cudaMemcpyAsync(target, tensor.bytes.data(), tensor.bytes.size(),
                               cudaMemcpyHostToDevice, gpu_.stream()),
               "bringing weights");
    if (from == type) return;
    const auto columns = static_cast<int32_t>(tensor.columns);
    gpu_.Check(kernels::cuda::CopyRows({.from_type = from,
                                        .from = target,
                                        .from_stride = columns,
                                        .to_type = type,
                                        .to = to,
                                        .to_stride = columns,
                                        .rows = static_cast<int32_t>(tensor.rows),
                                        .dim = columns},
                                       gpu_.stream()),
               "rounding weights");
  }

  Weights& weights_;
  Gpu& gpu_;
  GpuBuffer staging_;  // a tensor as the file has it
};

}  // namespace

absl::StatusOr<GpuModel> UploadModel(Weights weights, Gpu& gpu) {
  const ModelConfig config = weights.config();
  GpuModel model;
  if (weights.tensor(kEmbedding).dtype == Dtype::kF16) model.type = DType::kF16;
  model.layers.resize(config.layers);
  Uploader uploader(weights, gpu);
  uploader.Upload({kEmbedding}, model.type, model.embedding);
  for (uint32_t i = 0; i < config.layers; ++i) {
    GpuLayer& layer = model.layers[i];
    const auto name = [i](absl::string_view tensor) { return LayerTensor(i, tensor); };
    uploader.Upload({name("input_layernorm.weight")}, DType::kF32, layer.attention_norm);
    uploader.Upload({name("self_attn.q_proj.weight"), name("self_attn.k_proj.weight"),
                     name("self_attn.v_proj.weight")},
                    model.type, layer.qkv);
    if (config.qkv_bias) {
      uploader.Upload({name("self_attn.q_proj.bias"), name("self_attn.k_proj.bias"),
                       name("self_attn.v_proj.bias")},
                      DType::kF32, layer.qkv_bias);
    }
    uploader.Upload({name("self_attn.o_proj.weight")}, model.type, layer.attention_output);
    uploader.Upload({name("post_attention_layernorm.weight")}, DType::kF32, layer.ffn_norm);
    uploader.Upload({name("mlp.gate_proj.weight"), name("mlp.up_proj.weight")}, model.type,
                    layer.gate_up);
    uploader.Upload({name("mlp.down_proj.weight")}, model.type, layer.down);
  }
  uploader.Upload({kFinalNorm}, DType::kF32, model.final_norm);
  if (!config.tied_embeddings) uploader.Upload({kOutput}, model.type, model.output);
  if (absl::Status done = gpu.Finish(); !done.ok()) return done;
  return model;
}

}  // namespace larder::worker
