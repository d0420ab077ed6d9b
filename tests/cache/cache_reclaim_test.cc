// A slab for a model that came late: which one, and when there is none.
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "tests/cache/cache_fixture.h"

namespace larder::testing {
namespace {

// Emptying the slab of a system prompt would take every conversation with it.
TEST(Reclaim, ASlabOnWhichEverythingHangsStays) {
  constexpr uint64_t kSlots = 6400;
  Fixture f({.host = kSlots, .slab = 100});
  const Tokens system = Prompt("system", 4);
  for (uint32_t i = 0; i < kSlots / 4 - 1; ++i) f.Store(system + Prompt(absl::StrCat(i), 4));
  ASSERT_EQ(f.cache().Stats().tiers[1].blocks, kSlots);
  const ModelId rich = f.model;
  f.model = f.cache().OpenModel(World::Spec("late"))->id;
  f.Store(Prompt("late", 100));
  EXPECT_EQ(f.Matched(Prompt("late", 100)), 100u);
  f.cache().CheckInvariants();
  f.model = rich;
  EXPECT_EQ(f.Matched(system), 4u);
  EXPECT_GE(f.cache().Models()[0].blocks, kSlots - 200);
}

TEST(Reclaim, OnceSomethingIsLetGoThereIsAnotherSearch) {
  Fixture f({.host = 8, .slab = 2});
  std::vector<LeaseId> held;
  for (const char* name : {"a", "b", "c", "d"}) held.push_back(f.Hold(Prompt(name, 2)));
  const ModelId rich = f.model;
  f.model = f.cache().OpenModel(World::Spec("late"))->id;
  const LeaseId late = f.EmptyLease();
  const auto reserve = [&] { return f.cache().Reserve(f.session, late, 0, 1, {}).status(); };
  EXPECT_TRUE(absl::IsResourceExhausted(reserve()));
  EXPECT_TRUE(absl::IsResourceExhausted(reserve()));
  f.Release(held[2]);
  EXPECT_TRUE(reserve().ok());
  f.cache().CheckInvariants();
  f.model = rich;
  EXPECT_EQ(f.Matched(Prompt("c", 2)), 0u);
  EXPECT_EQ(f.Matched(Prompt("d", 2)), 2u);
}

}  // namespace
}  // namespace larder::testing
