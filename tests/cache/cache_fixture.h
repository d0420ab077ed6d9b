// A world with one model and one session, and short words for what most tests do.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/cache/simulated_world.h"

namespace larder::testing {

// Blocks of a prompt in GPU, in HOST and only on NVME.
using Tiers = std::array<uint32_t, kTierCount>;

struct Fixture {
  explicit Fixture(const World::Sizes& sizes) : world(sizes, 1) { Open(); }

  void Open() {
    model = world.cache().OpenModel(World::Spec("model"))->id;
    session = *world.cache().OpenSession("worker");
  }
  Cache& cache() { return world.cache(); }

  // A lease on what is cached of the prompt.
  LookupResult Look(const Tokens& prompt) {
    auto found = cache().Lookup(session, model, prompt, {});
    EXPECT_TRUE(found.ok()) << found.status();
    return found.value_or(LookupResult());
  }
  // A lease on an empty path.
  LeaseId EmptyLease() { return Look({}).lease; }
  // Reserves, fills and puts blocks [end, end + count) of `prompt`.
  absl::StatusOr<LeaseState> Extend(LeaseId lease, const Tokens& prompt, uint32_t count,
                                    std::optional<Tier> tier = std::nullopt) {
    const auto state = cache().GetLease(session, lease);
    if (!state.ok()) return state.status();
    const auto runs = cache().Reserve(session, lease, state->end, count, tier);
    if (!runs.ok()) return runs.status();
    world.Fill(model, *runs, prompt);
    return cache().Put(session, lease, state->end, Part(prompt, state->end, count));
  }
  static std::span<const uint32_t> Part(const Tokens& prompt, uint32_t from, uint32_t count) {
    return std::span(prompt).subspan(uint64_t{from} * World::kBlockTokens,
                                     uint64_t{count} * World::kBlockTokens);
  }
  static uint32_t Blocks(const Tokens& prompt) {
    return static_cast<uint32_t>(prompt.size() / World::kBlockTokens);
  }
  // Puts what is missing of the prompt and keeps the lease.
  LeaseId Hold(const Tokens& prompt, std::optional<Tier> tier = std::nullopt) {
    const LookupResult found = Look(prompt);
    if (found.matched_blocks < Blocks(prompt)) {
      const auto put = Extend(found.lease, prompt, Blocks(prompt) - found.matched_blocks, tier);
      EXPECT_TRUE(put.ok()) << put.status();
    }
    return found.lease;
  }
  void Store(const Tokens& prompt, std::optional<Tier> tier = std::nullopt) {
    Release(Hold(prompt, tier));
  }
  void Release(LeaseId lease, bool session_over = false) {
    EXPECT_TRUE(cache().Release(session, lease, session_over).ok());
  }
  // Where the prompt's blocks are, looked up without touching anything.
  Tiers Where(const Tokens& prompt) {
    LookupOptions peek;
    peek.peek = true;
    Tiers tiers = {};
    const auto found = cache().Lookup(0, model, prompt, peek);
    EXPECT_TRUE(found.ok()) << found.status();
    for (const SlotRun& run : found->runs) {
      tiers[Index(run.tier)] += static_cast<uint32_t>(run.slots.size());
    }
    return tiers;
  }
  uint32_t Matched(const Tokens& prompt) {
    const Tiers tiers = Where(prompt);
    return tiers[0] + tiers[1] + tiers[2];
  }
  uint64_t Pinned() {
    uint64_t bytes = 0;
    for (const TierStats& tier : cache().Stats().tiers) bytes += tier.bytes_pinned;
    return bytes;
  }

  World world;
  ModelId model = 0;
  SessionId session = 0;
};

inline Tokens operator+(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

inline std::vector<Slot> SlotsOf(const std::vector<SlotRun>& runs) {
  std::vector<Slot> slots;
  for (const SlotRun& run : runs) slots.insert(slots.end(), run.slots.begin(), run.slots.end());
  return slots;
}

}  // namespace larder::testing
