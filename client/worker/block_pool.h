// BlockPool: the worker's own K/V blocks, for what is not in the cache. One allocation of the
// memory that the forward pass works on; where that is the host's, pages are taken as they are
// used.
//
// Thread safety: one thread at a time.
//
// Invariants:
//   1. A block is in use as long as a reference to it exists; samples of one prompt share.
//   2. The pool outlives its blocks, and its memory the pool.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "client/worker/block_memory.h"

namespace larder::worker {

// Memory of one block and whatever keeps it good: the pool's count, or a lease. Shared, because
// several sequences read a common prefix and the last of them gives it back.
using BlockRef = std::shared_ptr<std::byte>;

class BlockPool {
 public:
  // `block_bytes` > 0; blocks are aligned to 64 bytes whatever it is. RESOURCE_EXHAUSTED where the
  // memory is not to be had; INVALID_ARGUMENT where not even one block fits.
  static absl::StatusOr<std::unique_ptr<BlockPool>> Create(BlockMemory& memory, uint64_t pool_bytes,
                                                           uint64_t block_bytes);
  ~BlockPool();
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  // A free block: zeros if it was never taken before, else undefined. One must be free.
  BlockRef Take();
  // One block's bytes, of the pool's or another that passes read, into a block of the pool's.
  void Copy(std::byte* to, const std::byte* from) { memory_.Copy(to, from, block_bytes_); }

  // Whether blocks lie in a GPU's memory, where the CPU cannot touch them.
  bool on_device() const { return memory_.device().has_value(); }
  uint64_t blocks() const { return blocks_; }
  uint64_t used() const { return used_; }
  uint64_t block_bytes() const { return block_bytes_; }

 private:
  BlockPool(BlockMemory& memory, std::shared_ptr<std::byte> base, uint64_t blocks,
            uint64_t block_bytes, uint64_t stride_bytes);

  BlockMemory& memory_;
  const std::shared_ptr<std::byte> base_;
  const uint64_t blocks_;
  const uint64_t block_bytes_;
  const uint64_t stride_bytes_;
  uint64_t used_ = 0;
  uint64_t touched_ = 0;          // blocks from the start that were ever handed out
  std::vector<std::byte*> free_;  // of those; the last given back is the first taken
};

}  // namespace larder::worker
