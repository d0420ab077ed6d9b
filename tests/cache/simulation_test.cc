// The whole cache on a stepped mover, driven by random operations with injected faults,
// beside a dumb model. Every run is replayed by its seed:
//   cache_test --gtest_filter='Simulation.*'   with LARDER_SEED=n LARDER_SEEDS=1
#include <gtest/gtest.h>

#include <cstdlib>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tests/cache/simulated_world.h"

namespace larder::testing {
namespace {

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

// A lease as its worker sees it.
struct Held {
  SessionId session;
  LeaseId lease;
  ModelId model;
  Tokens prompt;  // all of it, published or not
  uint32_t end = 0;
  std::vector<SlotRun> readable;  // what it was told it may read
  std::vector<SlotRun> reserved;
};

struct Driver {
  Driver(const World::Sizes& sizes, uint64_t seed_in)
      : seed(seed_in), world(sizes, seed_in), random(seed_in * 7919 + 1) {
    Open();
  }

  void Open() {
    // One shard as ever; or two and as many as there are ranks.
    const bool sharded = world.sizes.gpu_ranks > 1;
    for (const auto& [name, shards] :
         {std::pair("one", 1u), {"two", sharded ? 2u : 1u}, {"four", world.sizes.gpu_ranks}}) {
      models.push_back(world.cache().OpenModel(World::Spec(name, shards))->id);
    }
    sessions = {*world.cache().OpenSession("a"), *world.cache().OpenSession("b")};
  }

  uint64_t Pick(uint64_t n) { return random() % n; }

  // Prompts share prefixes: a trunk, a branch, a leaf.
  Tokens RandomPrompt() {
    Tokens tokens = Prompt(absl::StrCat("trunk", Pick(3)), 1 + Pick(6));
    for (int level = 0; level < 2; ++level) {
      const Tokens more = Prompt(absl::StrCat("branch", Pick(4)), Pick(6));
      tokens.insert(tokens.end(), more.begin(), more.end());
    }
    return tokens;
  }

  void Note(const std::string& what) { log.push_back(what); }
  std::string Where() const {
    const size_t from = log.size() > 25 ? log.size() - 25 : 0;
    return absl::StrCat("LARDER_SEED=", seed, " after:\n  ",
                        absl::StrJoin(log.begin() + from, log.end(), "\n  "));
  }

  // What a worker was told it may read, it may read.
  void CheckReadable(const Held& held) {
    ASSERT_EQ(world.WrongBytes(held.model, held.readable, held.prompt), "") << Where();
  }

  void Lookup() {
    Held held{sessions[Pick(2)], 0, models[Pick(models.size())], RandomPrompt(), 0, {}, {}};
    LookupOptions options;
    if (Pick(8) == 0) options.prefill_tokens_per_second = 1e6;
    auto result = world.cache().Lookup(held.session, held.model, held.prompt, options);
    if (!result.ok()) return;
    Note(absl::StrCat("Lookup -> lease ", result->lease, ", ", result->matched_blocks, " blocks"));
    held.lease = result->lease;
    held.end = result->matched_blocks;
    held.readable = std::move(result->runs);
    // Nothing that was never put is ever found.
    for (uint32_t i = 0; i < held.end; ++i) {
      ASSERT_TRUE(put.contains(World::Content(held.model, held.prompt, i))) << Where();
    }
    // What somebody holds is found, as far as nothing of it was lost.
    for (const Held& other : leases) {
      uint32_t common = 0;
      while (other.model == held.model && common < other.end &&
             (common + 1) * World::kBlockTokens <= held.prompt.size() &&
             World::Content(held.model, held.prompt, common) ==
                 World::Content(other.model, other.prompt, common)) {
        ++common;
      }
      if (!lossy && options.prefill_tokens_per_second == 0) {
        ASSERT_GE(held.end, common) << Where();
      }
    }
    CheckReadable(held);
    leases.push_back(std::move(held));
  }

  void Prefetch(Held& held) {
    const bool gpu = world.sizes.host == 0 || (world.sizes.gpu > 0 && Pick(2) == 0);
    Note(absl::StrCat("Prefetch lease ", held.lease, gpu ? " GPU" : " HOST"));
    auto update = world.PrefetchAll(held.session, held.lease, gpu ? Tier::kGpu : Tier::kHost);
    ASSERT_TRUE(update.has_value()) << Where();
    ASSERT_LE(update->ready_blocks, held.end) << Where();
    for (SlotRun& run : update->runs) held.readable.push_back(std::move(run));
    CheckReadable(held);
    if (update->unreadable_position.has_value()) {
      ASSERT_TRUE(world.mover.faults.fail || world.mover.faults.flip || world.mover.faults.tear ||
                  world.mover.faults.refuse)
          << Where();
      Truncate(held, *update->unreadable_position);
    }
  }

