// What Cache keeps: only for the cache_*.cc files. Everything here is guarded by Cache::mu_.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "server/cache/cache.h"
#include "server/cache/eviction_policy.h"
#include "server/cache/hi_radix_tree.h"
#include "server/cache/slot_owners.h"
#include "storage/nvme_index.h"
#include "storage/slot_allocator.h"

namespace larder {

// One model's tree and its part of every tier.
struct Cache::ModelState {
  ModelState(Model m, SlotOwners& gpu, SlotOwners& host)
      : model(std::move(m)), tree(model.spec.block_tokens, {&gpu, &host}) {}

  Model model;
  HiRadixTree tree;
  std::array<SlotAllocator::Pool, kTierCount> pool{};
  std::array<uint64_t, kTierCount> blocks{};  // copies in GPU and in HOST
  std::array<uint64_t, kTierCount> pinned{};  // copies with a pin
  std::array<uint64_t, kTierCount> held{};    // slots of leases: reserved and duplicates
  std::array<uint64_t, kTierCount> arriving{};  // slots of moves under way to the tier
  uint64_t leaving_gpu = 0;                     // moves under way from GPU to HOST
};

struct Cache::Session {
  SessionId id = 0;
  std::string worker;
  bool secret = false;  // the id is not to be told
  bool lost = false;
  absl::Time opened;
  absl::btree_map<LeaseId, Lease*> leases;
};

// A pinned path: `cursor` is its end, `pins` says in which tier each part was given out.
struct Cache::Lease {
  struct PinnedRange {
    Tier tier;
    uint32_t begin;
    uint32_t end;
  };
  // A block of our own where another worker's is canonical. Forks share it.
  struct Duplicate {
    uint32_t position;
    std::shared_ptr<const SlotRef> slot;
  };

  LeaseId id = 0;
  Session* session = nullptr;
  ModelState* model = nullptr;
  absl::Time opened;
  Cursor cursor;
  uint32_t gpu_end = 0;  // blocks [0, gpu_end) are pinned in GPU, and no others there
  std::vector<PinnedRange> pins;  // HOST and NVME
  Tier reserved_tier = Tier::kGpu;
  std::vector<Slot> reserved;
  std::vector<Duplicate> duplicates;
  std::vector<PrefetchId> prefetches;
  std::vector<FlushId> flushes;

  uint32_t end() const { return cursor.end; }
};

// One block on its way. It owns `to`; `from` is pinned (once the block is there).
struct Cache::Move {
  enum class Phase { kBlocked, kMoving, kArrived };

  MoveId id = 0;
  ModelState* model = nullptr;
  Cursor at;  // the block is at.end - 1
  SlotRef from;
  SlotRef to;
  MoveClass move_class = MoveClass::kBackground;
  Phase phase = Phase::kMoving;
  BlockRecord record;
  std::vector<PrefetchId> askers;
  std::vector<MoveId> followers;  // arrived, waiting for this one to commit first
};

struct Cache::PrefetchState {
  PrefetchId id = 0;
  Lease* lease = nullptr;
  Tier tier = Tier::kGpu;
  uint32_t reported = 0;  // blocks [0, reported) were given out by Poll
  uint32_t ready = 0;     // blocks [0, ready) are readable and pinned
  uint32_t promised = 0;
  std::optional<uint32_t> unreadable;
  std::vector<SlotRun> runs;  // not yet given out
  std::function<void()> on_progress;
};

struct Cache::FlushState {
  FlushId id = 0;
  Lease* lease = nullptr;
  std::function<void(absl::Status)> on_done;
};

// A tier pair: what is under way, and how fast it has been.
struct Cache::Hop {
  Tier from = Tier::kGpu;
  Tier to = Tier::kGpu;
  uint64_t in_flight = 0;
  uint64_t background = 0;  // of those
  uint64_t done = 0;
  uint64_t failed = 0;
  uint64_t bytes = 0;
  uint64_t queued_bytes = 0;
  bool refused = false;  // the mover's queue was full; try again after a completion
  absl::Time last;       // completion, or start of the busy period
  // Decaying sums; their quotient is the measured rate. They begin at a plausible one.
  double sum_bytes = 0;
  double sum_seconds = 0;

