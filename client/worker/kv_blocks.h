// KvBlocks: the table of blocks that hold one sequence's K/V, with the cache or without.
//
//   position   0 ............ end ............ end + reserved .......
//              the lease's:  read in place | written in place | the pool's
//                                           Publish moves `end`
//
// Without a lease every block is the pool's. Once the cache cannot give a block, the rest of the
// sequence is the pool's, too, and is not published: a path has no holes.
//
// Thread safety: one thread at a time.
//
// Invariants:
//   1. Every block of the table stays readable and writable where it is written, whatever
//      becomes of the daemon: references keep lease and mapping. A GPU's memory is not kept by
//      them: it goes with the daemon, and Lost says so.
//   2. A block that others can see, cached or shared with a fork, is never written. The two
//      blocks that would be are copied first: the unfinished tail by Fork, the block of a
//      recomputed token by MakePrivate.
//   3. Only whole blocks of computed K/V are published.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/lease.h"
#include "client/worker/block_pool.h"

namespace larder::worker {

class KvBlocks {
 public:
  struct Counts {
    uint64_t published = 0;
    uint64_t local = 0;  // taken from the pool
  };

  // All blocks are the pool's, which outlives this.
  KvBlocks(BlockPool& pool, uint32_t block_tokens) : pool_(&pool), block_tokens_(block_tokens) {}
  // Reads the lease's blocks, all of which are in GPU or HOST, on a GPU all in GPU; fewer where its
  // session is lost already. With `publish`, new blocks are reserved past them.
  KvBlocks(BlockPool& pool, Lease lease, bool publish);

  KvBlocks(KvBlocks&&) noexcept = default;
  KvBlocks& operator=(KvBlocks&&) noexcept = default;

  // For kernels; valid until the next call.
  std::span<std::byte* const> table() const { return table_; }
  uint32_t size() const { return static_cast<uint32_t>(table_.size()); }

  // Makes room for tokens [0, tokens). What must be reserved is asked for up to
  // `tokens_expected` at once, so that a prompt takes one call and not one a chunk.
  void Grow(uint64_t tokens, uint64_t tokens_expected);
  // The K/V of `tokens`, the sequence from its start, are in the table: publishes the whole
  // blocks that are not yet.
  void Publish(std::span<const uint32_t> tokens);
  // Waits until what was published survives a restart, at most `timeout`; no, where it does not.
  bool Flush(absl::Duration timeout);
  // A second table with the K/V of the first `tokens` tokens: whole blocks are shared, the
  // unfinished one is copied.
  KvBlocks Fork(uint64_t tokens);
  // Drops the blocks past those of the first `tokens` tokens, of which at least what is published
  // are left: K/V that turned out not to be wanted. Reserved blocks stay reserved for what comes.
  void Truncate(uint64_t tokens);
  // Puts a copy of the pool's in the place of a block, so that it may be written.
  void MakePrivate(uint32_t position);

  // The table has blocks of a daemon's GPU memory, and the session is over: nothing that was
  // computed from the table since may be used, and all of its K/V are to be computed again.
  bool Lost() const { return pool_->on_device() && lender_ != nullptr && !lender_->Alive(); }

  const Counts& counts() const { return counts_; }

 private:
  absl::StatusOr<std::byte*> Leased(uint32_t position) const;
  void Append(BlockRef block);
  void AppendLeased(std::byte* block);
  void AppendLocal();
  bool AppendReserved(uint32_t blocks_expected);
  void Replace(uint32_t position, BlockRef block);
  uint64_t BlocksOf(uint64_t tokens) const { return (tokens + block_tokens_ - 1) / block_tokens_; }

  BlockPool* pool_;
  uint32_t block_tokens_;
  std::shared_ptr<Lease> lease_;  // shared with the references to its blocks
  // A lease of the session whose blocks the table has, this one's or one forked from; null: it has
  // none.
  std::shared_ptr<const Lease> lender_;
  bool reserving_ = false;  // every block of the table is the lease's
  bool putting_ = false;    // no Put has failed
  uint32_t leased_ = 0;     // leading blocks that are the lease's, reserved ones included
  std::vector<BlockRef> blocks_;
  std::vector<std::byte*> table_;  // their addresses
  Counts counts_;
};

}  // namespace larder::worker
