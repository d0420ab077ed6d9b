// A world for a Cache without threads, clocks or bytes: a mover stepped by hand, with faults,
// and slots that hold a number in place of a block.
//
// A block's content is a hash of its model and of every token up to its end, so a slot that
// holds the wrong block is seen at once. A block of several shards has a content for each, which
// take 4 KiB each: in GPU at the same slot of each rank, in HOST and on NVMe one behind the other.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "server/cache/cache.h"
#include "server/cache/eviction_policy.h"
#include "storage/mover.h"

namespace larder::testing {

using Tokens = std::vector<uint32_t>;

class FakeClock final : public Clock {
 public:
  absl::Time Now() const override { return now_; }
  void Advance(absl::Duration by) { now_ += by; }

 private:
  absl::Time now_ = absl::UnixEpoch() + absl::Hours(1);
};

// How likely each fault is at a step, in percent.
struct Faults {
  int fail = 0;      // the copy fails
  int tear = 0;      // an NVMe write reports success, but its payload is garbage
  int flip = 0;      // an NVMe read finds a mismatch
  bool reorder = false;  // moves complete in any order
  int refuse = 0;    // the queue is full
};

class SteppedMover final : public Mover {
 public:
  struct NvmeSlot {
    uint32_t bytes = 0;
    BlockRecord record;
    uint64_t content = 0;  // of the first shard
    bool torn = false;
    std::vector<uint64_t> others = {};  // of the other shards
  };
  // Of the 4 KiB at `slot` of one memory; HOST's rank is 0.
  using Place = std::tuple<Tier, uint32_t, Slot>;
  static Place PlaceOf(SlotRef ref, uint32_t rank) {
    if (ref.tier == Tier::kGpu) return {ref.tier, rank, ref.slot};
    return {ref.tier, 0, Slot(ref.slot.number() + rank)};
  }

  explicit SteppedMover(uint64_t seed) : random_(seed) {}
  void set_done(DoneFn done) { done_ = std::move(done); }

  absl::Status Submit(const MoveJob& job) override;
  void Raise(MoveId) override { raises += 1; }
  void Erase(Slot slot, uint32_t key_tag) override;

  bool idle() const { return jobs_.empty(); }
  size_t queued() const { return jobs_.size(); }
  const std::deque<MoveJob>& jobs() const { return jobs_; }
  // Completes one move; false when there is none.
  bool Step();
  // Completes this move with this result, copying the content when it is OK.
  void Complete(MoveId id, absl::Status status);
  // Everything in memory is gone, moves under way too; what NVMe holds stays.
  void Crash();

  std::map<Place, uint64_t> memory;  // GPU and HOST
  std::map<Slot, NvmeSlot> nvme;
  Faults faults;
  uint64_t raises = 0;

 private:
  void WriteNvme(const MoveJob& job);
  bool Chance(int percent) { return percent > 0 && static_cast<int>(random_() % 100) < percent; }

  std::mt19937_64 random_;
  DoneFn done_;
  std::deque<MoveJob> jobs_;
};

// One cache, its mover, and models of `block_tokens` = 4 and slots of 4 KiB a shard.
class World {
 public:
  struct Sizes {
    uint64_t gpu = 0;  // slots, of each rank
    uint64_t host = 0;
    uint64_t nvme = 0;
    uint64_t low_water = 0;  // slots, GPU and HOST
    uint64_t slab = 0;       // slots; 0: a slab is the tier
    uint32_t background_moves = 64;  // at most, a tier pair
    WriteBudget::Limits nvme_writes = {};
    uint32_t gpu_ranks = 1;
  };
  World(const Sizes& sizes, uint64_t seed);

  // As after kill -9 and a new start: NVMe's records are all there is.
  void Restart();
  Cache& cache() { return *cache_; }
  // Completes moves until nothing is under way; false when they never end.
  bool Settle();

  // Writes the content of blocks [position, ..) of `prompt` into the slots of reserved runs.
  void Fill(ModelId model, const std::vector<SlotRun>& runs, const Tokens& prompt);
  // Empty when every GPU and HOST slot of the runs holds exactly its block, for each rank.
  std::string WrongBytes(ModelId model, const std::vector<SlotRun>& runs, const Tokens& prompt);
  static uint64_t Content(ModelId model, const Tokens& prompt, uint32_t block);

  // Lookup, prefetch, reserve, fill and put of the whole prompt; the lease's end.
  absl::StatusOr<LeaseId> PutAll(SessionId session, ModelId model, const Tokens& prompt);
  std::optional<PrefetchUpdate> PrefetchAll(SessionId session, LeaseId lease,
                                            std::optional<Tier> tier);

  static ModelSpec Spec(const std::string& name, uint32_t shards = 1);
  static constexpr uint32_t kBlockTokens = 4;
  static constexpr uint32_t kPartBytes = 4096;  // of a block, a shard

  FakeClock clock;
  SteppedMover mover;
  const Sizes sizes;

 private:
  std::unique_ptr<Cache> cache_;
};

// `blocks` whole blocks of tokens that spell `name` and nothing else.
Tokens Prompt(const std::string& name, uint32_t blocks);

}  // namespace larder::testing
