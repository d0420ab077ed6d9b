// StreamingBlocks: the block table of a text without an end, in memory of a fixed size
// (StreamingLLM, Xiao et al. 2023).
//
//   tokens so far   | 0 | 1 | 2 | 3 | 4 | 5 | 6 |
//   the table       | 0 |   given back  | 5 | 6 |     index 0, 1, 2
//                    sinks                window
//
// The first blocks stay, because attention puts its surplus there; the last ones are the window;
// what is between goes back to the pool. Keys are cached before rotation and rotated by their
// index in the table (TransformerOptions::keys_before_rope), so indices stay small for ever.
//
// Thread safety: one thread at a time.
//
// Invariants:
//   1. The table holds at most the sinks, the window, and what Grow asked for past it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "client/worker/block_pool.h"

namespace larder::worker {

class StreamingBlocks {
 public:
  // Whole blocks; `window_blocks` 0: nothing is ever given back.
  StreamingBlocks(BlockPool& pool, uint32_t block_tokens, uint32_t sink_blocks,
                  uint32_t window_blocks)
      : pool_(pool),
        block_tokens_(block_tokens),
        sink_blocks_(sink_blocks),
        window_blocks_(window_blocks) {}

  // Gives back the blocks that left the window, and makes room for `tokens` more, in whole blocks.
  // The pool must have them.
  void Grow(uint32_t tokens);

  // Where the tokens that Grow made room for begin in the table; for Chunk::position.
  uint32_t position() const { return position_; }
  std::span<std::byte* const> table() const { return table_; }
  uint64_t given_back() const { return given_back_; }  // blocks, so far

 private:
  BlockPool& pool_;
  const uint32_t block_tokens_;
  const uint32_t sink_blocks_;
  const uint32_t window_blocks_;
  std::vector<BlockRef> blocks_;
  std::vector<std::byte*> table_;  // their addresses
  uint32_t position_ = 0;
  uint64_t given_back_ = 0;
};

}  // namespace larder::worker
