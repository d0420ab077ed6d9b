// Small models and the blocks they write, for tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "client/worker/transformer.h"
#include "client/worker/weights.h"

namespace larder::worker {

// Geometry with corners: heads * head_dim is not `hidden`, no width is a multiple of a panel.
ModelConfig SmallConfig();

// Noise of SmallConfig() (or another) behind a Transformer; a test fails where there is none.
std::unique_ptr<Transformer> SmallTransformer(const TransformerOptions& options,
                                              const ModelConfig& config = SmallConfig());

std::vector<uint32_t> RandomTokens(std::mt19937& random, size_t count, uint32_t vocab);

// Blocks of one sequence, in shuffled places and full of NaN: what is read before it is written
// shows.
class TestBlocks {
 public:
  TestBlocks(const KvGeometry& geometry, size_t tokens, std::mt19937& random);
  TestBlocks(const TestBlocks&) = delete;
  TestBlocks& operator=(const TestBlocks&) = delete;

  std::span<std::byte* const> table() const { return table_; }
  // K/V of tokens [0, count), bytes in the order [layer][K or V][kv_head][token], each row with its
  // scale if it has one: the same whatever block_tokens is.
  std::vector<std::byte> Gather(size_t count) const;
  // Whether all bytes of tokens [begin, end) are as they were at first.
  bool Untouched(size_t begin, size_t end) const;

 private:
  // A row's elements and its scale, which is empty where rows have none.
  struct Row {
    std::span<const std::byte> elements;
    std::span<const std::byte> scale;
  };
  Row RowOf(uint32_t layer, uint32_t part, uint32_t head, size_t token) const;

  const KvGeometry geometry_;
  std::vector<std::byte> memory_;
  std::vector<std::byte*> table_;
};

}  // namespace larder::worker
