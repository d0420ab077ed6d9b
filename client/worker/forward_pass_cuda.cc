#include "client/worker/forward_pass_cuda.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/worker/gpu.h"
#include "client/worker/gpu_graphs.h"
#include "client/worker/gpu_model.h"
#include "client/worker/gpu_product.h"
#include "client/worker/gpu_step.h"
#include "kernels/cuda/blocks.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/prefill.h"
#include "kernels/cuda/rows.h"

namespace larder::worker {
namespace {

using kernels::DType;

constexpr uint32_t kUnit = 4;  // numbers that kernels over rows take at a time

class CudaForwardPass final : public ForwardPass {
 public:
  CudaForwardPass(std::unique_ptr<Gpu> gpu, std::unique_ptr<GpuProduct> product, GpuModel model,
                  const ModelConfig& config, const TransformerOptions& options,
                  int32_t decode_blocks);

  absl::Status Allocate();

  absl::Status Run(std::span<const Chunk> chunks, std::span<float> logits) override;
  BlockMemory& block_memory() override { return *gpu_; }
  uint32_t threads() const override { return 1; }
  std::string arithmetic() const override {
    return absl::StrCat("cuda ", model_.type == DType::kF16 ? "f16 " : "bf16 ", gpu_->name(), " ",
                        product_->library());
  }

 private:
  const GpuStepArguments& args() const { return step_.arguments(); }
  // The workspace of Decode for this step's plan.
  void PrepareDecode();
  // All that is launched of a step besides copies from and to the host.
  void Launch();
  void Embed();
  void RunLayer(uint32_t index);
  void ProjectToQkv(const GpuLayer& layer);
  void Append(uint32_t layer);
  void Attend(uint32_t layer);
  void AddToResidual(const GpuBuffer& weight, const GpuBuffer& in, int64_t in_stride,
                     int32_t inputs);
  void ComputeLogits();

  // norm(x) to `input_`, x [rows][hidden].
  void Norm(const GpuBuffer& weight, const float* x, int32_t rows);
  // `scratch_`, [rows][width], to `input_`, rounded to the products' type.
  void RoundToInput(int32_t rows, int32_t width);
  // What both kernels are told of a layer.
  template <typename Params>
  Params AttentionOf(uint32_t layer) const;
  kernels::cuda::DecodeParams DecodeOf(uint32_t layer) const;
  kernels::cuda::PrefillParams PrefillOf(uint32_t layer) const;
  void CopyRows(const kernels::cuda::CopyRowsParams& params) {
    gpu_->Check(kernels::cuda::CopyRows(params, gpu_->stream()), "CopyRows");
  }

  const std::unique_ptr<Gpu> gpu_;  // what follows lies in its memory
  const std::unique_ptr<GpuProduct> product_;
  const GpuModel model_;
  const ModelConfig config_;
  const TransformerOptions options_;
  const int32_t hidden_;
  const int32_t ffn_;
  const int32_t q_width_;    // numbers: all query heads of a row
  const int32_t kv_width_;   // all key heads
  const int32_t qkv_width_;  // queries, keys and values
  GpuStep step_;

  // Of the call under way, [rows_max][..] each.
  GpuBuffer x_;        // [hidden], float32: the residual
  GpuBuffer scratch_;  // [hidden or q_width], float32: before it is rounded
  GpuBuffer input_;    // [hidden or q_width], the products' type
  GpuBuffer qkv_;      // [qkv_width], float32
  GpuBuffer q_;        // [q_width], as attention wants it, 16 bits
  GpuBuffer gate_up_;  // [2 * ffn], the products' type
  // As large as a step has needed.
  GpuBuffer logits_;     // float32
  GpuBuffer workspace_;  // of Decode

