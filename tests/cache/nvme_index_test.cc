// Random operations on the index against a map of records; then its rules by name.
#include "storage/nvme_index.h"

#include <gtest/gtest.h>

#include <cstring>
#include <iostream>
#include <map>
#include <optional>
#include <random>
#include <sstream>
#include <vector>

namespace larder {
namespace {

BlockKey Key(uint64_t name) {
  BlockKey key;
  for (int i = 0; i < 4; ++i) {
    uint64_t word = (name * 4 + i) * 0x9E3779B97F4A7C15ull;  // splitmix64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9ull;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBull;
    word ^= word >> 31;
    std::memcpy(key.bytes.data() + 8 * i, &word, 8);
  }
  return key;
}

struct Op {
  enum Kind {
    kClaim,
    kCommit,
    kAbort,
    kCondemn,
    kInMemory,
    kTouch,
    kHold,
    kDrop,
    kEvict,
    kReclaim
  } kind;
  uint32_t which = 0;  // of the entries, by slot
  bool on = false;
};

std::ostream& operator<<(std::ostream& out, const Op& op) {
  const char* names[] = {"kClaim", "kCommit", "kAbort", "kCondemn", "kInMemory",
                         "kTouch", "kHold",   "kDrop",  "kEvict",   "kReclaim"};
  return out << "{Op::" << names[op.kind] << ", " << op.which << ", " << op.on << "},";
}

struct Record {
  BlockKey key;
  Slot parent;
  SlotAllocator::Pool pool = 0;
  bool durable = false;
  bool held = false;
  bool in_memory = true;
  bool condemned = false;
  uint64_t touch = 0;  // of it or of anything that was ever below it
};

// The index beside its dumb model; pool 0 and pool 1 share the tier.
class Pair {
 public:
  Pair(uint64_t slots_count, uint64_t slab)
      : slots(slots_count * kSlotGranule, slab * kSlotGranule), index(slots) {
    slots.AddPool(1);
    slots.AddPool(1);
    index.set_on_drop([this](Slot slot, uint32_t) { dropped.push_back(slot); });
  }

  uint32_t Children(Slot slot) const {
    uint32_t count = 0;
    for (const auto& [at, record] : records) count += record.parent == slot;
    return count;
  }
  bool MayGo(Slot slot) const {
    const Record& r = records.at(slot);
    return r.durable && !r.held && !r.in_memory && Children(slot) == 0;
  }
  // The least recent that may go, except `other`.
  Slot Victim(SlotAllocator::Pool pool, Slot other) const {
    Slot best;
    for (const auto& [slot, record] : records) {
      if (record.pool != pool || slot == other || !MayGo(slot)) continue;
      if (!best || record.touch < records.at(best).touch) best = slot;
    }
    return best;
  }
  void Touch(Slot slot) {
    ++now;
    for (Slot at = slot; at; at = records.at(at).parent) records.at(at).touch = now;
  }
  // Takes it out, and condemned parents that are left childless.
  void Remove(Slot slot) {
    const Slot parent = records.at(slot).parent;
    records.erase(slot);
    if (parent && records.at(parent).condemned && Children(parent) == 0) Remove(parent);
  }
  bool IsBelow(Slot slot, Slot top) const {
    for (Slot at = slot; at; at = records.at(at).parent) {
      if (at == top) return true;
    }
    return false;
  }
  bool InFlight(Slot slot) const {
    const Record& r = records.at(slot);
    return r.held || !(r.durable || r.condemned);
  }