  double BytesPerSecond() const { return sum_bytes / sum_seconds; }
};

// Why a Flush is refused, or ends.
inline absl::Status NvmeTakesNoWrites() {
  return absl::UnavailableError("flush: tier NVME is degraded and takes no writes");
}

enum class Cache::Progress {
  kDone,     // everything asked for is durable or on its way
  kWaiting,  // something must arrive first; its commit will come back to this
  kBlocked,  // no room or too much under way
};

// Keys of the blocks after a match in memory, computed without the lock.
struct Cache::ColdKeys {
  uint32_t start = 0;   // block of the request's first token
  uint32_t begin = 0;   // keys[i] is the key of block begin + i
  uint32_t wanted = 0;  // hash up to this block; 0: nothing asked for yet
  BlockKey parent;      // of block begin
  std::vector<BlockKey> keys;
};

struct Cache::State {
  struct TierState {
    explicit TierState(const TierOptions& options)
        : slots(options.bytes, options.slab_bytes), owners(slots) {}
    SlotAllocator slots;
    SlotOwners owners;  // of GPU and HOST
    // A search for a slab to take goes on with this one. So many were looked at in vain since
    // `State::let_go` had this value: once that is all of them, there is nothing to take.
    uint32_t reclaim_next = 0;
    uint32_t reclaim_in_vain = 0;
    uint64_t reclaim_let_go = 0;
    uint64_t hits = 0;
    uint64_t evictions = 0;
  };
  struct NvmePool {
    SlotAllocator::Pool pool;
    uint32_t block_bytes;
  };
  struct Recovered {
    Slot slot;
    uint32_t bytes;
    BlockRecord record;
  };

  explicit State(const Options& options)
      : tiers{TierState(options.tiers[0]), TierState(options.tiers[1]),
              TierState(options.tiers[2])},
        nvme(tiers[2].slots),
        nvme_writes(options.nvme_writes),
        next_id(options.first_id) {}

  std::array<TierState, kTierCount> tiers;
  NvmeIndex nvme;
  absl::btree_map<ModelId, NvmePool> nvme_pools;  // also of models not opened since the start
  std::vector<Recovered> recovered;
  bool nvme_writable = true;
  WriteBudget nvme_writes;

  std::vector<std::unique_ptr<ModelState>> models;  // in the order they were opened
  absl::flat_hash_map<ModelId, ModelState*> model_by_id;
  absl::btree_map<SessionId, std::unique_ptr<Session>> sessions;
  absl::flat_hash_map<LeaseId, std::unique_ptr<Lease>> leases;
  absl::flat_hash_map<MoveId, std::unique_ptr<Move>> moves;
  absl::flat_hash_map<std::pair<SlotRef, Tier>, Move*> move_by_source;
  absl::flat_hash_map<PrefetchId, std::unique_ptr<PrefetchState>> prefetches;
  absl::btree_map<FlushId, std::unique_ptr<FlushState>> flushes;
  std::array<Hop, 4> hops;

  uint64_t next_id;
  MoveId next_move = 1;
  uint64_t operation = 0;  // the policy's clock
  uint64_t let_go = 0;     // grows when a lease or a move lets go of a slot
  CacheStats counters;     // only its plain counters are kept up to date here

  // Decided under the lock, done after it.
  std::vector<MoveJob> jobs;
  std::vector<MoveId> raises;
  std::vector<std::pair<Slot, uint32_t>> erases;  // NVMe slots and the tags of their keys
  std::vector<std::function<void()>> calls;
};

class ABSL_SCOPED_LOCKABLE Cache::Section {
 public:
  explicit Section(const Cache& cache) ABSL_EXCLUSIVE_LOCK_FUNCTION(cache.mu_);
  ~Section() ABSL_UNLOCK_FUNCTION();
  Section(const Section&) = delete;
  Section& operator=(const Section&) = delete;

 private:
  Cache& cache_;
};

}  // namespace larder
