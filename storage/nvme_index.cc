#include "storage/nvme_index.h"

#include <algorithm>
#include <limits>

#include "storage/check.h"

namespace larder {

NvmeIndex::NvmeIndex(SlotAllocator& slots) : slots_(slots), slabs_(slots.slab_count()) {
  buckets_.resize(1024);
}

NvmeIndex::Entry& NvmeIndex::At(Slot slot) {
  const SlotAllocator::Place place = slots_.Locate(slot);
  return slabs_[place.slab][place.index];
}

const NvmeIndex::Entry& NvmeIndex::At(Slot slot) const {
  return const_cast<NvmeIndex*>(this)->At(slot);
}

template <typename F>
void NvmeIndex::ForEach(F&& f) const {
  for (uint32_t slab = 0; slab < slabs_.size(); ++slab) {
    for (uint32_t index = 0; index < slabs_[slab].size(); ++index) {
      if (slabs_[slab][index].used) f(slots_.At({slab, index}), slabs_[slab][index]);
    }
  }
}

uint32_t NvmeIndex::Now() {
  if (now_ == std::numeric_limits<uint32_t>::max()) {
    // Once in four billion touches: halve all ages, which keeps their order.
    for (auto& slab : slabs_) {
      for (Entry& entry : slab) entry.touch /= 2;
    }
    for (auto& heap : heaps_) {
      for (Candidate& candidate : heap) candidate.touch /= 2;
    }
    now_ /= 2;
  }
  return ++now_;
}

void NvmeIndex::Link(Slot slot, Entry& entry) {
  Slot& bucket = buckets_[entry.tag & (buckets_.size() - 1)];
  entry.next = bucket;
  bucket = slot;
}

void NvmeIndex::Unlink(Slot slot, const Entry& entry) {
  Slot* at = &buckets_[entry.tag & (buckets_.size() - 1)];
  while (*at != slot) at = &At(*at).next;
  *at = entry.next;
}

void NvmeIndex::GrowBuckets(uint64_t entries) {
  if (entries <= kEntriesPerBucketMax * buckets_.size()) return;
  uint64_t count = buckets_.size();
  while (kEntriesPerBucketMax * count < entries) count *= 2;
  buckets_.assign(count, Slot());
  for (uint32_t slab = 0; slab < slabs_.size(); ++slab) {
    for (uint32_t index = 0; index < slabs_[slab].size(); ++index) {
      if (slabs_[slab][index].used) Link(slots_.At({slab, index}), slabs_[slab][index]);
    }
  }
}

Slot NvmeIndex::Find(const BlockKey& key, Slot parent) const {
  const uint32_t tag = key.Tag();
  for (Slot slot = buckets_[tag & (buckets_.size() - 1)]; slot; slot = At(slot).next) {
    const Entry& entry = At(slot);
    if (entry.tag == tag && entry.parent == parent && entry.durable) return slot;
  }
  return Slot();
}

NvmeIndex::Entry& NvmeIndex::Create(Slot slot, const BlockKey& key, Slot parent) {
  const SlotAllocator::Place place = slots_.Locate(slot);
  std::vector<Entry>& slab = slabs_[place.slab];
  if (slab.size() != slots_.slots_in_slab(place.slab)) {
    slab.assign(slots_.slots_in_slab(place.slab), Entry());
    slab.shrink_to_fit();
  }
  GrowBuckets(size_ + 1);
  Entry& entry = slab[place.index];
  LARDER_CHECK(!entry.used);
  entry = Entry();
  entry.tag = key.Tag();
  entry.parent = parent;
  entry.used = 1;
  entry.touch = Now();
  if (parent) At(parent).children += 1;
  Link(slot, entry);
  size_ += 1;
  return entry;
}

Slot NvmeIndex::Claim(SlotAllocator::Pool pool, const BlockKey& key, Slot parent) {
  // The parent must not be the victim that makes room for its own child.
  const bool was_held = parent && At(parent).held;
  if (parent) At(parent).held = 1;
  // Blocks of one prefix lie together, so a restore reads long stretches.
  Slot slot = slots_.TakeNear(pool, parent);
  while (!slot && EvictOne(pool)) slot = slots_.TakeNear(pool, parent);
  if (parent && !was_held) Release(parent);
  if (!slot) return slot;
  Create(slot, key, parent).held = 1;
  return slot;
}

bool NvmeIndex::MayClaim(SlotAllocator::Pool pool) const {
  return slots_.free(pool) > 0 || (heaps_.size() > pool && heaps_[pool].size() > 1);
}

void NvmeIndex::Commit(Slot slot) {
  Entry& entry = At(slot);
  LARDER_CHECK(entry.used && !entry.durable && entry.held);
  entry.durable = 1;
  entry.in_memory = 1;
  Release(slot);
}

void NvmeIndex::SetInMemory(Slot slot, bool in_memory) {
  At(slot).in_memory = in_memory;
  Offer(slot);
}

void NvmeIndex::Abort(Slot slot) {
  LARDER_CHECK(At(slot).used && !At(slot).durable);
  Condemn(slot);
}

void NvmeIndex::Condemn(Slot slot) {
  Entry& entry = At(slot);
  entry.durable = 0;
  entry.held = 0;
  entry.condemned = 1;
  if (entry.children == 0) Remove(slot);
}

void NvmeIndex::Recover(Slot slot, const BlockKey& key, Slot parent) {
  Create(slot, key, parent).durable = 1;
  Offer(slot);
}

void NvmeIndex::Touch(Slot slot) { At(slot).touch = Now(); }

void NvmeIndex::Hold(Slot slot) {
  if (At(slot).durable) At(slot).held = 1;
}

void NvmeIndex::Release(Slot slot) {
  At(slot).held = 0;
  Offer(slot);
}

bool NvmeIndex::MayGo(const Entry& entry) {
  return entry.durable && !entry.held && !entry.in_memory && entry.children == 0;
}

void NvmeIndex::Offer(Slot slot) {
  Entry& entry = At(slot);
  if (entry.candidate || !MayGo(entry)) return;
  const SlotAllocator::Pool pool = slots_.PoolOf(slot);
  if (heaps_.size() <= pool) heaps_.resize(pool + 1);
  std::vector<Candidate>& heap = heaps_[pool];
  if (heap.size() > 2 * size_ + 1024) {
    std::erase_if(heap, [&](const Candidate& c) { return !IsCandidate(c.slot, pool); });
    std::make_heap(heap.begin(), heap.end());
  }
  // In small steps: doubling could leave half of it unused, 8 bytes a slot.
  if (heap.size() == heap.capacity()) heap.reserve(heap.size() + heap.size() / 8 + 64);
  entry.candidate = 1;
  heap.push_back({entry.touch, slot});
  std::push_heap(heap.begin(), heap.end());
}

bool NvmeIndex::IsCandidate(Slot slot, SlotAllocator::Pool pool) const {
  return slots_.IsTaken(slot) && slots_.PoolOf(slot) == pool && At(slot).candidate;
}

bool NvmeIndex::EvictOne(SlotAllocator::Pool pool) {
  if (heaps_.size() <= pool) return false;
  std::vector<Candidate>& heap = heaps_[pool];
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    const Candidate candidate = heap.back();
    heap.pop_back();
    if (!IsCandidate(candidate.slot, pool)) continue;  // it has gone by another way
    Entry& entry = At(candidate.slot);
    entry.candidate = 0;
    if (!MayGo(entry)) continue;  // offered again when it may
    if (entry.touch != candidate.touch) {
      Offer(candidate.slot);
      continue;
    }
    evictions_ += 1;
    Remove(candidate.slot);
    return true;
  }
  return false;
}