  void Apply(const Op& op) {
    dropped.clear();
    if (op.kind == Op::kClaim) return Claim(op);
    const SlotAllocator::Pool pool = op.which % 2;
    if (op.kind == Op::kEvict) {
      const Slot expected = Victim(pool, Slot());
      ASSERT_EQ(index.EvictOne(pool), static_cast<bool>(expected));
      if (!expected) return;
      ASSERT_FALSE(dropped.empty());
      ASSERT_EQ(dropped[0], expected);
      Remove(expected);
      return;
    }
    if (op.kind == Op::kReclaim) return Reclaim(pool);
    if (records.empty()) return;
    const auto at = std::next(records.begin(), op.which % records.size());
    const Slot slot = at->first;
    Record& record = at->second;
    const bool writing = !record.durable && !record.condemned;
    switch (op.kind) {
      case Op::kCommit:
        if (!writing) return;
        index.Commit(slot);
        record.durable = true;
        record.held = false;
        return;
      case Op::kAbort:
      case Op::kCondemn:
        if (op.kind == Op::kAbort ? !writing : !record.durable) return;
        op.kind == Op::kAbort ? index.Abort(slot) : index.Condemn(slot);
        record.durable = record.held = false;
        record.condemned = true;
        if (Children(slot) == 0) Remove(slot);
        return;
      case Op::kInMemory:
        if (!record.durable) return;
        index.SetInMemory(slot, op.on);
        record.in_memory = op.on;
        return;
      case Op::kTouch:
        index.Touch(slot);
        return Touch(slot);
      case Op::kHold:
        if (!record.durable) return;
        op.on ? index.Hold(slot) : index.Release(slot);
        record.held = op.on;
        return;
      default:
        return Drop(slot);
    }
  }

  void Claim(const Op& op) {
    const auto at =
        records.empty() ? records.end() : std::next(records.begin(), op.which % records.size());
    Slot parent;
    SlotAllocator::Pool pool = op.which % 2;
    if (op.on && at != records.end() && !at->second.condemned) {
      parent = at->first;
      pool = at->second.pool;
    }
    const Slot victim = slots.free(pool) > 0 ? Slot() : Victim(pool, parent);
    const bool possible = slots.free(pool) > 0 || victim;
    const BlockKey key = Key(++next_key);
    const Slot slot = index.Claim(pool, key, parent);
    ASSERT_EQ(static_cast<bool>(slot), possible);
    ASSERT_EQ(dropped.empty() ? Slot() : dropped[0], victim);
    if (victim) Remove(victim);
    if (!slot) return;
    ASSERT_FALSE(records.contains(slot)) << "given out twice";
    records[slot] = {key, parent, pool, false, true, true, false, 0};
    Touch(slot);
  }

  void Drop(Slot slot) {
    std::vector<Slot> doomed;
    bool blocked = false;
    for (const auto& [each, record] : records) {
      if (!IsBelow(each, slot)) continue;
      blocked = blocked || InFlight(each);
      doomed.push_back(each);
    }
    // One that was condemned and still has children is no entry to ask for.
    if (records.at(slot).condemned) return;
    ASSERT_EQ(index.Drop(slot), !blocked);
    ASSERT_EQ(dropped.size() >= doomed.size(), !blocked);
    RemoveDropped(blocked);
  }

  void Reclaim(SlotAllocator::Pool pool) {
    // The cheapest slab that nothing in flight keeps.
    std::optional<size_t> cheapest;
    for (uint32_t slab = 0; slab < slots.slab_count(); ++slab) {
      if (!slots.SlabIsOf(slab, pool)) continue;
      size_t cost = 0;
      bool blocked = false;
      for (const auto& [each, record] : records) {
        bool doomed = false;
        for (Slot at = each; at; at = records.at(at).parent) {
          doomed = doomed || slots.Locate(at).slab == slab;
        }
        if (!doomed) continue;
        cost += 1;
        blocked = blocked || InFlight(each);
      }
      if (!blocked) cheapest = std::min(cheapest.value_or(cost), cost);
    }
    const uint32_t slabs_before = slots.slabs(pool);
    ASSERT_EQ(index.ReclaimSlab(pool), cheapest.has_value());
    if (!cheapest.has_value()) {
      ASSERT_TRUE(dropped.empty());
      return;
    }
    ASSERT_GE(dropped.size(), *cheapest);
    ASSERT_LT(slots.slabs(pool), slabs_before);
    RemoveDropped(false);
  }

