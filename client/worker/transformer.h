// Transformer: the forward pass over paged K/V. It writes each token's keys and values into
// the caller's blocks and attends to what is already there, in place.
//
//   Chunk     tokens at positions [position, position + n) of one sequence
//   blocks    |  0  |  1  |  2  |  3  |     the sequence's blocks from its start
//             |<- read  ->|<- written ->|
//
// Thread safety: one call at a time; Forward uses its own threads inside.
//
// Invariants:
//   1. On the CPU a row is a row: the K/V written and the logits given for a token depend, bit for bit, on
//      nothing but the weights, the options and the sequence up to that token. Not on how the
//      sequence was cut into chunks, on the other chunks of the call, on the tokens a block
//      holds, or on the number of threads. K/V read from a cache and K/V just computed are
//      therefore the same, and so are the tokens that follow. (block_tokens is part of the
//      bytes' layout, never of the arithmetic; kv_dtype is part of both.) On CUDA all of this holds
//      up to the rounding of sums: the matrix library adds up in an order that depends on how many
//      rows there are, and attention has a kernel for one token and another for several. K/V from a
//      cache are then K/V that could have been computed, and near ties may be decided differently.
//   2. Forward writes the blocks' positions of its chunks and no other byte.
//   3. An error changed nothing: chunks are checked before anything is computed. But for a GPU that
//      fails: that is INTERNAL, final, and what was to be written is undefined.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/worker/block_memory.h"
#include "client/worker/kv_geometry.h"
#include "client/worker/model_config.h"
#include "client/worker/weights.h"

namespace larder::worker {

// Each token attends to the first `sink_tokens` tokens of its block table and to the last
// `window_tokens`, its own included (StreamingLLM, Xiao et al. 2023).
struct AttentionWindow {
  uint32_t sink_tokens = 0;
  uint32_t window_tokens = 0;  // at least 1
};

enum class Device : uint8_t { kCpu, kCuda };

enum class Arithmetic : uint8_t {
  kAuto,  // kBf16 where the processor multiplies bf16 (avx512_bf16), else kF32
  kBf16,  // products of bf16 by bf16, accumulated in f32; half the memory traffic
  kF32,   // not on CUDA
};

struct TransformerOptions {
  // kCuda: the first CUDA device that this process may use. Its products are 16 bits wide, of the
  // model's type; K/V are any type but f32, and keys are cached after rotation.
  Device device = Device::kCpu;
  Dtype kv_dtype = Dtype::kBf16;
  uint32_t block_tokens = 16;  // 1 to 1,024
  std::optional<AttentionWindow> window = std::nullopt;
  // Keys are cached before rotation and rotated when they are read, each by its index in the
  // chunk's block table; queries likewise. Blocks may then be taken out of the middle of a
  // table, and `position` counts what is left: positions never pass the trained length
  // (StreamingLLM, section 3.2).
  bool keys_before_rope = false;
  Arithmetic arithmetic = Arithmetic::kAuto;
  bool cuda_graphs = true;  // on CUDA, of steps that only decode; changes no bit
  uint32_t threads = 0;  // 0: one for each CPU this process may use
  // The most rows (tokens, over all chunks) of one Forward; sizes the activations.
  uint32_t rows_max = 1'024;
};

enum class Logits : uint8_t { kNone, kLast, kAll };

struct Chunk {
  std::span<const uint32_t> tokens;  // 1 or more, each below the vocabulary
  uint32_t position = 0;             // of the first token in its sequence
  // The sequence's blocks from position 0, in block_memory() or memory like it, each
  // geometry().BlockBytes() long and 64-byte aligned; enough to cover position + tokens.size(). A block that left the window for good
  // may be replaced by any readable memory of a block's size. Chunks of a call may share the
  // blocks that all of them only read.
  std::span<std::byte* const> blocks;
  Logits logits = Logits::kLast;
};

// How many rows of logits these chunks ask for.
uint64_t LogitRows(std::span<const Chunk> chunks);

class Transformer {
 public:
  // Packs the weights for the matrix library; what is packed is given up afterwards.
  // INVALID_ARGUMENT for options out of bounds; UNIMPLEMENTED where this processor's matrix
  // library does not keep rows apart (README, "A row is a row"), and for what the device does not
  // do; FAILED_PRECONDITION without a device.
  static absl::StatusOr<std::unique_ptr<Transformer>> Create(
      Weights weights, const TransformerOptions& options = {});
  ~Transformer();

  const ModelConfig& config() const;
  const TransformerOptions& options() const;  // arithmetic and threads as chosen, not kAuto or 0
  const KvGeometry& geometry() const;
  BlockMemory& block_memory();  // where blocks must lie that Forward can work on

  // One forward pass. `logits` is [LogitRows(chunks)][vocab], in the order of the chunks and of
  // the tokens in them. INVALID_ARGUMENT naming chunk, field, value and bound.
  absl::Status Forward(std::span<const Chunk> chunks, std::span<float> logits);

 private:
  class Impl;
  explicit Transformer(std::unique_ptr<Impl> impl);

  std::unique_ptr<Impl> impl_;
};

}  // namespace larder::worker