  void Reserve(Held& held) {
    const uint32_t left = static_cast<uint32_t>(held.prompt.size() / World::kBlockTokens) - held.end;
    if (left == 0) return;
    const uint32_t count = 1 + Pick(left);
    std::optional<Tier> tier;
    if (Pick(2) == 0) tier = Tier::kHost;
    auto runs = world.cache().Reserve(held.session, held.lease, held.end, count, tier);
    Note(absl::StrCat("Reserve lease ", held.lease, " ", count, " -> ", runs.status().ToString()));
    if (!runs.ok()) {
      ASSERT_TRUE(absl::IsResourceExhausted(runs.status()) ||
                  absl::IsFailedPrecondition(runs.status()))
          << Where();
      return;
    }
    held.reserved = *runs;
    world.Fill(held.model, held.reserved, held.prompt);
  }

  void Put(Held& held) {
    uint32_t have = 0;
    for (const SlotRun& run : held.reserved) have += run.slots.size();
    if (have == 0) return;
    const uint32_t count = 1 + Pick(have);
    // At a wrong position nothing happens.
    ASSERT_TRUE(absl::IsAborted(
        world.cache()
            .Put(held.session, held.lease, held.end + 1,
                 std::span(held.prompt).subspan(0, World::kBlockTokens))
            .status()));
    auto state = world.cache().Put(
        held.session, held.lease, held.end,
        std::span(held.prompt).subspan(held.end * World::kBlockTokens, count * World::kBlockTokens));
    Note(absl::StrCat("Put lease ", held.lease, " ", count, " -> ", state.status().ToString()));
    if (!state.ok()) {
      ASSERT_TRUE(absl::IsFailedPrecondition(state.status())) << Where();
      return;
    }
    ASSERT_EQ(state->end, held.end + count) << Where();
    for (uint32_t i = 0; i < count; ++i) {
      put.insert(World::Content(held.model, held.prompt, held.end + i));
    }
    // Its own slots stay readable, canonical or not.
    SlotRun& run = held.reserved.front();
    SlotRun mine{run.tier, run.position, {run.slots.begin(), run.slots.begin() + count}};
    held.readable.push_back(std::move(mine));
    run.slots.erase(run.slots.begin(), run.slots.begin() + count);
    run.position += count;
    if (run.slots.empty()) held.reserved.clear();
    held.end += count;
    CheckReadable(held);
  }

  void Truncate(Held& held, uint32_t position) {
    Note(absl::StrCat("Truncate lease ", held.lease, " to ", position));
    auto state = world.cache().Truncate(held.session, held.lease, position);
    ASSERT_TRUE(state.ok()) << Where();
    ASSERT_EQ(state->reserved_blocks, 0u);
    held.end = position;
    held.reserved.clear();
    std::vector<SlotRun> kept;
    for (SlotRun& run : held.readable) {
      if (run.position >= position) continue;
      run.slots.resize(std::min<size_t>(run.slots.size(), position - run.position));
      kept.push_back(std::move(run));
    }
    held.readable = std::move(kept);
  }

  void Fork(const Held& held) {
    auto state = world.cache().Fork(held.session, held.lease);
    ASSERT_TRUE(state.ok()) << Where();
    Note(absl::StrCat("Fork lease ", held.lease, " -> ", state->lease));
    Held fork = held;
    fork.lease = state->lease;
    fork.reserved.clear();
    leases.push_back(std::move(fork));
  }

  void Release(size_t at) {
    Note(absl::StrCat("Release lease ", leases[at].lease));
    ASSERT_TRUE(
        world.cache().Release(leases[at].session, leases[at].lease, Pick(3) == 0).ok())
        << Where();
    leases.erase(leases.begin() + at);
  }

  void LoseSession() {
    const size_t which = Pick(2);
    Note(absl::StrCat("session ", sessions[which], " ends"));
    world.cache().LoseSession(sessions[which]);
    for (const Held& held : leases) CheckReadable(held);  // also the lost one's
    world.cache().EndSession(sessions[which]);
    std::erase_if(leases, [&](const Held& h) { return h.session == sessions[which]; });
    sessions[which] = *world.cache().OpenSession("again");
  }