  // Nothing went before what was below it, and nothing that is needed went.
  void RemoveDropped(bool none) {
    if (none) {
      ASSERT_TRUE(dropped.empty());
    }
    for (Slot slot : dropped) {
      if (!records.contains(slot)) continue;  // condemned, gone with its last child
      ASSERT_EQ(Children(slot), 0u);
      ASSERT_FALSE(InFlight(slot));
      Remove(slot);
    }
  }

  void Agree() const {
    index.CheckInvariants();
    ASSERT_EQ(index.size(), records.size());
    for (const auto& [slot, record] : records) {
      ASSERT_TRUE(slots.IsTaken(slot));
      ASSERT_EQ(index.Is(slot, record.key.Tag()), record.durable);
      ASSERT_FALSE(index.Is(slot, record.key.Tag() + 1));
      ASSERT_EQ(index.Find(record.key, record.parent), record.durable ? slot : Slot());
      ASSERT_FALSE(index.Find(record.key, Slot(9999)));
    }
    for (uint64_t name = next_key > 20 ? next_key - 20 : 1; name <= next_key; ++name) {
      const BlockKey key = Key(name);
      bool known = false;
      for (const auto& [slot, record] : records) known = known || record.key == key;
      if (!known) {
        ASSERT_FALSE(index.Find(key, Slot()));
      }
    }
  }

