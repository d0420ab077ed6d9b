#include "client/worker/tile_product.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/worker/tile_check.h"
#include "oneapi/dnnl/dnnl.hpp"

extern "C" {
// Of the OpenMP runtime that oneDNN brings along: its headers belong to a compiler, and ours
// need not be the one that oneDNN was built with.
int omp_get_max_threads();
void omp_set_num_threads(int threads);
}

namespace larder::worker {
namespace {

using dnnl::memory;

// For one token to some, for a batch of them, and for prompts; measured in README.md.
constexpr uint32_t kTileRows[] = {kTileRowsMax, 64, 32, 16, 8, 4};

// The library decides by this thread's number of OpenMP threads how it divides a product, when
// a product is made and when it is computed. With one it does not.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  const int before_;
};

const dnnl::engine& Engine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

const char* TypeName(ProductType type) { return type == ProductType::kBf16 ? "bf16" : "f32"; }

memory::data_type DataType(ProductType type) {
  return type == ProductType::kBf16 ? memory::data_type::bf16 : memory::data_type::f32;
}

memory At(const memory::desc& desc, const void* place) {
  return memory(desc, Engine(), const_cast<void*>(place));
}

dnnl::matmul::primitive_desc Describe(const memory::desc& x, const memory::desc& weights,
                                      const memory::desc& out) {
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
#if DNNL_VERSION_MAJOR >= 3  // Ubuntu 24.04; Debian 12 has 2.6
  return dnnl::matmul::primitive_desc(Engine(), x, weights, out, attributes);
#else
  return dnnl::matmul::primitive_desc(dnnl::matmul::desc(x, weights, out), attributes, Engine());
#endif
}

}  // namespace

bool HasBf16Products() {
  // Below it the library emulates bf16, slower than f32.
  return dnnl::get_effective_cpu_isa() >= dnnl::cpu_isa::avx512_core_bf16;
}

struct TileProduct::Library {
  struct Tile {
    dnnl::matmul product;
    memory::desc x, out, scratchpad;
  };

  // Throws dnnl::error where there is no such product.
  Library(uint32_t inputs, uint32_t outputs, ProductType type);

  const uint32_t inputs, outputs;
  const ProductType type;
  memory::desc plain;   // [inputs][outputs], as the transpose of rows of weights
  memory::desc packed;  // the same in the library's order
  std::vector<uint32_t> rows;
  std::vector<Tile> tiles;  // by index of `rows`
  size_t scratchpad_bytes = 0;
};

TileProduct::Library::Library(uint32_t inputs, uint32_t outputs, ProductType type)
    : inputs(inputs),
      outputs(outputs),
      type(type),
      plain({inputs, outputs}, DataType(type), memory::format_tag::ba) {
  const OneThread one_thread;
  // The library chooses an order of weights for the largest tile; the others must take it.
  packed = memory::desc({inputs, outputs}, DataType(type), memory::format_tag::any);
  for (const uint32_t tile_rows : kTileRows) {
    Tile tile;
    tile.x = memory::desc({tile_rows, inputs}, DataType(type), memory::format_tag::ab);
    tile.out = memory::desc({tile_rows, outputs}, memory::data_type::f32, memory::format_tag::ab);
    const dnnl::matmul::primitive_desc chosen = Describe(tile.x, packed, tile.out);
    packed = chosen.weights_desc();
    tile.scratchpad = chosen.scratchpad_desc();
    tile.product = dnnl::matmul(chosen);
    scratchpad_bytes = std::max(scratchpad_bytes, tile.scratchpad.get_size());
    tiles.push_back(std::move(tile));
    rows.push_back(tile_rows);
  }
}

TileProduct::TileProduct(std::unique_ptr<Library> library) : library_(std::move(library)) {}
TileProduct::TileProduct(TileProduct&&) noexcept = default;
TileProduct& TileProduct::operator=(TileProduct&&) noexcept = default;
TileProduct::~TileProduct() = default;

absl::StatusOr<TileProduct> TileProduct::Create(uint32_t inputs, uint32_t outputs,
                                                ProductType type) {
  std::unique_ptr<Library> library;
  try {
    library = std::make_unique<Library>(inputs, outputs, type);
  } catch (const dnnl::error& error) {
    return absl::UnimplementedError(absl::StrCat("oneDNN: no product of ", inputs, " by ", outputs,
                                                 " in ", TypeName(type), ": ", error.what()));
  }
  TileProduct product(std::move(library));
  const absl::StatusOr<std::vector<size_t>> equal = EqualTiles(product);
  if (!equal.ok()) return equal.status();
  if (equal->empty()) {
    return absl::UnimplementedError(absl::StrCat("oneDNN: rows of a product of ", inputs, " by ",
                                                 outputs, " in ", TypeName(type),
                                                 " depend on their place in every tile"));
  }
  std::vector<uint32_t> rows;
  std::vector<Library::Tile> tiles;
  for (const size_t tile : *equal) {
    rows.push_back(product.library_->rows[tile]);
    tiles.push_back(std::move(product.library_->tiles[tile]));
  }
  product.library_->rows = std::move(rows);
  product.library_->tiles = std::move(tiles);
  return product;
}

uint32_t TileProduct::inputs() const { return library_->inputs; }
uint32_t TileProduct::outputs() const { return library_->outputs; }
ProductType TileProduct::type() const { return library_->type; }
std::span<const uint32_t> TileProduct::tile_rows() const { return library_->rows; }
size_t TileProduct::panel_bytes() const { return library_->packed.get_size(); }
size_t TileProduct::scratchpad_bytes() const { return library_->scratchpad_bytes; }

// An exception below would be memory that the library lacks for itself; noexcept ends the
// process there.
void TileProduct::Pack(const std::byte* rows, std::byte* panel) const noexcept {
  const OneThread one_thread;
  dnnl::stream stream(Engine());
  memory from = At(library_->plain, rows);
  memory to = At(library_->packed, panel);
  dnnl::reorder(from, to).execute(stream, from, to);
  stream.wait();
}

void TileProduct::Multiply(size_t tile, const std::byte* x, const std::byte* panel, float* out,
                           std::byte* scratchpad) const noexcept {
  const OneThread one_thread;
  dnnl::stream stream(Engine());
  const Library::Tile& shape = library_->tiles[tile];
  shape.product.execute(stream, {{DNNL_ARG_SRC, At(shape.x, x)},
                                 {DNNL_ARG_WEIGHTS, At(library_->packed, panel)},
                                 {DNNL_ARG_DST, At(shape.out, out)},
                                 {DNNL_ARG_SCRATCHPAD, At(shape.scratchpad, scratchpad)}});
  stream.wait();
}

}  // namespace larder::worker
