#include "client/worker/kv_blocks.h"

#include <algorithm>
#include <utility>

#include "absl/status/statusor.h"
#include "storage/check.h"

namespace larder::worker {
namespace {

constexpr uint64_t kReserveMax = 65'536;  // blocks; kv_cache.proto

}  // namespace

KvBlocks::KvBlocks(BlockPool& pool, Lease lease, bool publish)
    : KvBlocks(pool, lease.block_tokens()) {
  lease_ = std::make_shared<Lease>(std::move(lease));
  reserving_ = publish;
  putting_ = publish;
  for (uint32_t position = 0; position < lease_->end(); ++position) {
    absl::StatusOr<std::byte*> block = Leased(position);
    if (!block.ok()) {
      reserving_ = false;
      break;
    }
    AppendLeased(*block);
  }
}

// Where the forward pass reaches a block of the lease, readable or reserved.
absl::StatusOr<std::byte*> KvBlocks::Leased(uint32_t position) const {
  if (pool_->on_device()) {
    const absl::StatusOr<uint64_t> address = lease_->DeviceAddress(position);
    if (!address.ok()) return address.status();
    return reinterpret_cast<std::byte*>(*address);
  }
  if (position >= lease_->end()) {
    const absl::StatusOr<std::span<std::byte>> block = lease_->Reserved(position);
    if (!block.ok()) return block.status();
    return block->data();
  }
  const absl::StatusOr<std::span<const std::byte>> block = lease_->Block(position);
  if (!block.ok()) return block.status();
  // Never written (invariant 2): kernels take one table for what they read and write.
  return const_cast<std::byte*>(block->data());
}

void KvBlocks::Append(BlockRef block) {
  table_.push_back(block.get());
  blocks_.push_back(std::move(block));
}

void KvBlocks::AppendLeased(std::byte* block) {
  Append(BlockRef(lease_, block));
  lender_ = lease_;
  ++leased_;
}

void KvBlocks::AppendLocal() {
  Append(pool_->Take());
  ++counts_.local;
}

void KvBlocks::Replace(uint32_t position, BlockRef block) {
  table_[position] = block.get();
  blocks_[position] = std::move(block);
}

// Takes more reserved blocks into the table; false when there are none to be had.
bool KvBlocks::AppendReserved(uint32_t blocks_expected) {
  const uint64_t want =
      std::min<uint64_t>(std::max(blocks_expected, size() + 1) - lease_->end(), kReserveMax);
  absl::StatusOr<uint32_t> reserved = lease_->ReserveUpTo(
      static_cast<uint32_t>(want), pool_->on_device() ? v1::TIER_GPU : v1::TIER_UNSPECIFIED);
  if (!reserved.ok()) return false;
  const uint32_t before = size();
  while (size() < lease_->end() + *reserved) {
    absl::StatusOr<std::byte*> block = Leased(size());
    if (!block.ok()) return false;
    AppendLeased(*block);
  }
  return size() > before;
}

void KvBlocks::Grow(uint64_t tokens, uint64_t tokens_expected) {
  const uint64_t want = BlocksOf(tokens);
  const auto expected = static_cast<uint32_t>(BlocksOf(std::max(tokens, tokens_expected)));
  while (size() < want && reserving_) reserving_ = AppendReserved(expected);
  while (size() < want) AppendLocal();
}

void KvBlocks::Publish(std::span<const uint32_t> tokens) {
  // What was reserved is published to its end, even when no more can be.
  if (!putting_) return;
  const uint32_t end = lease_->end();
  const auto whole =
      static_cast<uint32_t>(std::min<uint64_t>(tokens.size() / block_tokens_, leased_));
  if (whole <= end) return;
  const absl::StatusOr<v1::LeaseState> put = lease_->Put(
      tokens.subspan(uint64_t{end} * block_tokens_, uint64_t{whole - end} * block_tokens_));
  if (put.ok()) {
    counts_.published += whole - end;
  } else {
    putting_ = reserving_ = false;
  }
}

bool KvBlocks::Flush(absl::Duration timeout) {
  return lease_ != nullptr && lease_->Flush(timeout).ok();
}

KvBlocks KvBlocks::Fork(uint64_t tokens) {
  const auto whole = static_cast<uint32_t>(tokens / block_tokens_);
  LARDER_CHECK(BlocksOf(tokens) <= size());
  KvBlocks fork(*pool_, block_tokens_);
  fork.lender_ = lender_;
  for (uint32_t i = 0; i < whole; ++i) fork.Append(blocks_[i]);
  if (reserving_ && putting_ && lease_->end() == whole) {
    if (absl::StatusOr<Lease> lease = lease_->Fork(); lease.ok()) {
      fork.lease_ = std::make_shared<Lease>(*std::move(lease));
      fork.reserving_ = fork.putting_ = true;
      fork.leased_ = whole;
    }
  }
  if (whole * uint64_t{block_tokens_} < tokens) {
    fork.Grow(tokens, tokens);
    pool_->Copy(fork.table_[whole], table_[whole]);
  }
  return fork;
}

void KvBlocks::Truncate(uint64_t tokens) {
  LARDER_CHECK(lease_ == nullptr || tokens >= uint64_t{lease_->end()} * block_tokens_);
  const auto blocks = static_cast<uint32_t>(std::min<uint64_t>(BlocksOf(tokens), size()));
  blocks_.resize(blocks);
  table_.resize(blocks);
  leased_ = std::min(leased_, blocks);
}

void KvBlocks::MakePrivate(uint32_t position) {
  LARDER_CHECK(position < size());
  BlockRef copy = pool_->Take();
  ++counts_.local;
  pool_->Copy(copy.get(), table_[position]);
  Replace(position, std::move(copy));
}

}  // namespace larder::worker
