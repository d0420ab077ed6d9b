#include "client/worker/block_pool.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "storage/check.h"

namespace larder::worker {

absl::StatusOr<std::unique_ptr<BlockPool>> BlockPool::Create(uint64_t pool_bytes,
                                                             uint64_t block_bytes) {
  LARDER_CHECK(block_bytes > 0 && block_bytes % 64 == 0);
  const uint64_t blocks = pool_bytes / block_bytes;
  if (blocks == 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "pool_bytes: ", pool_bytes, " given, must be at least one block, ", block_bytes));
  }
  void* const base = mmap(nullptr, blocks * block_bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("pool_bytes: mapping ", blocks * block_bytes, " bytes: ", strerror(errno)));
  }
  return std::unique_ptr<BlockPool>(
      new BlockPool(static_cast<std::byte*>(base), blocks, block_bytes));
}

BlockPool::BlockPool(std::byte* base, uint64_t blocks, uint64_t block_bytes)
    : base_(base), blocks_(blocks), block_bytes_(block_bytes) {}

BlockPool::~BlockPool() {
  LARDER_CHECK(used_ == 0);
  munmap(base_, blocks_ * block_bytes_);
}

BlockRef BlockPool::Take() {
  LARDER_CHECK(used_ < blocks_);
  std::byte* block;
  if (free_.empty()) {
    block = base_ + touched_++ * block_bytes_;
  } else {
    block = free_.back();
    free_.pop_back();
  }
  ++used_;
  return BlockRef(block, [this](std::byte* given_back) {
    free_.push_back(given_back);
    --used_;
  });
}

}  // namespace larder::worker