  void Crash() {
    Note("crash and restart");
    leases.clear();
    models.clear();
    world.Restart();
    Open();
  }

  void Step() {
    const uint64_t dice = Pick(100);
    if (dice < 20 || leases.empty()) {
      if (leases.size() < 12) return Lookup();
    }
    if (leases.empty()) return;
    const size_t at = Pick(leases.size());
    if (dice < 32) return Prefetch(leases[at]);
    if (dice < 45) return Reserve(leases[at]);
    if (dice < 60) return Put(leases[at]);
    if (dice < 64) return Truncate(leases[at], Pick(leases[at].end + 1));
    if (dice < 68 && leases.size() < 12) return Fork(Held(leases[at]));
    if (dice < 80) return Release(at);
    if (dice < 81) return LoseSession();
    if (dice == 81 && crashes) return Crash();
    if (dice < 84) {
      world.cache().Evict(kTiers[Pick(3)], 0, 1 + Pick(5));
      return;
    }
    if (dice == 84 && lossy) {
      world.cache().SetNvmeWritable(Pick(2) == 0);
      return;
    }
    for (uint64_t i = Pick(6); i > 0; --i) world.mover.Step();
    world.clock.Advance(absl::Milliseconds(1));
  }

  void Run(int steps) {
    for (int i = 0; i < steps && !::testing::Test::HasFatalFailure(); ++i) {
      Step();
      world.cache().CheckInvariants();
      for (const Held& held : leases) CheckReadable(held);
    }
    while (!leases.empty() && !::testing::Test::HasFatalFailure()) Release(0);
    world.mover.faults = Faults();
    world.cache().SetNvmeWritable(true);
    ASSERT_TRUE(world.Settle()) << Where();
    world.cache().CheckInvariants();
    const CacheStats stats = world.cache().Stats();
    EXPECT_EQ(stats.leases, 0u);
    EXPECT_EQ(stats.reserved_blocks, 0u);
    EXPECT_EQ(stats.moves_in_flight, 0u);
    EXPECT_EQ(stats.tiers[0].bytes_pinned + stats.tiers[1].bytes_pinned +
                  stats.tiers[2].bytes_pinned,
              0u)
        << Where();
  }

  const uint64_t seed;
  World world;
  std::mt19937_64 random;
  std::vector<ModelId> models;
  std::vector<SessionId> sessions;
  std::vector<Held> leases;
  std::set<uint64_t> put;  // contents of every block ever published
  std::vector<std::string> log;
  bool lossy = false;
  bool crashes = false;
};

World::Sizes RandomSizes(std::mt19937_64& random) {
  World::Sizes sizes;
  sizes.gpu = random() % 4 == 0 ? 0 : 6 + random() % 30;
  sizes.host = sizes.gpu > 0 && random() % 6 == 0 ? 0 : 6 + random() % 40;
  sizes.nvme = sizes.host == 0 || random() % 4 == 0 ? 0 : 10 + random() % 80;
  sizes.low_water = random() % 8;
  sizes.slab = random() % 3 == 0 ? 5 : 0;
  sizes.gpu_ranks = random() % 2 == 0 ? 4 : 1;
  return sizes;
}

uint64_t Seeds() { return FromEnvironment("LARDER_SEEDS", 1000); }
uint64_t FirstSeed() { return FromEnvironment("LARDER_SEED", 1); }

TEST(Simulation, WithoutFaults) {
  for (uint64_t seed = FirstSeed(); seed < FirstSeed() + Seeds() / 2; ++seed) {
    std::mt19937_64 random(seed);
    Driver driver(RandomSizes(random), seed);
    driver.world.mover.faults.reorder = random() % 2 == 0;
    driver.Run(200);
    if (HasFailure()) FAIL() << driver.Where();
  }
}

TEST(Simulation, WithFaultsAndCrashes) {
  for (uint64_t seed = FirstSeed(); seed < FirstSeed() + Seeds(); ++seed) {
    std::mt19937_64 random(seed * 31);
    Driver driver(RandomSizes(random), seed);
    driver.lossy = true;
    driver.crashes = true;
    driver.world.mover.faults = {static_cast<int>(random() % 10), static_cast<int>(random() % 5),
                                 static_cast<int>(random() % 5), random() % 2 == 0,
                                 static_cast<int>(random() % 10)};
    driver.Run(200);
    if (HasFailure()) FAIL() << driver.Where();
  }
}

}  // namespace
}  // namespace larder::testing
