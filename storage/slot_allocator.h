// SlotAllocator: who may use which bytes of a tier. Pure accounting; it touches no memory.
//
//   tier   | slab 0: pool A | slab 1: pool B  | slab 2: nobody's | slab 3: pool A |
//   slab 0 | slot | slot | slot | ... | rest smaller than a slot |
//
// A pool is one model's part of the tier; all its slots have one stride. Pools take slabs
// as they need them; a slab whose last slot is given back is nobody's again.
//
// Thread safety: none; the owner locks.
//
// Invariants:
//   1. A slab belongs to at most one pool, and then holds at least one taken slot.
//   2. Slots of one slab do not overlap, start at multiples of 4 KiB and end in the slab.
//   3. Take gives the lowest free slot of a slab, so neighbours in time are neighbours in
//      space as far as free space allows. TakeNear does that for the neighbours of one run,
//      however many runs grow at the same time.
#pragma once

#include <cstdint>
#include <vector>

#include "storage/types.h"

namespace larder {

class SlotAllocator {
 public:
  using Pool = uint32_t;

  // Where a slot is: its slab, and which of the slab's slots.
  struct Place {
    uint32_t slab = 0;
    uint32_t index = 0;
  };

  // `slab_bytes` is a multiple of 4 KiB. A last slab may be shorter. bytes == 0: no slots.
  SlotAllocator(uint64_t bytes, uint64_t slab_bytes);

  // A pool of slots of `block_bytes` rounded up to 4 KiB.
  Pool AddPool(uint32_t block_bytes);

  // An empty Slot when the pool's slabs are full and no slab is left.
  Slot Take(Pool pool);
  // The slot after `near`, which is taken, or the one before it. Where both are taken, or
  // `near` is empty: the first of a few free ones in a row, where a run may grow, else as Take.
  Slot TakeNear(Pool pool, Slot near);
  // CHECK: the slot is taken.
  void Give(Slot slot);
  // Takes this very slot (found on a drive at start). False when its slab is another
  // pool's, or the slot is misaligned, out of range or taken.
  bool Adopt(Pool pool, Slot slot);

  bool IsTaken(Slot slot) const;
  Place Locate(Slot slot) const;
  Slot At(Place place) const;
  Pool PoolOf(Slot slot) const;

  uint64_t bytes() const { return bytes_; }
  uint64_t slab_bytes() const { return slab_bytes_; }
  uint32_t slab_count() const { return static_cast<uint32_t>(slabs_.size()); }
  uint32_t slabs_free() const { return slabs_free_; }
  uint32_t stride(Pool pool) const { return pools_[pool].stride; }
  uint32_t slabs(Pool pool) const { return pools_[pool].slabs; }
  uint64_t taken(Pool pool) const { return pools_[pool].taken; }
  // Free slots in the pool's own slabs, and in those that are nobody's.
  uint64_t free(Pool pool) const;
  // All slots a pool could have if it were alone.
  uint64_t slots_max(Pool pool) const;
  // 0 when slab `slab` is nobody's or another pool's.
  uint32_t slots_in_slab(uint32_t slab) const { return slabs_[slab].slots; }
  // Whether a slot of the pool's fits into the slab; a last one may be too short.
  bool Fits(uint32_t slab, Pool pool) const { return SlabLength(slab) >= pools_[pool].stride; }
  uint32_t taken_in_slab(uint32_t slab) const { return slabs_[slab].taken; }
  bool SlabIsOf(uint32_t slab, Pool pool) const {
    return slabs_[slab].slots != 0 && slabs_[slab].pool == pool;
  }

 private:
  struct Slab {
    Pool pool = 0;
    uint32_t slots = 0;  // 0: nobody's
    uint32_t taken = 0;
    uint32_t hint = 0;                // no free slot below word `hint`
    std::vector<uint64_t> free_bits;  // 1: free
    bool open = false;                // listed in pools_[pool].open
  };
  struct PoolState {
    uint32_t stride = 0;
    uint32_t slabs = 0;
    uint64_t taken = 0;
    uint64_t free = 0;           // in its own slabs
    std::vector<uint32_t> open;  // slabs that may have a free slot
  };

  uint64_t SlabLength(uint32_t slab) const;
  void Assign(uint32_t slab, Pool pool);
  bool IsFree(uint32_t slab, uint32_t index) const;
  uint32_t Open(Pool pool);
  void Mark(uint32_t slab, uint32_t index);
  void Unassign(uint32_t slab);

  const uint64_t bytes_;
  const uint64_t slab_bytes_;
  std::vector<Slab> slabs_;
  std::vector<PoolState> pools_;
  std::vector<uint32_t> free_slabs_;  // may name slabs that Adopt has assigned since
  uint32_t slabs_free_ = 0;
};

}  // namespace larder
