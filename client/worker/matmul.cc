#include "client/worker/matmul.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "client/worker/bf16.h"

namespace larder::worker {
namespace {

constexpr size_t kAlign = 64;  // bytes; what TileProduct asks for
constexpr size_t kOutTileFloats = size_t{kTileRowsMax} * kPanelOutputs;

constexpr size_t Aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

void RoundRow(const float* __restrict from, uint16_t* __restrict to, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = ToBf16(from[i]);
}

void RoundRow(ProductType type, const float* from, std::byte* to, size_t count) {
  if (type == ProductType::kF32) {
    std::memcpy(to, from, count * sizeof(float));
  } else {
    RoundRow(from, reinterpret_cast<uint16_t*>(to), count);
  }
}

void AddRow(const float* __restrict from, float* __restrict to, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] += from[i];
}

// The rows of a stack of tensors by their place in it.
class StackedRows {
 public:
  explicit StackedRows(std::span<const Tensor* const> tensors) {
    for (const Tensor* tensor : tensors) {
      for (uint64_t row = 0; row < tensor->rows; ++row) rows_.emplace_back(tensor, row);
    }
  }
  uint32_t size() const { return static_cast<uint32_t>(rows_.size()); }
  void Read(uint32_t row, std::span<float> out) const {
    ReadRow(*rows_[row].first, rows_[row].second, out);
  }