  SlotAllocator slots;
  NvmeIndex index;
  std::map<Slot, Record> records;
  std::vector<Slot> dropped;
  uint64_t now = 0;
  uint64_t next_key = 0;
};

TEST(NvmeIndex, RandomOperationsAgreeWithAMap) {
  for (uint32_t seed = 1; seed <= 400; ++seed) {
    std::mt19937 random(seed);
    const uint64_t slab = 2 + random() % 8;
    Pair pair(slab * (1 + random() % 5), slab);
    std::ostringstream log;
    const Op::Kind kinds[] = {Op::kClaim,    Op::kClaim,    Op::kClaim, Op::kClaim,   Op::kCommit,
                              Op::kCommit,   Op::kCommit,   Op::kAbort, Op::kCondemn, Op::kInMemory,
                              Op::kInMemory, Op::kInMemory, Op::kTouch, Op::kTouch,   Op::kHold,
                              Op::kHold,     Op::kDrop,     Op::kEvict, Op::kReclaim};
    for (int i = 0; i < 200; ++i) {
      const Op op{kinds[random() % std::size(kinds)], static_cast<uint32_t>(random() % 1000),
                  random() % 3 == 0};
      log << op << "\n";
      pair.Apply(op);
      if (!HasFatalFailure()) pair.Agree();
      ASSERT_FALSE(HasFatalFailure()) << "seed " << seed << ", slabs of " << slab << " in "
                                      << pair.slots.bytes() / kSlotGranule << "\n"
                                      << log.str();
    }
  }
}

struct Small {
  explicit Small(uint64_t count) : slots(count * kSlotGranule, count * kSlotGranule), index(slots) {
    pool = slots.AddPool(1);
  }
  Slot Write(uint64_t name, Slot parent, bool in_memory = false) {
    const Slot slot = index.Claim(pool, Key(name), parent);
    if (!slot) return slot;
    index.Commit(slot);
    index.SetInMemory(slot, in_memory);
    return slot;
  }
  SlotAllocator slots;
  NvmeIndex index;
  SlotAllocator::Pool pool;
};

TEST(NvmeIndex, ATouchOfALeafCountsForItsAncestors) {
  Small s(4);
  const Slot parent = s.Write(1, Slot());
  const Slot child = s.Write(2, parent);
  const Slot other = s.Write(3, Slot());
  s.index.Touch(child);
  EXPECT_TRUE(s.index.EvictOne(s.pool));  // `other` is older than the touch
  EXPECT_FALSE(s.slots.IsTaken(other));
  const Slot younger = s.Write(4, Slot());
  EXPECT_TRUE(s.index.EvictOne(s.pool));  // leaves first
  EXPECT_FALSE(s.slots.IsTaken(child));
  EXPECT_TRUE(s.index.EvictOne(s.pool));
  EXPECT_FALSE(s.slots.IsTaken(parent)) << "touched before `younger` was written";
  EXPECT_TRUE(s.index.Is(younger, Key(4).Tag()));
}

TEST(NvmeIndex, HeldEntriesAndThoseInMemoryAreNeverEvicted) {
  Small s(2);
  const Slot held = s.Write(1, Slot());
  s.Write(2, Slot(), /*in_memory=*/true);
  s.index.Hold(held);
  EXPECT_FALSE(s.index.EvictOne(s.pool));
  EXPECT_FALSE(s.index.Claim(s.pool, Key(3), Slot()));
  s.index.Release(held);
  EXPECT_EQ(s.index.Claim(s.pool, Key(3), Slot()), held);
  EXPECT_EQ(s.index.evictions(), 1u);
}

TEST(NvmeIndex, AParentIsNotTheVictimThatMakesRoomForItsChild) {
  Small s(1);
  const Slot only = s.Write(1, Slot());
  EXPECT_FALSE(s.index.Claim(s.pool, Key(2), only));
  EXPECT_EQ(s.index.Find(Key(1), Slot()), only);
  EXPECT_TRUE(s.index.EvictOne(s.pool)) << "it may go again afterwards";
}

TEST(NvmeIndex, ACondemnedEntryGoesWithItsLastChild) {
  Small s(3);
  const Slot parent = s.Write(1, Slot());
  const Slot child = s.Write(2, parent);
  s.index.Condemn(parent);
  EXPECT_FALSE(s.index.Find(Key(1), Slot()));
  EXPECT_TRUE(s.slots.IsTaken(parent));
  EXPECT_TRUE(s.index.Drop(child));
  EXPECT_EQ(s.index.size(), 0u);
  EXPECT_FALSE(s.slots.IsTaken(parent));
}

TEST(NvmeIndex, WhatIsBeingWrittenIsNotFound) {
  Small s(2);
  const Slot slot = s.index.Claim(s.pool, Key(1), Slot());
  EXPECT_FALSE(s.index.Find(Key(1), Slot()));
  s.index.Commit(slot);
  EXPECT_EQ(s.index.Find(Key(1), Slot()), slot);
}

TEST(NvmeIndex, EntriesAreFoundAfterRecoveryAndEvictedLeavesFirst) {
  Small s(3);
  for (uint32_t i = 1; i <= 3; ++i) ASSERT_TRUE(s.slots.Adopt(s.pool, Slot(i)));
  s.index.Recover(Slot(2), Key(1), Slot());
  s.index.Recover(Slot(1), Key(2), Slot(2));
  s.index.Recover(Slot(3), Key(3), Slot(1));
  s.index.CheckInvariants();
  EXPECT_EQ(s.index.Find(Key(2), Slot(2)), Slot(1));
  for (uint32_t expected : {3, 1, 2}) {
    EXPECT_TRUE(s.index.EvictOne(s.pool));
    EXPECT_FALSE(s.slots.IsTaken(Slot(expected)));
  }
}

// The promise is 32 bytes a slot: 20 an entry, the rest for buckets and candidates. Nothing
// is in memory here, so every entry was offered for eviction: the most there can be.
TEST(NvmeIndex, AMillionSlotsCostAtMost32BytesEach) {
  constexpr uint64_t kCount = 1'000'000;
  for (const bool all_leaves : {false, true}) {
    SlotAllocator slots(kCount * kSlotGranule, kCount / 100 * kSlotGranule);
    const SlotAllocator::Pool pool = slots.AddPool(1);
    NvmeIndex index(slots);
    Slot parent;
    for (uint64_t i = 0; i < kCount; ++i) {
      const Slot slot = index.Claim(pool, Key(i), parent);
      ASSERT_TRUE(slot);
      index.Commit(slot);
      index.SetInMemory(slot, false);
      parent = all_leaves || i % 2 == 1 ? Slot() : slot;
    }
    const double bytes = static_cast<double>(index.memory_bytes()) / kCount;
    std::cout << (all_leaves ? "leaves only: " : "pairs: ") << bytes << " bytes a slot\n";
    EXPECT_LE(bytes, 32);
  }
}

}  // namespace
}  // namespace larder
