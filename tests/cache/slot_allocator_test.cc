// Random takes, gives and adoptions against a map of byte ranges.
#include "storage/slot_allocator.h"

#include <gtest/gtest.h>

#include <map>
#include <ostream>
#include <random>
#include <vector>

namespace larder {
namespace {

constexpr uint64_t kGranule = kSlotGranule;

struct Op {
  enum Kind { kTake, kTakeNear, kGive, kAdopt } kind;
  uint32_t pool = 0;
  uint32_t which = 0;  // kTakeNear, kGive: of the slots taken; kAdopt: the slot's number
};

std::ostream& operator<<(std::ostream& out, const Op& op) {
  const char* names[] = {"kTake", "kTakeNear", "kGive", "kAdopt"};
  return out << "{Op::" << names[op.kind] << ", " << op.pool << ", " << op.which << "},";
}

struct Case {
  uint64_t bytes = 0;
  uint64_t slab_bytes = 0;
  std::vector<uint32_t> strides;  // of the pools, in granules
  std::vector<Op> ops;
};

// What a tier is, without any cleverness: taken byte ranges by their start.
class DumbTier {
 public:
  struct Range {
    uint64_t bytes;
    uint32_t pool;
  };

  explicit DumbTier(const Case& c) : c_(c) {}

  bool SlabMayTake(uint64_t slab, uint32_t pool) const {
    for (const auto& [offset, range] : taken) {
      if (offset / c_.slab_bytes == slab && range.pool != pool) return false;
    }
    return true;
  }
  bool Fits(uint32_t pool, uint64_t offset) const {
    const uint64_t stride = c_.strides[pool] * kGranule;
    const uint64_t slab = offset / c_.slab_bytes;
    const uint64_t end = std::min(c_.bytes, (slab + 1) * c_.slab_bytes);
    return offset % c_.slab_bytes % stride == 0 && offset + stride <= end &&
           SlabMayTake(slab, pool) && !taken.contains(offset);
  }
  // How many more slots the pool could take.
  uint64_t Free(uint32_t pool) const {
    uint64_t count = 0;
    for (uint64_t offset = 0; offset < c_.bytes; offset += kGranule) count += Fits(pool, offset);
    return count;
  }
  // A slot that the pool has taken; empty when it has none.
  Slot AnyOf(uint32_t pool, uint32_t which) const {
    std::vector<Slot> slots;
    for (const auto& [offset, range] : taken) {
      if (range.pool == pool) slots.push_back(Slot::AtOffset(offset));
    }
    return slots.empty() ? Slot() : slots[which % slots.size()];
  }
  uint64_t FreeSlabs() const {
    uint64_t count = 0;
    for (uint64_t slab = 0; slab * c_.slab_bytes < c_.bytes; ++slab) {
      const auto first = taken.lower_bound(slab * c_.slab_bytes);
      count += first == taken.end() || first->first >= (slab + 1) * c_.slab_bytes;
    }
    return count;
  }

  std::map<uint64_t, Range> taken;

