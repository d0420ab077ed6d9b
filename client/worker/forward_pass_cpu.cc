#include "client/worker/forward_pass_cpu.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/worker/tensor_names.h"
#include "kernels/blocks.h"
#include "kernels/ops.h"
#include "kernels/rope.h"

namespace larder::worker {
namespace {

absl::Status Grow(Buffer& buffer, size_t bytes) {
  if (bytes <= buffer.bytes().size()) return absl::OkStatus();
  absl::StatusOr<Buffer> grown = Buffer::Allocate(std::bit_ceil(bytes));
  if (grown.ok()) buffer = *std::move(grown);
  return grown.status();
}

}  // namespace

CpuForwardPass::CpuForwardPass(Weights weights, const TransformerOptions& options)
    : weights_(std::move(weights)),
      config_(weights_.config()),
      options_(options),
      q_width_(config_.heads * config_.head_dim),
      kv_width_(config_.kv_heads * config_.head_dim),
      qkv_width_(q_width_ + 2 * kv_width_),
      frequencies_(RopeFrequencies(config_)),
      pool_(static_cast<int>(options.threads)),
      cpu_{.pool = pool_} {}

absl::StatusOr<std::unique_ptr<ForwardPass>> CpuForwardPass::Create(
    Weights weights, const TransformerOptions& options) {
  std::unique_ptr<CpuForwardPass> pass(new CpuForwardPass(std::move(weights), options));
  const absl::Status allocated = pass->Allocate();
  if (!allocated.ok()) return allocated;
  const ProductType type =
      options.arithmetic == Arithmetic::kBf16 ? ProductType::kBf16 : ProductType::kF32;
  const uint32_t inputs_max = std::max({pass->config_.hidden, pass->q_width_, pass->config_.ffn});
  absl::StatusOr<std::unique_ptr<Matmul>> matmul =
      Matmul::Create(type, options.rows_max, inputs_max, pass->pool_);
  if (!matmul.ok()) return matmul.status();
  pass->matmul_ = *std::move(matmul);
  absl::StatusOr<PackedModel> model = PackModel(pass->weights_, *pass->matmul_);
  if (!model.ok()) return model.status();
  pass->model_ = *std::move(model);
  return absl::StatusOr<std::unique_ptr<ForwardPass>>(std::move(pass));
}

// Between instruction sets the last bits differ.
std::string CpuForwardPass::arithmetic() const {
  return absl::StrCat(options_.arithmetic == Arithmetic::kBf16 ? "bf16 " : "f32 ",
                      kernels::IsaName(kernels::BestIsa()));
}

absl::Status CpuForwardPass::Allocate() {
  const std::pair<Buffer*, uint32_t> widths[] = {
      {&x_, config_.hidden},  {&normed_, config_.hidden},   {&qkv_, qkv_width_},
      {&attended_, q_width_}, {&gate_up_, 2 * config_.ffn}, {&angles_, config_.head_dim}};
  for (const auto& [buffer, width] : widths) {
    absl::StatusOr<Buffer> allocated =
        Buffer::Allocate(size_t{options_.rows_max} * width * sizeof(float));
    if (!allocated.ok()) return allocated.status();
    *buffer = *std::move(allocated);
  }
  return absl::OkStatus();
}

absl::Status CpuForwardPass::Run(std::span<const Chunk> chunks, std::span<float> logits) {
  const absl::Status prepared = Prepare(chunks);
  if (!prepared.ok()) return prepared;
  for (uint32_t layer = 0; layer < config_.layers; ++layer) RunLayer(layer);
  WriteLogits(chunks, logits);
  return absl::OkStatus();
}

// Everything of a call that can fail, and the embedding.
absl::Status CpuForwardPass::Prepare(std::span<const Chunk> chunks) {
  chunks_.clear();
  positions_.clear();
  uint32_t end_max = 0;
  const Tensor& embedding = weights_.tensor(kEmbedding);
  for (const Chunk& chunk : chunks) {
    const auto tokens = static_cast<uint32_t>(chunk.tokens.size());
    chunks_.push_back({.blocks = chunk.blocks.data(),
                       .position = static_cast<int32_t>(chunk.position),
                       .tokens = static_cast<int32_t>(tokens)});
    end_max = std::max(end_max, chunk.position + tokens);
    for (uint32_t i = 0; i < tokens; ++i) {
      const size_t row = positions_.size();
      ReadRow(embedding, chunk.tokens[i],
              std::span(x_.As<float>() + row * config_.hidden, config_.hidden));
      positions_.push_back(static_cast<int32_t>(chunk.position + i));
    }
  }
  rows_ = static_cast<uint32_t>(positions_.size());
  kernels::RopeAngles(cpu_, frequencies_, positions_, angles_.As<float>());
  if (options_.keys_before_rope) {
    const absl::Status extended = ExtendKeyAngles(end_max);
    if (!extended.ok()) return extended;
  }
  return Grow(workspace_, kernels::AttentionWorkspaceBytes(cpu_, Attention(0)));
}

absl::Status CpuForwardPass::ExtendKeyAngles(uint32_t positions) {
  if (positions <= key_angle_positions_) return absl::OkStatus();
  const absl::Status grown =
      Grow(key_angles_, size_t{positions} * config_.head_dim * sizeof(float));
  if (!grown.ok()) return grown;
  key_angle_positions_ =
      static_cast<uint32_t>(key_angles_.bytes().size() / sizeof(float) / config_.head_dim);
  std::vector<int32_t> all(key_angle_positions_);
  std::iota(all.begin(), all.end(), 0);
  kernels::RopeAngles(cpu_, frequencies_, all, key_angles_.As<float>());
  return absl::OkStatus();
}

void CpuForwardPass::Norm(const std::vector<float>& weight, const float* x, uint32_t rows) {
  kernels::RmsNorm(cpu_, {.x = x,
                          .x_stride = config_.hidden,
                          .out = normed_.As<float>(),
                          .out_stride = config_.hidden,
                          .weight = weight.data(),
                          .rows = rows,
                          .dim = static_cast<int32_t>(config_.hidden),
                          .epsilon = static_cast<float>(config_.rms_norm_eps)});
}

kernels::AttentionParams CpuForwardPass::Attention(uint32_t layer) const {
  kernels::AttentionParams params;
  params.layer = LayerOfModel(config_, options_, layer);
  params.q_heads = static_cast<int32_t>(config_.heads);
  params.scale = AttentionScale(config_);
  params.q = qkv_.As<float>();
  params.q_stride = qkv_width_;
  params.out = attended_.As<float>();
  params.out_stride = q_width_;
  params.chunks = chunks_;
  if (options_.window) {
    params.window = static_cast<int32_t>(options_.window->window_tokens);
    params.sinks = static_cast<int32_t>(options_.window->sink_tokens);
  }
  if (options_.keys_before_rope) {
    params.rotation = {.cos_sin = key_angles_.As<float>(),
                       .begin = 0,
                       .dim = static_cast<int32_t>(config_.head_dim)};
  }
  return params;
}

void CpuForwardPass::RunLayer(uint32_t index) {
  const PackedLayer& layer = model_.layers[index];
  float* const x = x_.As<float>();
  float* const normed = normed_.As<float>();
  float* const qkv = qkv_.As<float>();

  Norm(layer.attention_norm, x, rows_);
  matmul_->Multiply(layer.qkv, normed, config_.hidden, rows_, qkv, qkv_width_);
  const kernels::AttentionParams attention = Attention(index);
  // Keys lie behind the queries of their row, as more heads.
  const uint32_t rotated = config_.heads + (options_.keys_before_rope ? 0 : config_.kv_heads);
  kernels::ApplyRope(cpu_, {.x = qkv,
                            .rows = rows_,
                            .row_stride = qkv_width_,
                            .heads = static_cast<int32_t>(rotated),
                            .head_stride = config_.head_dim,
                            .dim = static_cast<int32_t>(config_.head_dim),
                            .cos_sin = angles_.As<float>()});
  kernels::Append(cpu_, {.layer = attention.layer,
                         .k = qkv + q_width_,
                         .k_stride = qkv_width_,
                         .v = qkv + q_width_ + kv_width_,
                         .v_stride = qkv_width_,
                         .chunks = chunks_});
  kernels::Attend(cpu_, attention, workspace_.bytes());
  matmul_->Multiply(layer.attention_output, attended_.As<float>(), q_width_, rows_, x,
                    config_.hidden, Output::kAdd);

  Norm(layer.ffn_norm, x, rows_);
  float* const gate = gate_up_.As<float>();
  const uint32_t gate_up_width = 2 * config_.ffn;
  matmul_->Multiply(layer.gate_up, normed, config_.hidden, rows_, gate, gate_up_width);
  kernels::SiluMul(cpu_, {.gate = gate,
                          .up = gate + config_.ffn,
                          .in_stride = gate_up_width,
                          .out = gate,
                          .out_stride = gate_up_width,
                          .rows = rows_,
                          .dim = static_cast<int32_t>(config_.ffn)});
  matmul_->Multiply(layer.down, gate, gate_up_width, rows_, x, config_.hidden, Output::kAdd);
}

void CpuForwardPass::WriteLogits(std::span<const Chunk> chunks, std::span<float> logits) {
  // The rows asked for move to the front of x, which nothing reads any more.
  float* const x = x_.As<float>();
  const size_t hidden = config_.hidden;
  uint32_t wanted = 0;
  size_t row = 0;
  for (const Chunk& chunk : chunks) {
    for (size_t i = 0; i < chunk.tokens.size(); ++i, ++row) {
      if (!WantsLogits(chunk, i)) continue;
      std::copy_n(x + row * hidden, hidden, x + size_t{wanted++} * hidden);
    }
  }
  if (wanted == 0) return;
  Norm(model_.final_norm, x, wanted);
  matmul_->Multiply(model_.output, normed_.As<float>(), hidden, wanted, logits.data(),
                    config_.vocab);
}

}  // namespace larder::worker