// Takes the entry out and gives its slot back; its parent ages no faster than it did.
void NvmeIndex::Remove(Slot slot) {
  Entry& entry = At(slot);
  if (on_drop_) on_drop_(slot, entry.tag);
  LARDER_CHECK(entry.children == 0);
  Unlink(slot, entry);
  const Slot parent = entry.parent;
  const uint32_t touch = entry.touch;
  const SlotAllocator::Place place = slots_.Locate(slot);
  entry = Entry();
  size_ -= 1;
  slots_.Give(slot);
  if (slots_.slots_in_slab(place.slab) == 0) slabs_[place.slab] = {};
  if (parent) {
    Entry& above = At(parent);
    above.children -= 1;
    above.touch = std::max(above.touch, touch);
    if (above.condemned && above.children == 0) {
      Remove(parent);
    } else {
      Offer(parent);
    }
  }
}

// Drops every entry for which `is_top` holds and all below them; false, with nothing changed,
// when one of those cannot go. Visits each entry once.
bool NvmeIndex::DropTrees(const std::function<bool(Slot)>& is_top) {
  enum Fate : uint8_t { kUnknown, kStays, kGoes };
  std::vector<std::vector<Fate>> fates(slabs_.size());
  for (size_t slab = 0; slab < slabs_.size(); ++slab) fates[slab].resize(slabs_[slab].size());
  const auto fate_of = [&](Slot slot) -> Fate& {
    const SlotAllocator::Place place = slots_.Locate(slot);
    return fates[place.slab][place.index];
  };
  bool blocked = false;
  std::vector<Slot> leaves;
  std::vector<Slot> path;
  ForEach([&](Slot slot, const Entry& entry) {
    // 1. Up to an ancestor whose fate is known.  2. Down again, handing it on.
    Fate fate = kStays;
    path.clear();
    for (Slot at = slot; at && (fate = fate_of(at)) == kUnknown; at = At(at).parent) {
      path.push_back(at);
    }
    if (fate == kUnknown) fate = kStays;
    for (auto at = path.rbegin(); at != path.rend(); ++at) {
      if (fate != kGoes && is_top(*at)) fate = kGoes;
      fate_of(*at) = fate;
    }
    if (fate_of(slot) != kGoes) return;
    blocked = blocked || entry.held || !(entry.durable || entry.condemned);
    if (entry.children == 0) leaves.push_back(slot);
  });
  if (blocked) return false;
  while (!leaves.empty()) {
    const Slot leaf = leaves.back();
    leaves.pop_back();
    // Condemned ancestors go by themselves with their last child.
    std::vector<Slot> ancestors;
    for (Slot at = At(leaf).parent; at; at = At(at).parent) {
      ancestors.push_back(at);
      if (!At(at).condemned) break;
    }
    Remove(leaf);
    evictions_ += 1;
    for (Slot at : ancestors) {
      if (!slots_.IsTaken(at) || !At(at).used) continue;
      if (fate_of(at) == kGoes && At(at).children == 0) leaves.push_back(at);
    }
  }
  return true;
}