 private:
  const Case& c_;
};

void Agree(const Case& c, const SlotAllocator& slots, const DumbTier& dumb) {
  for (uint64_t offset = 0; offset < c.bytes; offset += kGranule) {
    const Slot slot = Slot::AtOffset(offset);
    const auto found = dumb.taken.find(offset);
    ASSERT_EQ(slots.IsTaken(slot), found != dumb.taken.end()) << "at byte " << offset;
    if (found == dumb.taken.end()) continue;
    ASSERT_EQ(slots.PoolOf(slot), found->second.pool);
    ASSERT_EQ(slots.At(slots.Locate(slot)), slot);
    ASSERT_TRUE(slots.SlabIsOf(slots.Locate(slot).slab, found->second.pool));
  }
  ASSERT_EQ(slots.slabs_free(), dumb.FreeSlabs());
  for (uint32_t pool = 0; pool < c.strides.size(); ++pool) {
    uint64_t count = 0;
    for (const auto& [offset, range] : dumb.taken) count += range.pool == pool;
    ASSERT_EQ(slots.taken(pool), count);
    ASSERT_EQ(slots.free(pool), dumb.Free(pool)) << "of pool " << pool;
  }
}

void Apply(const Case& c, const Op& op, SlotAllocator& slots, DumbTier& dumb) {
  switch (op.kind) {
    case Op::kTake:
    case Op::kTakeNear: {
      const bool possible = dumb.Free(op.pool) > 0;
      const Slot near = op.kind == Op::kTake ? Slot() : dumb.AnyOf(op.pool, op.which);
      const Slot slot = near ? slots.TakeNear(op.pool, near) : slots.Take(op.pool);
      ASSERT_EQ(static_cast<bool>(slot), possible);
      if (!slot) return;
      ASSERT_TRUE(dumb.Fits(op.pool, slot.offset()));
      dumb.taken[slot.offset()] = {c.strides[op.pool] * kGranule, op.pool};
      return;
    }
    case Op::kGive: {
      if (dumb.taken.empty()) return;
      const auto at = std::next(dumb.taken.begin(), op.which % dumb.taken.size());
      slots.Give(Slot::AtOffset(at->first));
      dumb.taken.erase(at);
      return;
    }
    case Op::kAdopt: {
      const Slot slot(op.which);
      const bool fits = slot && slot.offset() < c.bytes && dumb.Fits(op.pool, slot.offset());
      ASSERT_EQ(slots.Adopt(op.pool, slot), fits);
      if (fits) dumb.taken[slot.offset()] = {c.strides[op.pool] * kGranule, op.pool};
      return;
    }
  }
}

void Run(const Case& c) {
  SlotAllocator slots(c.bytes, c.slab_bytes);
  for (uint32_t stride : c.strides) slots.AddPool(static_cast<uint32_t>(stride * kGranule - 1));
  DumbTier dumb(c);
  for (const Op& op : c.ops) {
    SCOPED_TRACE(::testing::Message() << "at " << op);
    Apply(c, op, slots, dumb);
    if (!::testing::Test::HasFatalFailure()) Agree(c, slots, dumb);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

void RunSeeds(bool whole_slabs) {
  for (uint32_t seed = 1; seed <= 300; ++seed) {
    std::mt19937 random(seed);
    Case c;
    const uint64_t slab = 3 + random() % 10;
    const uint64_t rest = whole_slabs ? 0 : random() % slab;
    c.slab_bytes = slab * kGranule;
    c.bytes = (slab * (1 + random() % 4) + rest) * kGranule;
    for (uint32_t pool = 0; pool < 3; ++pool) c.strides.push_back(1 + random() % 3);
    for (int i = 0; i < 150; ++i) {
      const Op::Kind takes = random() % 2 == 0 ? Op::kTake : Op::kTakeNear;
      const Op::Kind kind = i < 5 ? Op::kAdopt : random() % 5 < 3 ? takes : Op::kGive;
      c.ops.push_back({kind, static_cast<uint32_t>(random() % 3),
                       static_cast<uint32_t>(kind == Op::kAdopt ? random() % 60 : random() % 997)});
    }
    SCOPED_TRACE(::testing::Message()
                 << "seed " << seed << ", " << c.bytes / kGranule << " in slabs of " << slab
                 << ", strides " << c.strides[0] << " " << c.strides[1] << " " << c.strides[2]);
    Run(c);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(SlotAllocator, RandomOperationsAgreeWithAMap) { RunSeeds(/*whole_slabs=*/true); }

TEST(SlotAllocator, RandomOperationsAgreeWithAMapWhenTheLastSlabIsShort) {
  RunSeeds(/*whole_slabs=*/false);
}

TEST(SlotAllocator, AShortSlabGivenBackLastHidesNoOther) {
  SlotAllocator slots(5 * kGranule, 4 * kGranule);  // slab 1 has room for one granule
  const SlotAllocator::Pool small = slots.AddPool(kGranule);
  const SlotAllocator::Pool large = slots.AddPool(2 * kGranule);
  std::vector<Slot> taken;
  while (const Slot slot = slots.Take(small)) taken.push_back(slot);
  ASSERT_EQ(taken.size(), 5u);
  for (Slot slot : taken) slots.Give(slot);
  EXPECT_TRUE(slots.Take(large));
}

TEST(SlotAllocator, NeighboursInTimeAreNeighboursInSpace) {
  SlotAllocator slots(64 * kGranule, 64 * kGranule);
  const SlotAllocator::Pool pool = slots.AddPool(1);
  for (uint32_t i = 1; i <= 64; ++i) EXPECT_EQ(slots.Take(pool), Slot(i));
  EXPECT_FALSE(slots.Take(pool));
  slots.Give(Slot(40));
  slots.Give(Slot(7));
  EXPECT_EQ(slots.Take(pool), Slot(7));
}

TEST(SlotAllocator, RunsThatGrowTogetherStayApart) {
  SlotAllocator slots(256 * kGranule, 256 * kGranule);
  const SlotAllocator::Pool pool = slots.AddPool(1);
  Slot a, b;
  for (uint32_t i = 0; i < 16; ++i) {
    const Slot next_a = slots.TakeNear(pool, a);
    const Slot next_b = slots.TakeNear(pool, b);
    if (i > 0) {
      EXPECT_EQ(next_a.number(), a.number() + 1);
      EXPECT_EQ(next_b.number(), b.number() + 1);
    }
    a = next_a;
    b = next_b;
  }
  // The place behind `a` is b's: it goes on where a run has room again, not between others.
  const Slot far = slots.TakeNear(pool, a);
  EXPECT_EQ(slots.TakeNear(pool, far).number(), far.number() + 1);
  EXPECT_GT(far.number(), b.number());
}

TEST(SlotAllocator, ARunGrowsBackwardsIntoWhatEvictionFrees) {
  SlotAllocator slots(64 * kGranule, 64 * kGranule);
  const SlotAllocator::Pool pool = slots.AddPool(1);
  while (slots.Take(pool)) {
  }
  // A prefix goes from its end, a block at a time, and another takes its place.
  Slot last;
  for (uint32_t number = 40; number > 20; --number) {
    slots.Give(Slot(number));
    last = slots.TakeNear(pool, last);
    EXPECT_EQ(last, Slot(number));
  }
  // Of more that is free, the neighbour is chosen, and not the lowest.
  slots.Give(Slot(3));
  slots.Give(Slot(20));
  EXPECT_EQ(slots.TakeNear(pool, last), Slot(20));
  EXPECT_EQ(slots.TakeNear(pool, Slot(20)), Slot(3));
  EXPECT_FALSE(slots.TakeNear(pool, Slot(3)));
}

TEST(SlotAllocator, ATierWithoutBytesHasNoSlots) {
  SlotAllocator slots(0, 0);
  const SlotAllocator::Pool pool = slots.AddPool(kGranule);
  EXPECT_FALSE(slots.Take(pool));
  EXPECT_EQ(slots.free(pool), 0u);
  EXPECT_EQ(slots.slots_max(pool), 0u);
  EXPECT_FALSE(slots.IsTaken(Slot(1)));
}

TEST(SlotAllocator, SlotsMaxIsWhatAPoolTakesAlone) {
  for (uint64_t granules = 1; granules < 20; ++granules) {
    for (uint32_t stride = 1; stride <= 4; ++stride) {
      SlotAllocator slots(granules * kGranule, 4 * kGranule);
      const SlotAllocator::Pool pool = slots.AddPool(static_cast<uint32_t>(stride * kGranule));
      uint64_t count = 0;
      while (slots.Take(pool)) ++count;
      EXPECT_EQ(slots.slots_max(pool), count) << granules << " granules, stride " << stride;
    }
  }
}

TEST(SlotAllocator, GivingASlotThatIsNotTakenPanics) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  SlotAllocator slots(4 * kGranule, 4 * kGranule);
  const SlotAllocator::Pool pool = slots.AddPool(kGranule);
  const Slot slot = slots.Take(pool);
  slots.Give(slot);
  EXPECT_DEATH(slots.Give(slot), "check failed");
}

}  // namespace
}  // namespace larder