 private:
  std::vector<std::pair<const Tensor*, uint64_t>> rows_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Matmul>> Matmul::Create(ProductType type, uint32_t rows_max,
                                                       uint32_t inputs_max,
                                                       kernels::ThreadPool& pool) {
  std::unique_ptr<Matmul> matmul(new Matmul(type, pool));
  const size_t rows = size_t{rows_max} + kTileRowsMax;  // the last tile filled up
  absl::StatusOr<Buffer> input = Buffer::Allocate(rows * inputs_max * ElementBytes(type));
  if (!input.ok()) return input.status();
  absl::StatusOr<Buffer> out_tiles =
      Buffer::Allocate(static_cast<size_t>(pool.threads()) * kOutTileFloats * sizeof(float));
  if (!out_tiles.ok()) return out_tiles.status();
  matmul->input_ = *std::move(input);
  matmul->out_tiles_ = *std::move(out_tiles);
  return matmul;
}

absl::StatusOr<const TileProduct*> Matmul::Product(uint32_t inputs, uint32_t outputs) {
  for (const TileProduct& product : products_) {
    if (product.inputs() == inputs && product.outputs() == outputs) return &product;
  }
  absl::StatusOr<TileProduct> product = TileProduct::Create(inputs, outputs, type_);
  if (!product.ok()) return product.status();
  const absl::Status grown = GrowScratchpads(product->scratchpad_bytes());
  if (!grown.ok()) return grown;
  products_.push_back(*std::move(product));
  return &products_.back();
}

absl::Status Matmul::GrowScratchpads(size_t bytes) {
  if (Aligned(bytes) <= scratchpad_bytes_) return absl::OkStatus();
  absl::StatusOr<Buffer> scratchpads =
      Buffer::Allocate(static_cast<size_t>(pool_.threads()) * Aligned(bytes));
  if (!scratchpads.ok()) return scratchpads.status();
  scratchpads_ = *std::move(scratchpads);
  scratchpad_bytes_ = Aligned(bytes);
  return absl::OkStatus();
}

absl::StatusOr<PackedMatrix> Matmul::Pack(std::span<const Tensor* const> weights,
                                          std::span<const Tensor* const> biases) {
  const StackedRows rows(weights);
  PackedMatrix matrix;
  matrix.inputs_ = static_cast<uint32_t>(weights.front()->columns);
  matrix.outputs_ = rows.size();
  const uint32_t panels = (matrix.outputs_ + kPanelOutputs - 1) / kPanelOutputs;
  const uint32_t last_outputs = matrix.outputs_ - (panels - 1) * kPanelOutputs;
  for (const auto& [product, outputs] :
       {std::pair(&matrix.full_, std::min(kPanelOutputs, matrix.outputs_)),
        std::pair(&matrix.last_, last_outputs)}) {
    const absl::StatusOr<const TileProduct*> found = Product(matrix.inputs_, outputs);
    if (!found.ok()) return found.status();
    *product = *found;
  }
  matrix.panel_stride_bytes_ =
      Aligned(std::max(matrix.full_->panel_bytes(), matrix.last_->panel_bytes()));
  absl::StatusOr<Buffer> buffer = Buffer::Allocate(panels * matrix.panel_stride_bytes_);
  if (!buffer.ok()) return buffer.status();
  matrix.panels_ = *std::move(buffer);

  const size_t row_bytes = size_t{matrix.inputs_} * ElementBytes(type_);
  pool_.ParallelFor(panels, [&](int64_t panel, int) {
    const bool is_last = panel + 1 == panels;
    const TileProduct& product = is_last ? *matrix.last_ : *matrix.full_;
    std::vector<float> row(matrix.inputs_);
    std::vector<std::byte> rounded(product.outputs() * row_bytes);
    for (uint32_t i = 0; i < product.outputs(); ++i) {
      rows.Read(static_cast<uint32_t>(panel) * kPanelOutputs + i, row);
      RoundRow(type_, row.data(), rounded.data() + i * row_bytes, row.size());
    }
    product.Pack(rounded.data(),
                 matrix.panels_.data() + static_cast<size_t>(panel) * matrix.panel_stride_bytes_);
  });
  for (const Tensor* bias : biases) {
    const size_t begin = matrix.bias_.size();
    matrix.bias_.resize(begin + bias->columns);
    ReadRow(*bias, 0, std::span(matrix.bias_).subspan(begin));
  }
  return matrix;
}

void Matmul::RoundInput(const float* x, size_t x_stride, uint32_t rows, uint32_t inputs) {
  const size_t row_bytes = size_t{inputs} * ElementBytes(type_);
  pool_.ParallelFor(rows, [&](int64_t row, int) {
    const auto r = static_cast<size_t>(row);
    RoundRow(type_, x + r * x_stride, input_.data() + r * row_bytes, inputs);
  });
}

// The rows of one group times one panel, in as few tiles as do not waste more than a quarter.
void Matmul::MultiplyPanel(const PackedMatrix& matrix, uint32_t panel, uint32_t row_begin,
                           uint32_t row_end, int worker, float* out, size_t out_stride,
                           Output output) {
  const uint32_t column = panel * kPanelOutputs;
  const bool is_last = column + kPanelOutputs >= matrix.outputs_;
  const TileProduct& product = is_last ? *matrix.last_ : *matrix.full_;
  const size_t row_bytes = size_t{matrix.inputs_} * ElementBytes(type_);
  float* const tile_out = out_tiles_.As<float>() + static_cast<size_t>(worker) * kOutTileFloats;
  const std::span<const uint32_t> sizes = product.tile_rows();

  for (uint32_t row = row_begin; row < row_end;) {
    const uint32_t left = row_end - row;
    size_t tile = 0;
    while (tile + 1 < sizes.size() && sizes[tile] * 3 > left * 4) ++tile;
    product.Multiply(tile, input_.data() + row * row_bytes,
                     matrix.panels_.data() + panel * matrix.panel_stride_bytes_, tile_out,
                     scratchpads_.data() + static_cast<size_t>(worker) * scratchpad_bytes_);
    const uint32_t used = std::min(left, sizes[tile]);
    for (uint32_t i = 0; i < used; ++i) {
      float* const from = tile_out + size_t{i} * product.outputs();
      float* const to = out + (row + i) * out_stride + column;
      if (!matrix.bias_.empty()) AddRow(matrix.bias_.data() + column, from, product.outputs());
      if (output == Output::kAdd) {
        AddRow(from, to, product.outputs());
      } else {
        std::copy_n(from, product.outputs(), to);
      }
    }
    row += used;
  }
}

void Matmul::Multiply(const PackedMatrix& matrix, const float* x, size_t x_stride, uint32_t rows,
                      float* out, size_t out_stride, Output output) {
  RoundInput(x, x_stride, rows, matrix.inputs_);
  // All groups of rows of a panel follow each other: the panel is then still in a cache.
  const uint32_t groups = (rows + kTileRowsMax - 1) / kTileRowsMax;
  const uint32_t panels = (matrix.outputs_ + kPanelOutputs - 1) / kPanelOutputs;
  pool_.ParallelFor(int64_t{panels} * groups, [&](int64_t index, int worker) {
    const auto panel = static_cast<uint32_t>(index / groups);
    const auto row = static_cast<uint32_t>(index % groups) * kTileRowsMax;
    MultiplyPanel(matrix, panel, row, std::min(rows, row + kTileRowsMax), worker, out, out_stride,
                  output);
  });
}

}  // namespace larder::worker
