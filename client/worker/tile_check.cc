#include "client/worker/tile_check.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <utility>

#include "client/worker/bf16.h"
#include "client/worker/buffer.h"

namespace larder::worker {
namespace {

// Noise: sums of it in another order differ in most of their last bits.
void FillNoise(ProductType type, std::span<std::byte> out, uint32_t seed) {
  std::minstd_rand random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  const size_t element = ElementBytes(type);
  for (size_t at = 0; at + element <= out.size(); at += element) {
    const float value = uniform(random);
    const uint16_t half = ToBf16(value);
    std::memcpy(&out[at], type == ProductType::kBf16 ? static_cast<const void*>(&half) : &value,
                element);
  }
}

struct Experiment {
  explicit Experiment(const TileProduct& product)
      : product(product),
        row_bytes(size_t{product.inputs()} * ElementBytes(product.type())),
        out_row(product.outputs()) {}

  const TileProduct& product;
  const size_t row_bytes;  // of x
  const size_t out_row;    // floats
  Buffer x;                // as many rows as the largest tile
  Buffer tile_x;           // one tile
  Buffer panel, out, scratchpad;

  // Every row computed alone, in the first place of a tile whose other rows are zero.
  std::vector<float> Alone(size_t tile) const {
    const size_t rows = x.bytes().size() / row_bytes;
    std::vector<float> result(rows * out_row);
    std::fill(tile_x.bytes().begin(), tile_x.bytes().end(), std::byte{0});
    for (size_t row = 0; row < rows; ++row) {
      std::memcpy(tile_x.data(), x.data() + row * row_bytes, row_bytes);
      product.Multiply(tile, tile_x.data(), panel.data(), out.As<float>(), scratchpad.data());
      std::copy_n(out.As<float>(), out_row, result.data() + row * out_row);
    }
    return result;
  }

  // Every row computed among as many as the tile has.
  std::vector<float> Together(size_t tile) const {
    const size_t rows = x.bytes().size() / row_bytes;
    const size_t tile_rows = product.tile_rows()[tile];
    std::vector<float> result(rows * out_row);
    for (size_t row = 0; row < rows; row += tile_rows) {
      std::memcpy(tile_x.data(), x.data() + row * row_bytes, tile_rows * row_bytes);
      product.Multiply(tile, tile_x.data(), panel.data(), out.As<float>(), scratchpad.data());
      std::copy_n(out.As<float>(), tile_rows * out_row, result.data() + row * out_row);
    }
    return result;
  }
};

absl::StatusOr<Experiment> Prepare(const TileProduct& product) {
  Experiment experiment(product);
  const size_t rows = product.tile_rows().front();
  const std::pair<Buffer*, size_t> buffers[] = {
      {&experiment.x, rows * experiment.row_bytes},
      {&experiment.tile_x, rows * experiment.row_bytes},
      {&experiment.panel, product.panel_bytes()},
      {&experiment.out, rows * experiment.out_row * sizeof(float)},
      {&experiment.scratchpad, product.scratchpad_bytes()}};
  for (const auto& [buffer, bytes] : buffers) {
    absl::StatusOr<Buffer> allocated = Buffer::Allocate(bytes);
    if (!allocated.ok()) return allocated.status();
    *buffer = *std::move(allocated);
  }
  std::vector<std::byte> weights(experiment.out_row * experiment.row_bytes);
  FillNoise(product.type(), weights, 1);
  FillNoise(product.type(), experiment.x.bytes(), 2);
  product.Pack(weights.data(), experiment.panel.data());
  return experiment;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

absl::StatusOr<std::vector<size_t>> EqualTiles(const TileProduct& product) {
  const absl::StatusOr<Experiment> experiment = Prepare(product);
  if (!experiment.ok()) return experiment.status();
  std::vector<float> standard;
  std::vector<size_t> equal;
  for (size_t tile = product.tile_rows().size(); tile-- > 0;) {
    const std::vector<float> together = experiment->Together(tile);
    const std::vector<float> expected = standard.empty() ? experiment->Alone(tile) : standard;
    if (!SameBits(together, expected)) continue;
    standard = expected;
    equal.push_back(tile);
  }
  std::reverse(equal.begin(), equal.end());
  return equal;
}

}  // namespace larder::worker
