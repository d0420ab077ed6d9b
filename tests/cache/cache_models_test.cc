// Fair shares of several models, a replay with hand-checked hits, and many threads at once.
#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <random>
#include <thread>

#include "tests/cache/cache_fixture.h"

namespace larder::testing {
namespace {

TEST(Models, ALateModelGetsItsShareOfAFullTier) {
  for (const bool host : {false, true}) {
    World::Sizes sizes;
    (host ? sizes.host : sizes.gpu) = 16;
    sizes.slab = 4;
    Fixture f(sizes);
    for (int i = 0; i < 8; ++i) f.Store(Prompt(std::to_string(i), 2));
    ASSERT_EQ(f.cache().Models()[0].bytes_used[host], 16 * kSlotGranule);
    EXPECT_EQ(f.cache().Models()[0].bytes_quota[host], 16 * kSlotGranule);

    const ModelId early = f.model;
    f.model = f.cache().OpenModel(World::Spec("late"))->id;
    for (int i = 0; i < 8; ++i) f.Store(Prompt(std::to_string(i), 2));
    f.cache().CheckInvariants();
    const std::vector<ModelStats> models = f.cache().Models();
    ASSERT_EQ(models.size(), 2u);
    for (const ModelStats& model : models) {
      EXPECT_EQ(model.bytes_quota[host], 8 * kSlotGranule);
      EXPECT_LE(model.bytes_used[host], 8 * kSlotGranule);
    }
    EXPECT_EQ(models[1].bytes_used[host], 8 * kSlotGranule);
    EXPECT_EQ(models[0].model.id, early);
    // A second round takes nothing more.
    for (int i = 8; i < 16; ++i) f.Store(Prompt(std::to_string(i), 2));
    EXPECT_EQ(f.cache().Models()[0].bytes_used[host], models[0].bytes_used[host]);
  }
}

TEST(Models, ASlabWithAPinnedBlockIsNotTaken) {
  Fixture f({.gpu = 8, .slab = 4});
  const LeaseId low = f.Hold(Prompt("a", 4));
  const LeaseId high = f.Hold(Prompt("b", 4));
  const ModelId early = f.model;
  f.model = f.cache().OpenModel(World::Spec("late"))->id;
  EXPECT_TRUE(absl::IsResourceExhausted(
      f.cache().Reserve(f.session, f.EmptyLease(), 0, 1, std::nullopt).status()));
  f.Release(high);
  EXPECT_TRUE(f.cache().Reserve(f.session, f.EmptyLease(), 0, 4, std::nullopt).ok());
  f.model = early;
  EXPECT_EQ(f.Matched(Prompt("a", 4)), 4u);
  EXPECT_EQ(f.Matched(Prompt("b", 4)), 0u);
  f.Release(low);
  f.cache().CheckInvariants();
}

TEST(Models, AShortLastSlabThatFitsNoBlockDoesNotKeepALateModelOut) {
  Fixture f({.gpu = 9, .slab = 4});  // slabs of 4, 4 and 1
  const auto open = [&](const char* name) {
    ModelSpec spec = World::Spec(name);
    spec.layers = 2;  // 8 KiB: two granules a slot
    return f.cache().OpenModel(spec)->id;
  };
  f.model = open("early");
  for (int i = 0; i < 4; ++i) f.Store(Prompt(std::to_string(i), 1));
  f.model = open("late");
  EXPECT_TRUE(f.cache().Reserve(f.session, f.EmptyLease(), 0, 1, std::nullopt).ok());
  f.cache().CheckInvariants();
}

TEST(Models, WhenNoSlabCanChangeHandsNothingIsEvictedInVain) {
  Fixture f({.gpu = 16, .slab = 4});
  const LeaseId pinned = f.Hold(Prompt("pinned", 12));  // three slabs; two would be fair
  f.model = f.cache().OpenModel(World::Spec("late"))->id;
  f.Store(Prompt("own", 4));
  EXPECT_TRUE(absl::IsResourceExhausted(
      f.cache().Reserve(f.session, f.EmptyLease(), 0, 5, std::nullopt).status()));
  EXPECT_EQ(f.Matched(Prompt("own", 4)), 4u);
  f.Release(pinned);
  EXPECT_TRUE(f.cache().Reserve(f.session, f.EmptyLease(), 0, 5, std::nullopt).ok());
  f.cache().CheckInvariants();
}

TEST(Models, ALateModelGetsItsShareOfNvme) {
  Fixture f({.host = 8, .nvme = 16, .slab = 4});
  for (int i = 0; i < 8; ++i) {
    f.Store(Prompt(std::to_string(i), 2));
    ASSERT_TRUE(f.world.Settle());
  }
  f.cache().Evict(Tier::kHost, 0, 100);
  f.model = f.cache().OpenModel(World::Spec("late"))->id;
  for (int i = 0; i < 8; ++i) {
    f.Store(Prompt(std::to_string(i), 2));
    ASSERT_TRUE(f.world.Settle());
    f.cache().CheckInvariants();
  }
  EXPECT_EQ(f.cache().Models()[1].bytes_used[2], 8 * kSlotGranule);
}

// One letter a block. Hits by hand, LRU over leaves, 3 blocks of memory:
//   ABC  0   A B C
//   ABD  2   C goes                      A B D
//   ABD  3                               A B D
//   E    0   D goes                      A B E
//   ABC  2   E is older than AB: it goes A B C
//   ABD  2   C goes                      A B D
//   E    0   D goes                      A B E
//   E    1                               A B E
//   F    0   B goes: A B are the oldest  A E F
//   AB   1   E goes                      A B F
//   ABC  2   F goes                      A B C
// With 5 blocks nothing goes before F, and then C: 4 hits more (C, D, E, B). Without a bound
// the last C is one more.
constexpr struct {
  const char* blocks;
  uint32_t hits;
} kTrace[] = {{"ABC", 0}, {"ABD", 2}, {"ABD", 3}, {"E", 0},  {"ABC", 2}, {"ABD", 2},
              {"E", 0},   {"E", 1},   {"F", 0},   {"AB", 1}, {"ABC", 2}};

Tokens Letters(const std::string& blocks) {
  Tokens tokens;
  for (char c : blocks) tokens = tokens + Prompt(std::string(1, c), 1);
  return tokens;
}

// Looks up, brings up, puts the rest; the hits by tier.
Tiers Request(Fixture& f, const Tokens& prompt) {
  Tiers hits = {};
  const LookupResult found = f.Look(prompt);
  for (const SlotRun& run : found.runs) {
    hits[Index(run.tier)] += static_cast<uint32_t>(run.slots.size());
  }
  EXPECT_EQ(f.world.PrefetchAll(f.session, found.lease, std::nullopt)->ready_blocks,
            found.matched_blocks);
  const uint32_t missing = Fixture::Blocks(prompt) - found.matched_blocks;
  if (missing > 0) {
    const auto put = f.Extend(found.lease, prompt, missing);
    EXPECT_TRUE(put.ok()) << put.status();
  }
  f.Release(found.lease);
  EXPECT_TRUE(f.world.Settle());
  f.cache().CheckInvariants();
  return hits;
}

TEST(Replay, OneTierHitsExactlyAsCountedByHand) {
  for (const bool host : {false, true}) {
    Fixture f(host ? World::Sizes{.host = 3} : World::Sizes{.gpu = 3});
    for (const auto& [blocks, hits] : kTrace) {
      const Tiers found = Request(f, Letters(blocks));
      EXPECT_EQ(found[host], hits) << blocks;
    }
    EXPECT_EQ(f.cache().Stats().tiers[host].hits, 13u);
    EXPECT_EQ(f.cache().Stats().miss_blocks, 24u - 13);
  }
}

// Tiers are exclusive: the second adds the hits that one tier of both sizes would have more.
TEST(Replay, ExclusiveTiersSplitTheHitsAsCountedByHand) {
  // Three blocks a request of room to work in, kept free by the cleaner, twice.
  Fixture f({.gpu = 3 + 6, .host = 2 + 6, .nvme = 64, .low_water = 6, .background_moves = 1});
  Tiers hits = {};
  for (const auto& request : kTrace) {
    const Tiers found = Request(f, Letters(request.blocks));
    for (int t = 0; t < kTierCount; ++t) hits[t] += found[t];
  }
  EXPECT_EQ(hits, (Tiers{13, 4, 1}));
}

// --- Threads -----------------------------------------------------------------------------

// Completes every move at once, but from threads of its own and without copying anything.
class ThreadedMover final : public Mover {
 public:
  ThreadedMover() {
    for (int i = 0; i < 2; ++i) threads_.emplace_back([this] { Run(); });
  }
  ~ThreadedMover() override { Stop(); }
  void set_done(DoneFn done) { done_ = std::move(done); }

