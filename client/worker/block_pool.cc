#include "client/worker/block_pool.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "storage/check.h"

namespace larder::worker {
namespace {

constexpr uint64_t kAlignment = 64;

}  // namespace

absl::StatusOr<std::unique_ptr<BlockPool>> BlockPool::Create(BlockMemory& memory,
                                                             uint64_t pool_bytes,
                                                             uint64_t block_bytes) {
  LARDER_CHECK(block_bytes > 0);
  const uint64_t stride_bytes = (block_bytes + kAlignment - 1) / kAlignment * kAlignment;
  const uint64_t blocks = pool_bytes / stride_bytes;
  if (blocks == 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "pool_bytes: ", pool_bytes, " given, must be at least one block, ", stride_bytes));
  }
  absl::StatusOr<std::shared_ptr<std::byte>> base = memory.Allocate(blocks * stride_bytes);
  if (!base.ok()) {
    return absl::Status(base.status().code(),
                        absl::StrCat("pool_bytes: ", base.status().message()));
  }
  return std::unique_ptr<BlockPool>(
      new BlockPool(memory, *std::move(base), blocks, block_bytes, stride_bytes));
}

BlockPool::BlockPool(BlockMemory& memory, std::shared_ptr<std::byte> base, uint64_t blocks,
                     uint64_t block_bytes, uint64_t stride_bytes)
    : memory_(memory),
      base_(std::move(base)),
      blocks_(blocks),
      block_bytes_(block_bytes),
      stride_bytes_(stride_bytes) {}

BlockPool::~BlockPool() { LARDER_CHECK(used_ == 0); }

BlockRef BlockPool::Take() {
  LARDER_CHECK(used_ < blocks_);
  std::byte* block;
  if (free_.empty()) {
    block = base_.get() + touched_++ * stride_bytes_;
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
