// NvmeIndex: what is on NVMe, in at most 32 bytes of memory a slot.
//
// Blocks are found by chained key: hash(key) picks a bucket, and an entry matches when 32
// bits of the key and the parent's slot agree. That is a hint: the record on the drive
// holds the whole key and is compared when the block is read.
//
// Thread safety: none; the owner locks. Deterministic; does no I/O.
//
// Invariants:
//   1. Prefix-closed: the parent of every entry is an entry; it counts its children.
//   2. Only entries that are durable, childless, not held and not in memory as well are
//      evicted, least recently touched first. (Evicting what memory still has would only
//      mean writing it again.) A touch counts for all ancestors: when a child goes, its
//      parent is at least as recent.
//   3. An entry that is being written, or was condemned, is not found.
//
// Memory: 20 bytes an entry, at most 2 for its share of a bucket, and at most 9 for its place
// among the candidates for eviction: 31 a slot.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "storage/slot_allocator.h"
#include "storage/types.h"

namespace larder {

class NvmeIndex {
 public:
  // `slots` is the tier's allocator and must outlive the index, which is its only user.
  explicit NvmeIndex(SlotAllocator& slots);

  // The durable child of `parent` (empty for a first block) with this key, or an empty Slot.
  Slot Find(const BlockKey& key, Slot parent) const;

  // Takes a slot for writing; the entry is held until Commit or Abort. When the pool is
  // full, evicts; an empty Slot when nothing can go. `parent` may itself be being written.
  Slot Claim(SlotAllocator::Pool pool, const BlockKey& key, Slot parent);
  // Whether a Claim is likely to find a slot: one is free, or more than the one entry that
  // might be the new one's parent can go.
  bool MayClaim(SlotAllocator::Pool pool) const;
  // The block is durable. It is in memory, whence it was written.
  void Commit(Slot slot);
  // A durable block has, or no longer has, a copy in memory.
  void SetInMemory(Slot slot, bool in_memory);
  // The write failed.
  void Abort(Slot slot);
  // What is stored there is not the block: it is never found again, and goes, held or not,
  // as soon as nothing is below it.
  void Condemn(Slot slot);

  // A durable entry found at start; the slot is already adopted.
  void Recover(Slot slot, const BlockKey& key, Slot parent);

  // Makes the entry the most recent of all.
  void Touch(Slot slot);
  // A held entry is not evicted. Not counted: the last Release ends it.
  void Hold(Slot slot);
  void Release(Slot slot);

  // Drops a durable entry and, first, everything below it. False, with nothing changed,
  // when any of them is held or being written.
  bool Drop(Slot slot);
  // Drops the least recent candidate of the pool; false when there is none.
  bool EvictOne(SlotAllocator::Pool pool);
  // Empties one slab of `pool`, with all that is below its entries; false when each holds
  // something that cannot go. Rare; a pass over the whole index for each slab that is tried.
  bool ReclaimSlab(SlotAllocator::Pool pool);

  // Is this still the entry of `key`? A slot may have been evicted and taken anew.
  bool Is(Slot slot, uint32_t tag) const;

  uint64_t size() const { return size_; }
  uint64_t evictions() const { return evictions_; }
  uint64_t memory_bytes() const;
  // Called for each entry that goes, whatever the reason, before its slot is given back.
  void set_on_drop(std::function<void(Slot, uint32_t tag)> fn) { on_drop_ = std::move(fn); }
  void CheckInvariants() const;

 private:
  struct Entry {
    uint32_t tag = 0;
    Slot parent;
    uint32_t children : 24 = 0;
    uint32_t used : 1 = 0;
    uint32_t durable : 1 = 0;
    uint32_t held : 1 = 0;
    uint32_t candidate : 1 = 0;  // has an entry in the heap
    uint32_t condemned : 1 = 0;
    uint32_t in_memory : 1 = 0;
    uint32_t touch = 0;
    Slot next;  // in its bucket
  };
  static_assert(sizeof(Entry) == 20);
  struct Candidate {
    uint32_t touch;
    Slot slot;
    friend bool operator<(const Candidate& a, const Candidate& b) { return a.touch > b.touch; }
  };

  Entry& At(Slot slot);
  const Entry& At(Slot slot) const;
  uint32_t Now();
  void Link(Slot slot, Entry& entry);
  void Unlink(Slot slot, const Entry& entry);
  void GrowBuckets(uint64_t entries);
  static bool MayGo(const Entry& entry);
  void Offer(Slot slot);
  bool IsCandidate(Slot slot, SlotAllocator::Pool pool) const;
  void Remove(Slot slot);
  Entry& Create(Slot slot, const BlockKey& key, Slot parent);
  bool DropTrees(const std::function<bool(Slot)>& is_top);
  template <typename F>
  void ForEach(F&& f) const;

  static constexpr uint64_t kEntriesPerBucketMax = 4;

  SlotAllocator& slots_;
  std::vector<std::vector<Entry>> slabs_;  // by slab and index in the slab
  std::vector<Slot> buckets_;              // a power of two
  std::vector<std::vector<Candidate>> heaps_;  // by pool; min touch first, lazily
  std::function<void(Slot, uint32_t)> on_drop_;
  uint64_t size_ = 0;
  uint64_t evictions_ = 0;
  uint32_t now_ = 0;
};

}  // namespace larder