  GpuGraphs graphs_;
};

GpuStepOptions StepOptions(const ModelConfig& config, const TransformerOptions& options,
                           const Gpu& gpu, int32_t decode_blocks) {
  const AttentionWindow window = options.window.value_or(AttentionWindow{});
  return {.q_heads = static_cast<int32_t>(config.heads),
          .kv_heads = static_cast<int32_t>(config.kv_heads),
          .head_dim = static_cast<int32_t>(config.head_dim),
          .window = static_cast<int32_t>(window.window_tokens),
          .sinks = static_cast<int32_t>(window.sink_tokens),
          .quantised = IsQuantised(options.kv_dtype),
          .decode_blocks = decode_blocks,
          .multiprocessors = gpu.multiprocessors(),
          .frequencies = RopeFrequencies(config)};
}

CudaForwardPass::CudaForwardPass(std::unique_ptr<Gpu> gpu, std::unique_ptr<GpuProduct> product,
                                 GpuModel model, const ModelConfig& config,
                                 const TransformerOptions& options, int32_t decode_blocks)
    : gpu_(std::move(gpu)),
      product_(std::move(product)),
      model_(std::move(model)),
      config_(config),
      options_(options),
      hidden_(static_cast<int32_t>(config.hidden)),
      ffn_(static_cast<int32_t>(config.ffn)),
      q_width_(static_cast<int32_t>(config.heads * config.head_dim)),
      kv_width_(static_cast<int32_t>(config.kv_heads * config.head_dim)),
      qkv_width_(q_width_ + 2 * kv_width_),
      step_(*gpu_, StepOptions(config, options, *gpu_, decode_blocks)),
      graphs_(*gpu_) {}

absl::Status CudaForwardPass::Allocate() {
  const int32_t widest = std::max(hidden_, q_width_);
  const struct {
    GpuBuffer* buffer;
    int32_t row_bytes;
  } buffers[] = {{&x_, hidden_ * 4},      {&scratch_, widest * 4}, {&input_, widest * 2},
                 {&qkv_, qkv_width_ * 4}, {&q_, q_width_ * 2},     {&gate_up_, 2 * ffn_ * 2}};
  for (const auto& [buffer, row_bytes] : buffers) {
    absl::StatusOr<GpuBuffer> allocated =
        GpuBuffer::Device(size_t{options_.rows_max} * static_cast<size_t>(row_bytes));
    if (!allocated.ok()) return allocated.status();
    *buffer = *std::move(allocated);
  }
  return absl::OkStatus();
}

absl::Status CudaForwardPass::Run(std::span<const Chunk> chunks, std::span<float> logits) {
  gpu_->Check(logits_.Grow(logits.size_bytes(), GpuBuffer::Device));
  gpu_->Check(step_.Prepare(chunks));
  PrepareDecode();
  if (!gpu_->ok()) return gpu_->Finish();
  // Prefill's plans are hardly ever the same again, and its kernels outlast their launches.
  if (options_.cuda_graphs && args().prefill.tile_count == 0) {
    graphs_.Run({args(), workspace_.As<void>(), logits_.As<void>()}, [this] { Launch(); });
  } else {
    Launch();
  }
  if (!logits.empty()) {
    gpu_->Check(cudaMemcpyAsync(logits.data(), logits_.As<void>(), logits.size_bytes(),
                                cudaMemcpyDeviceToHost, gpu_->stream()),
                "logits");
  }
  return gpu_->Finish();
}

void CudaForwardPass::Launch() {
  Embed();
  for (uint32_t layer = 0; layer < config_.layers; ++layer) RunLayer(layer);
  if (args().wanted > 0) ComputeLogits();
}

void CudaForwardPass::PrepareDecode() {
  const kernels::cuda::DecodeParams params = DecodeOf(0);
  gpu_->Check(workspace_.Grow(kernels::cuda::DecodeWorkspaceBytes(params), GpuBuffer::Device));
  const size_t counter_bytes = kernels::cuda::DecodeCounterBytes(params);
  if (!gpu_->ok() || counter_bytes == 0) return;
  gpu_->Check(cudaMemsetAsync(workspace_.As<std::byte>(), 0, counter_bytes, gpu_->stream()),
              "counters");
}

void CudaForwardPass::Embed() {
  CopyRows({.from_type = model_.type,
            .from = model_.embedding.As<void>(),
            .from_stride = hidden_,
            .indices = args().tokens,
            .to = x_.As<void>(),
            .to_stride = hidden_,
            .rows = args().batch.rows,
            .dim = hidden_});
}

void CudaForwardPass::RoundToInput(int32_t rows, int32_t width) {
  CopyRows({.from = scratch_.As<void>(),
            .from_stride = width,
            .to_type = model_.type,
            .to = input_.As<void>(),
            .to_stride = width,
            .rows = rows,
            .dim = width});
}

void CudaForwardPass::Norm(const GpuBuffer& weight, const float* x, int32_t rows) {
  gpu_->Check(kernels::cuda::RmsNorm({.type = DType::kF32,
                                      .x = x,
                                      .x_stride = hidden_,
                                      .out = scratch_.As<void>(),
                                      .out_stride = hidden_,
                                      .weight = weight.As<void>(),
                                      .rows = rows,
                                      .dim = hidden_,
                                      .epsilon = static_cast<float>(config_.rms_norm_eps)},
                                     gpu_->stream()),
              "RmsNorm");
  RoundToInput(rows, hidden_);
}

void CudaForwardPass::ProjectToQkv(const GpuLayer& layer) {
  const bool biased = layer.qkv_bias.bytes() != 0;
  if (biased) {
    CopyRows({.from = layer.qkv_bias.As<void>(),
              .from_stride = 0,
              .to = qkv_.As<void>(),
              .to_stride = qkv_width_,
              .rows = args().batch.rows,
              .dim = qkv_width_});
  }
  product_->Multiply({.type = model_.type,
                      .x = input_.As<void>(),
                      .x_stride = hidden_,
                      .weight = layer.qkv.As<void>(),
                      .out = qkv_.As<void>(),
                      .out_stride = qkv_width_,
                      .rows = args().batch.rows,
                      .inputs = hidden_,
                      .outputs = qkv_width_,
                      .add = biased});
}

// x += W in, a row of `in` being the first `inputs` of `in_stride` numbers.
void CudaForwardPass::AddToResidual(const GpuBuffer& weight, const GpuBuffer& in, int64_t in_stride,
                                    int32_t inputs) {
  product_->Multiply({.type = model_.type,
                      .x = in.As<void>(),
                      .x_stride = in_stride,
                      .weight = weight.As<void>(),
                      .out = x_.As<void>(),
                      .out_stride = hidden_,
                      .rows = args().batch.rows,
                      .inputs = inputs,
                      .outputs = hidden_,
                      .add = true});
}

void CudaForwardPass::RunLayer(uint32_t index) {
  const GpuLayer& layer = model_.layers[index];
  Norm(layer.attention_norm, x_.As<float>(), args().batch.rows);
  ProjectToQkv(layer);
  Append(index);
  Attend(index);
  RoundToInput(args().batch.rows, q_width_);
  AddToResidual(layer.attention_output, input_, q_width_, q_width_);

  Norm(layer.ffn_norm, x_.As<float>(), args().batch.rows);
  const int32_t gate_up_width = 2 * ffn_;
  product_->Multiply({.type = model_.type,
                      .x = input_.As<void>(),
                      .x_stride = hidden_,
                      .weight = layer.gate_up.As<void>(),
                      .out_type = model_.type,
                      .out = gate_up_.As<void>(),
                      .out_stride = gate_up_width,
                      .rows = args().batch.rows,
                      .inputs = hidden_,
                      .outputs = gate_up_width});
  gpu_->Check(kernels::cuda::SiluMul({.type = model_.type,
                                      .gate = gate_up_.As<void>(),
                                      .up = gate_up_.As<uint16_t>() + ffn_,
                                      .in_stride = gate_up_width,
                                      .out = gate_up_.As<void>(),
                                      .out_stride = gate_up_width,
                                      .rows = args().batch.rows,
                                      .dim = ffn_},
                                     gpu_->stream()),
              "SiluMul");
  AddToResidual(layer.down, gate_up_, gate_up_width, ffn_);
}

// Keys and values into the blocks, keys and queries rotated; queries to the type of K/V, of codes
// to f16.
void CudaForwardPass::Append(uint32_t layer) {
  float* const qkv = qkv_.As<float>();
  const kernels::KvLayer kv = LayerOfModel(config_, options_, layer);
  gpu_->Check(kernels::cuda::Append({.layer = kv,
                                     .batch = args().batch,
                                     .type = DType::kF32,
                                     .k = qkv + q_width_,
                                     .k_stride = qkv_width_,
                                     .v = qkv + q_width_ + kv_width_,
                                     .v_stride = qkv_width_,
                                     .rotation = {.cos_sin = args().angles,
                                                  .begin = 0,
                                                  .dim = static_cast<int32_t>(config_.head_dim)},
                                     .q = qkv,
                                     .q_stride = qkv_width_,
                                     .q_heads = static_cast<int32_t>(config_.heads)},
                                    gpu_->stream()),
              "Append");
  CopyRows({.from = qkv,
            .from_stride = qkv_width_,
            .to_type = kernels::cuda::DecodeQueryType(kv),
            .to = q_.As<void>(),
            .to_stride = q_width_,
            .rows = args().batch.rows,
            .dim = q_width_});
}

template <typename Params>
Params CudaForwardPass::AttentionOf(uint32_t layer) const {
  Params params;
  params.layer = LayerOfModel(config_, options_, layer);
  params.q_heads = static_cast<int32_t>(config_.heads);
  params.scale = AttentionScale(config_);
  params.window = step_.options().window;
  params.sinks = step_.options().sinks;
  params.q = q_.As<void>();
  params.q_stride = q_width_;
  params.out = scratch_.As<void>();
  params.out_stride = q_width_;
  params.chunks = args().batch.chunks;
  return params;
}

kernels::cuda::DecodeParams CudaForwardPass::DecodeOf(uint32_t layer) const {
  auto params = AttentionOf<kernels::cuda::DecodeParams>(layer);
  params.plan = args().decode;
  params.workspace = workspace_.As<std::byte>();
  return params;
}

kernels::cuda::PrefillParams CudaForwardPass::PrefillOf(uint32_t layer) const {
  auto params = AttentionOf<kernels::cuda::PrefillParams>(layer);
  params.plan = args().prefill;
  return params;
}

// Each writes the rows of its own chunks.
void CudaForwardPass::Attend(uint32_t layer) {
  if (args().decode.piece_count > 0) {
    gpu_->Check(kernels::cuda::Decode(DecodeOf(layer), gpu_->stream()), "Decode");
  }
  if (args().prefill.tile_count > 0) {
    gpu_->Check(kernels::cuda::Prefill(PrefillOf(layer), gpu_->stream()), "Prefill");
  }
}

void CudaForwardPass::ComputeLogits() {
  CopyRows({.from = x_.As<void>(),
            .from_stride = hidden_,
            .indices = args().wanted_rows,
            .to = scratch_.As<void>(),
            .to_stride = hidden_,
            .rows = args().wanted,
            .dim = hidden_});
  Norm(model_.final_norm, scratch_.As<float>(), args().wanted);
  const auto vocab = static_cast<int32_t>(config_.vocab);
  const GpuBuffer& output = config_.tied_embeddings ? model_.embedding : model_.output;
  product_->Multiply({.type = model_.type,
                      .x = input_.As<void>(),
                      .x_stride = hidden_,
                      .weight = output.As<void>(),
                      .out = logits_.As<void>(),
                      .out_stride = vocab,
                      .rows = args().wanted,
                      .inputs = hidden_,
                      .outputs = vocab});
}

// UNIMPLEMENTED naming what kernels/cuda has no kernel for.
absl::Status CheckSupported(const ModelConfig& config, const TransformerOptions& options) {
  const auto refuse = [](absl::string_view field, auto value, absl::string_view allowed) {
    return absl::UnimplementedError(
        absl::StrCat(field, ": ", value, "; allowed on cuda: ", allowed));
  };
  if (options.keys_before_rope) return refuse("keys_before_rope", "true", "false");
  if (options.kv_dtype == Dtype::kF32) return refuse("kv_dtype", "f32", "bf16, f16, f8_e4m3, i8");
  if (config.hidden % kUnit != 0) return refuse("hidden_size", config.hidden, "a multiple of 4");
  if (config.ffn % kUnit != 0) return refuse("intermediate_size", config.ffn, "a multiple of 4");
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<ForwardPass>> CreateCudaForwardPass(
    Weights weights, const TransformerOptions& options) {
  const ModelConfig config = weights.config();
  absl::Status status = CheckSupported(config, options);
  if (!status.ok()) return status;
  absl::StatusOr<std::unique_ptr<Gpu>> gpu = Gpu::Open();
  if (!gpu.ok()) return gpu.status();
  int32_t decode_blocks = 0;
  const cudaError_t shape = kernels::cuda::DecodeBlocksAtOnce(
      LayerOfModel(config, options, 0), static_cast<int32_t>(config.heads), &decode_blocks);
  if (shape == cudaErrorInvalidValue) {
    return absl::UnimplementedError(absl::StrCat(
        "head_dim: ", config.head_dim, "; allowed on cuda for kv_dtype ",
        DtypeName(options.kv_dtype), ": ",
        IsQuantised(options.kv_dtype) ? "64, 96, 128, 256" : "16, 32, 64, 80, 96, 128, 256"));
  }
  status = FromCuda(shape, "the decode kernel");
  if (!status.ok()) return status;
  absl::StatusOr<std::unique_ptr<GpuProduct>> product = GpuProduct::Create(**gpu);
  if (!product.ok()) return product.status();
  absl::StatusOr<GpuModel> model = UploadModel(std::move(weights), **gpu);
  if (!model.ok()) return model.status();
  auto pass = std::make_unique<CudaForwardPass>(*std::move(gpu), *std::move(product),
                                                *std::move(model), config, options, decode_blocks);
  status = pass->Allocate();
  if (!status.ok()) return status;
  return absl::StatusOr<std::unique_ptr<ForwardPass>>(std::move(pass));
}

}  // namespace larder::worker
