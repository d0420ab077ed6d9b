// SlotOwners: which node of a tree holds the block in each slot of a tier. The trees keep it;
// who must empty a slab asks it, instead of walking a tree.
//
// Thread safety: none; the cache locks.
//
// Invariants:
//   1. A slot has an owner exactly while a tree has it attached; 8 bytes a slot, of slabs that
//      were ever used.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "storage/slot_allocator.h"

namespace larder {

struct TreeNode;

class SlotOwners {
 public:
  explicit SlotOwners(const SlotAllocator& slots) : slots_(slots), slabs_(slots.slab_count()) {}

  // The slot is taken. `node` null: it has no owner any more.
  void Set(Slot slot, TreeNode* node) {
    const SlotAllocator::Place place = slots_.Locate(slot);
    std::vector<TreeNode*>& slab = slabs_[place.slab];
    // A slab without owners may have become another pool's, with slots of another size.
    if (place.index >= slab.size()) slab.resize(slots_.slots_in_slab(place.slab));
    slab[place.index] = node;
  }
  // By the slot's index in the slab; null: none. Past the end: none.
  std::span<TreeNode* const> In(uint32_t slab) const { return slabs_[slab]; }

 private:
  const SlotAllocator& slots_;
  std::vector<std::vector<TreeNode*>> slabs_;
};

}  // namespace larder
