#include "storage/slot_allocator.h"

#include <algorithm>
#include <bit>

#include "storage/check.h"

namespace larder {
namespace {

// Free slots in a row, from a multiple of as many on, where TakeNear begins a run: 3 MiB of
// blocks of 192 KiB.
constexpr uint32_t kRunSlots = 16;
constexpr uint64_t kRunBits = (uint64_t{1} << kRunSlots) - 1;
constexpr uint32_t kNone = ~uint32_t{0};

}  // namespace

SlotAllocator::SlotAllocator(uint64_t bytes, uint64_t slab_bytes)
    : bytes_(bytes), slab_bytes_(slab_bytes) {
  if (bytes == 0) return;
  LARDER_CHECK(slab_bytes > 0 && slab_bytes % kSlotGranule == 0);
  slabs_.resize((bytes + slab_bytes - 1) / slab_bytes);
  slabs_free_ = slab_count();
  for (uint32_t i = slab_count(); i > 0; --i) free_slabs_.push_back(i - 1);
}

uint64_t SlotAllocator::SlabLength(uint32_t slab) const {
  return std::min(slab_bytes_, bytes_ - slab * slab_bytes_);
}

SlotAllocator::Pool SlotAllocator::AddPool(uint32_t block_bytes) {
  PoolState pool;
  pool.stride =
      static_cast<uint32_t>((block_bytes + kSlotGranule - 1) / kSlotGranule * kSlotGranule);
  pools_.push_back(std::move(pool));
  return static_cast<Pool>(pools_.size() - 1);
}

void SlotAllocator::Assign(uint32_t slab_number, Pool pool) {
  Slab& slab = slabs_[slab_number];
  PoolState& owner = pools_[pool];
  slab.pool = pool;
  slab.slots = static_cast<uint32_t>(SlabLength(slab_number) / owner.stride);
  slab.taken = 0;
  slab.hint = 0;
  slab.free_bits.assign((slab.slots + 63) / 64, ~uint64_t{0});
  if (slab.slots % 64 != 0) slab.free_bits.back() = (uint64_t{1} << (slab.slots % 64)) - 1;
  slab.open = true;
  owner.open.push_back(slab_number);
  owner.slabs += 1;
  owner.free += slab.slots;
  slabs_free_ -= 1;
}

void SlotAllocator::Unassign(uint32_t slab_number) {
  Slab& slab = slabs_[slab_number];
  PoolState& owner = pools_[slab.pool];
  owner.slabs -= 1;
  owner.free -= slab.slots;
  if (slab.open) std::erase(owner.open, slab_number);
  slab = Slab();
  free_slabs_.push_back(slab_number);
  slabs_free_ += 1;
}

void SlotAllocator::Mark(uint32_t slab_number, uint32_t index) {
  Slab& slab = slabs_[slab_number];
  slab.free_bits[index / 64] &= ~(uint64_t{1} << (index % 64));
  slab.taken += 1;
  pools_[slab.pool].taken += 1;
  pools_[slab.pool].free -= 1;
}

bool SlotAllocator::IsFree(uint32_t slab_number, uint32_t index) const {
  const Slab& slab = slabs_[slab_number];
  return index < slab.slots && (slab.free_bits[index / 64] >> (index % 64) & 1) != 0;
}

// A slab with a free slot, its hint at the word of the lowest; kNone when there is none.
uint32_t SlotAllocator::Open(Pool pool) {
  PoolState& owner = pools_[pool];
  while (true) {
    if (owner.open.empty()) {
      std::erase_if(free_slabs_, [&](uint32_t slab) { return slabs_[slab].slots != 0; });
      const auto fits = std::find_if(free_slabs_.rbegin(), free_slabs_.rend(), [&](uint32_t slab) {
        return SlabLength(slab) >= owner.stride;
      });
      if (fits == free_slabs_.rend()) return kNone;
      const uint32_t slab = *fits;
      free_slabs_.erase(std::next(fits).base());
      Assign(slab, pool);
    }
    const uint32_t number = owner.open.back();
    Slab& slab = slabs_[number];
    while (slab.hint < slab.free_bits.size() && slab.free_bits[slab.hint] == 0) ++slab.hint;
    if (slab.hint < slab.free_bits.size()) return number;
    slab.open = false;
    owner.open.pop_back();
  }
}

Slot SlotAllocator::Take(Pool pool) {
  const uint32_t number = Open(pool);
  if (number == kNone) return Slot();
  const Slab& slab = slabs_[number];
  const uint32_t index =
      slab.hint * 64 + static_cast<uint32_t>(std::countr_zero(slab.free_bits[slab.hint]));
  Mark(number, index);
  return At({number, index});
}

Slot SlotAllocator::TakeNear(Pool pool, Slot near) {
  if (near) {
    const Place place = Locate(near);
    // An index of 0 has none before it: it wraps to one that no slab has.
    for (const uint32_t index : {place.index + 1, place.index - 1}) {
      if (!IsFree(place.slab, index)) continue;
      Mark(place.slab, index);
      return At({place.slab, index});
    }
  }
  const uint32_t number = Open(pool);
  if (number == kNone) return Slot();
  const Slab& slab = slabs_[number];
  for (uint32_t word = slab.hint; word < slab.free_bits.size(); ++word) {
    for (uint32_t bit = 0; bit < 64; bit += kRunSlots) {
      if ((slab.free_bits[word] >> bit & kRunBits) != kRunBits) continue;
      Mark(number, word * 64 + bit);
      return At({number, word * 64 + bit});
    }
  }
  return Take(pool);
}

void SlotAllocator::Give(Slot slot) {
  LARDER_CHECK(IsTaken(slot));
  const Place place = Locate(slot);
  Slab& slab = slabs_[place.slab];
  slab.free_bits[place.index / 64] |= uint64_t{1} << (place.index % 64);
  slab.hint = std::min(slab.hint, place.index / 64);
  slab.taken -= 1;
  pools_[slab.pool].taken -= 1;
  pools_[slab.pool].free += 1;
  if (slab.taken == 0) {
    Unassign(place.slab);
  } else if (!slab.open) {
    slab.open = true;
    pools_[slab.pool].open.push_back(place.slab);
  }
}

bool SlotAllocator::Adopt(Pool pool, Slot slot) {
  if (!slot || slot.offset() >= bytes_) return false;
  const uint32_t number = static_cast<uint32_t>(slot.offset() / slab_bytes_);
  const uint64_t within = slot.offset() % slab_bytes_;
  const uint32_t stride = pools_[pool].stride;
  if (within % stride != 0 || within + stride > SlabLength(number)) return false;
  if (slabs_[number].slots != 0 && slabs_[number].pool != pool) return false;
  const uint32_t index = static_cast<uint32_t>(within / stride);
  if (slabs_[number].slots == 0) {
    Assign(number, pool);
  } else if ((slabs_[number].free_bits[index / 64] >> (index % 64) & 1) == 0) {
    return false;
  }
  Mark(number, index);
  return true;
}

bool SlotAllocator::IsTaken(Slot slot) const {
  if (!slot || slot.offset() >= bytes_) return false;
  const Slab& slab = slabs_[slot.offset() / slab_bytes_];
  if (slab.slots == 0) return false;
  const uint64_t within = slot.offset() % slab_bytes_;
  const uint64_t index = within / pools_[slab.pool].stride;
  return within % pools_[slab.pool].stride == 0 && index < slab.slots &&
         (slab.free_bits[index / 64] >> (index % 64) & 1) == 0;
}

SlotAllocator::Place SlotAllocator::Locate(Slot slot) const {
  const uint32_t slab = static_cast<uint32_t>(slot.offset() / slab_bytes_);
  return {slab,
          static_cast<uint32_t>(slot.offset() % slab_bytes_ / pools_[slabs_[slab].pool].stride)};
}

Slot SlotAllocator::At(Place place) const {
  return Slot::AtOffset(place.slab * slab_bytes_ +
                        uint64_t{place.index} * pools_[slabs_[place.slab].pool].stride);
}

SlotAllocator::Pool SlotAllocator::PoolOf(Slot slot) const {
  return slabs_[slot.offset() / slab_bytes_].pool;
}

uint64_t SlotAllocator::free(Pool pool) const {
  const uint32_t stride = pools_[pool].stride;
  if (slabs_free_ == 0) return pools_[pool].free;
  const bool last_is_free = slabs_.back().slots == 0;
  return pools_[pool].free + (slabs_free_ - last_is_free) * (slab_bytes_ / stride) +
         last_is_free * (SlabLength(slab_count() - 1) / stride);
}

uint64_t SlotAllocator::slots_max(Pool pool) const {
  return bytes_ == 0 ? 0
                     : (bytes_ / slab_bytes_) * (slab_bytes_ / pools_[pool].stride) +
                           bytes_ % slab_bytes_ / pools_[pool].stride;
}

}  // namespace larder
