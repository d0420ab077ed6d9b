// Matmul: products of rows with matrices that were packed once.
//
//   out[r] = W x[r] + bias                 W [outputs][inputs], as Hugging Face stores it
//
//            inputs                outputs, a panel of kPanelOutputs at a time
//        +-----------+          +----+----+----+--+
//   rows |   tile    |          |    |    |    |  |
//        +-----------+    *     |    |    |    |  |   each (tile, panel) is one call of the
//        |   tile    |          |    |    |    |  |   library on one thread
//        +-----------+          +----+----+----+--+
//
// Thread safety: one call at a time; Multiply shares its work out to the pool.
//
// Invariants:
//   1. A row of `out` depends, bit for bit, on its row of x and on the matrix alone. Every
//      element comes from one TileProduct, which keeps rows apart; panels are cut without
//      regard to rows or threads; the last tile is filled up with rows that nobody reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "client/worker/buffer.h"
#include "client/worker/tile_product.h"
#include "client/worker/weights.h"
#include "kernels/thread_pool.h"

namespace larder::worker {

// Wide enough for the library's kernels, narrow enough for threads to share a small matrix out
// evenly; measured in README.md.
inline constexpr uint32_t kPanelOutputs = 128;

class PackedMatrix {
 public:
  uint32_t inputs() const { return inputs_; }
  uint32_t outputs() const { return outputs_; }

 private:
  friend class Matmul;

  uint32_t inputs_ = 0;
  uint32_t outputs_ = 0;
  size_t panel_stride_bytes_ = 0;
  const TileProduct* full_ = nullptr;  // of all panels but the last one, which may be narrower
  const TileProduct* last_ = nullptr;
  Buffer panels_;
  std::vector<float> bias_;  // [outputs], or empty
};

enum class Output : uint8_t { kSet, kAdd };  // out[r] = ..., out[r] += ...

class Matmul {
 public:
  // For products of up to `rows_max` rows with up to `inputs_max` inputs. `pool` outlives this.
  // RESOURCE_EXHAUSTED where memory does not suffice.
  static absl::StatusOr<std::unique_ptr<Matmul>> Create(ProductType type, uint32_t rows_max,
                                                        uint32_t inputs_max,
                                                        kernels::ThreadPool& pool);

  // One matrix of the rows of `weights` one after the other, which have equal columns, and one
  // bias likewise (empty: none). Rounded to the product's type. UNIMPLEMENTED as
  // TileProduct::Create. The matrix dies before this object.
  absl::StatusOr<PackedMatrix> Pack(std::span<const Tensor* const> weights,
                                    std::span<const Tensor* const> biases = {});

  // x is [rows][matrix.inputs()], out [rows][matrix.outputs()]; strides in floats.
  void Multiply(const PackedMatrix& matrix, const float* x, size_t x_stride, uint32_t rows,
                float* out, size_t out_stride, Output output = Output::kSet);

 private:
  Matmul(ProductType type, kernels::ThreadPool& pool) : type_(type), pool_(pool) {}

  absl::StatusOr<const TileProduct*> Product(uint32_t inputs, uint32_t outputs);
  absl::Status GrowScratchpads(size_t bytes);
  void RoundInput(const float* x, size_t x_stride, uint32_t rows, uint32_t inputs);
  void MultiplyPanel(const PackedMatrix& matrix, uint32_t panel, uint32_t row_begin,
                     uint32_t row_end, int worker, float* out, size_t out_stride, Output output);

  const ProductType type_;
  kernels::ThreadPool& pool_;
  std::deque<TileProduct> products_;  // of different shapes; their addresses stay
  Buffer input_;                      // x in the type's elements, filled up to whole tiles
  Buffer out_tiles_;                  // one a worker
  Buffer scratchpads_;                // one a worker
  size_t scratchpad_bytes_ = 0;
};

}  // namespace larder::worker