bool NvmeIndex::Drop(Slot slot) {
  return DropTrees([slot](Slot at) { return at == slot; });
}

bool NvmeIndex::ReclaimSlab(SlotAllocator::Pool pool) {
  for (uint32_t slab = 0; slab < slots_.slab_count(); ++slab) {
    if (!slots_.SlabIsOf(slab, pool)) continue;
    if (DropTrees([&](Slot at) { return slots_.Locate(at).slab == slab; })) return true;
  }
  return false;
}

bool NvmeIndex::Is(Slot slot, uint32_t tag) const {
  if (!slots_.IsTaken(slot)) return false;
  const Entry& entry = At(slot);
  return entry.used && entry.durable && entry.tag == tag;
}

uint64_t NvmeIndex::memory_bytes() const {
  uint64_t bytes = buckets_.capacity() * sizeof(Slot);
  for (const auto& slab : slabs_) bytes += slab.capacity() * sizeof(Entry);
  for (const auto& heap : heaps_) bytes += heap.capacity() * sizeof(Candidate);
  return bytes;
}

void NvmeIndex::CheckInvariants() const {
  uint64_t count = 0;
  std::vector<std::vector<uint32_t>> children(slabs_.size());
  for (size_t slab = 0; slab < slabs_.size(); ++slab) children[slab].resize(slabs_[slab].size());
  ForEach([&](Slot slot, const Entry& entry) {
    LARDER_CHECK(slots_.IsTaken(slot));
    count += 1;
    if (!entry.parent) return;
    LARDER_CHECK(At(entry.parent).used);
    const SlotAllocator::Place place = slots_.Locate(entry.parent);
    children[place.slab][place.index] += 1;
  });
  LARDER_CHECK(count == size_);
  ForEach([&](Slot slot, const Entry& entry) {
    const SlotAllocator::Place place = slots_.Locate(slot);
    LARDER_CHECK(children[place.slab][place.index] == entry.children);
    if (MayGo(entry)) LARDER_CHECK(entry.candidate);
  });
}

}  // namespace larder
