// TileProduct: the only place that calls the matrix library, oneDNN, and only for products of
// fixed shapes on one thread.
//
//   out [rows][outputs]  =  x [rows][inputs]  *  panel       rows: one of tile_rows()
//
// `panel` is `outputs` rows of a weight matrix in the library's own order.
//
// Thread safety: immutable; const calls from any thread, each with its own scratchpad.
//
// Invariants:
//   1. A row of `out` depends, bit for bit, on its row of x and on the panel: not on the other
//      rows, on where in the tile it lies, or on which of tile_rows() the tile has. The library
//      does not promise that, so Create measures it, and leaves out the tiles that break it
//      (oneDNN's gemm sums a single row in another order than several).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "client/worker/kv_geometry.h"

namespace larder::worker {

inline constexpr uint32_t kTileRowsMax = 256;

// The kinds of product. kBf16 takes x and panel in bf16; both sum in f32 and give f32.
enum class ProductType : uint8_t { kBf16, kF32 };

constexpr uint32_t ElementBytes(ProductType type) { return type == ProductType::kBf16 ? 2 : 4; }

// This processor multiplies bf16 in hardware, and the library knows how.
bool HasBf16Products();

class TileProduct {
 public:
  // UNIMPLEMENTED where the library has no such product or keeps no tile's rows apart.
  static absl::StatusOr<TileProduct> Create(uint32_t inputs, uint32_t outputs, ProductType type);

  TileProduct(TileProduct&&) noexcept;
  TileProduct& operator=(TileProduct&&) noexcept;
  ~TileProduct();

  uint32_t inputs() const;
  uint32_t outputs() const;
  ProductType type() const;
  // In descending order; one at least.
  std::span<const uint32_t> tile_rows() const;
  size_t panel_bytes() const;
  size_t scratchpad_bytes() const;

  // `rows` is [outputs][inputs] in the type's elements, `panel` is aligned to 64 bytes.
  void Pack(const std::byte* rows, std::byte* panel) const noexcept;
  // x, out and scratchpad are aligned to 64 bytes. `tile`: an index of tile_rows().
  void Multiply(size_t tile, const std::byte* x, const std::byte* panel, float* out,
                std::byte* scratchpad) const noexcept;

 private:
  struct Library;
  explicit TileProduct(std::unique_ptr<Library> library);

  std::unique_ptr<Library> library_;
};

}  // namespace larder::worker