  absl::Status Submit(const MoveJob& job) override {
    std::lock_guard lock(mu_);
    if (stopped_) return absl::UnavailableError("stopped");
    jobs_.push_back(job.id);
    wake_.notify_one();
    return absl::OkStatus();
  }
  void Raise(MoveId) override {}
  void Erase(Slot, uint32_t) override {}
  // Completes what is queued, then nothing more.
  void Stop() {
    {
      std::lock_guard lock(mu_);
      stopped_ = true;
      wake_.notify_all();
    }
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  void Run() {
    std::unique_lock lock(mu_);
    while (true) {
      wake_.wait(lock, [this] { return stopped_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      const MoveId id = jobs_.front();
      jobs_.pop_front();
      lock.unlock();
      done_(id, id % 50 == 0 ? absl::InternalError("injected") : absl::OkStatus());
      lock.lock();
    }
  }

  std::mutex mu_;
  std::condition_variable wake_;
  std::deque<MoveId> jobs_;
  bool stopped_ = false;
  DoneFn done_;
  std::vector<std::thread> threads_;
};

// One worker: random prompts, prefetched or put, held for a while.
void Work(Cache& cache, ModelId model, uint32_t seed, std::atomic<uint64_t>& lookups) {
  std::mt19937 random(seed);
  SessionId session = *cache.OpenSession(std::to_string(seed));
  std::vector<LeaseId> held;
  for (int i = 0; i < 300; ++i) {
    const Tokens prompt = Prompt(std::to_string(random() % 3), 1 + random() % 3) +
                          Prompt(std::to_string(random() % 4), random() % 4);
    const auto found = cache.Lookup(session, model, prompt, {});
    if (!found.ok()) continue;
    lookups += 1;
    held.push_back(found->lease);
    const Tier tier = random() % 2 == 0 ? Tier::kGpu : Tier::kHost;
    if (random() % 2 == 0) {
      const auto id = cache.Prefetch(session, found->lease, tier, [] {});
      if (id.ok() && random() % 2 == 0) cache.CancelPrefetch(*id);
      if (id.ok()) (void)cache.PollPrefetch(*id);
    }
    const uint32_t missing = Fixture::Blocks(prompt) - found->matched_blocks;
    if (missing > 0 &&
        cache.Reserve(session, found->lease, found->matched_blocks, missing, tier).ok()) {
      (void)cache.Put(session, found->lease, found->matched_blocks,
                      Fixture::Part(prompt, found->matched_blocks, missing));
    }
    if (random() % 4 == 0) (void)cache.Flush(session, found->lease, [](absl::Status) {});
    if (random() % 8 == 0) (void)cache.Fork(session, found->lease);
    if (random() % 16 == 0) (void)cache.Truncate(session, found->lease, 0);
    if (held.size() > 3) {
      EXPECT_TRUE(cache.Release(session, held.front(), random() % 2 == 0).ok());
      held.erase(held.begin());
    }
    if (random() % 40 == 0) {
      cache.LoseSession(session);
      cache.EndSession(session);
      held.clear();
      session = *cache.OpenSession(std::to_string(seed));
    }
    if (random() % 40 == 0) {
      (void)cache.Stats();
      (void)cache.Sessions(true);
      (void)cache.Explain(model, prompt);
      (void)cache.TopPrefixes(0, 5);
      cache.Evict(tier, 0, 1);
    }
  }
  cache.EndSession(session);
}

TEST(Threads, ManyWorkersAndAMoverWithItsOwnThreads) {
  FakeClock clock;
  ThreadedMover mover;
  Cache::Options options;
  options.tiers[0] = {24 * kSlotGranule, 24 * kSlotGranule, 4 * kSlotGranule};
  options.tiers[1] = {32 * kSlotGranule, 32 * kSlotGranule, 4 * kSlotGranule};
  options.tiers[2] = {48 * kSlotGranule, 48 * kSlotGranule, 0};
  Cache cache(options, clock, mover, MakeLruPolicy());
  mover.set_done([&](MoveId id, absl::Status status) { cache.OnMoveDone(id, status); });
  const ModelId model = cache.OpenModel(World::Spec("model"))->id;
  std::atomic<uint64_t> lookups = 0;
  std::vector<std::thread> workers;
  for (uint32_t seed = 1; seed <= 4; ++seed) {
    workers.emplace_back([&, seed] { Work(cache, model, seed, lookups); });
  }
  for (int i = 0; i < 50; ++i) {
    cache.Clean();
    cache.CheckInvariants();
    std::this_thread::yield();
  }
  for (std::thread& worker : workers) worker.join();
  mover.Stop();
  cache.CheckInvariants();
  const CacheStats stats = cache.Stats();
  EXPECT_EQ(stats.lookups, lookups);
  EXPECT_GT(stats.put_blocks, 0u);
  EXPECT_EQ(stats.leases, 0u);
  EXPECT_EQ(stats.sessions, 0u);
  EXPECT_EQ(stats.moves_in_flight, 0u);
  for (const TierStats& tier : stats.tiers) EXPECT_EQ(tier.bytes_pinned, 0u);
}

}  // namespace
}  // namespace larder::testing
