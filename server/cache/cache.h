// Cache: which blocks are where, and who holds them. A deterministic state machine.
//
// Calls come in, moves go out through a Mover, completions come back through OnMoveDone.
// It owns the trees, leases and slots of every model; it touches no K/V byte, does no I/O
// and starts no thread.
//
// Thread safety: every method may be called from any thread. One mutex guards all state;
// it is held for microseconds, and no callback and no Mover call is made under it.
//
// Invariants (the numbers are those of HiRadixTree's rules, README.md):
//   1. Every slot has exactly one owner: a free list, a tree block, a lease (reserved or
//      duplicate), or a move.
//   2. A pinned copy keeps its slot; a copy that moves is pinned by the move.
//   3. GPU copies are prefix-closed along every path, and so are GPU-or-HOST copies.
//   4. A failed call has changed nothing.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/cache/model.h"
#include "server/cache/write_budget.h"
#include "storage/mover.h"
#include "storage/types.h"

namespace larder {

class EvictionPolicy;
struct TreeBlock;
struct TreeNode;
struct Cursor;
struct TreePosition;

using SessionId = uint64_t;
using LeaseId = uint64_t;
using PrefetchId = uint64_t;
using FlushId = uint64_t;

// Consecutive blocks of a path in one tier; slots[i] is the block at position + i. NVME
// runs carry slots too, but only the daemon can read those.
struct SlotRun {
  Tier tier = Tier::kGpu;
  uint32_t position = 0;
  std::vector<Slot> slots;
};

struct RestoreEstimate {
  uint64_t bytes = 0;
  absl::Duration time;
  uint32_t cut_blocks = 0;
};

struct LookupOptions {
  LeaseId lease = 0;  // extend this lease from its end
  bool peek = false;  // pin nothing, touch nothing
  double prefill_tokens_per_second = 0;  // 0: never cut
};

struct LookupResult {
  LeaseId lease = 0;
  uint32_t matched_blocks = 0;  // whole path, the lease's earlier part included
  uint32_t block_tokens = 0;    // the model's
  std::vector<SlotRun> runs;    // of the newly matched part
  RestoreEstimate restore;
};

struct LeaseState {
  LeaseId lease = 0;
  uint32_t end = 0;
  uint32_t durable_blocks = 0;
  uint32_t reserved_blocks = 0;
};

// What became readable since the last poll. After `done`, or after a status that is not
// OK, the prefetch no longer exists.
struct PrefetchUpdate {
  std::vector<SlotRun> runs;
  uint32_t ready_blocks = 0;
  uint32_t promised_blocks = 0;
  bool done = false;
  std::optional<uint32_t> unreadable_position;  // set: done, and this block failed
};

struct TierStats {
  uint64_t bytes_total = 0;  // in GPU, here and below, of each rank
  uint64_t bytes_used = 0;
  uint64_t bytes_pinned = 0;
  uint64_t blocks = 0;
  uint64_t hits = 0;
  uint64_t evictions = 0;
};

struct HopStats {
  Tier from = Tier::kGpu;
  Tier to = Tier::kGpu;
  uint64_t queued = 0;
  uint64_t done = 0;
  uint64_t failed = 0;
  uint64_t bytes = 0;
  double bytes_per_second = 0;
};

struct CacheStats {
  std::array<TierStats, kTierCount> tiers;
  std::vector<HopStats> hops;
  uint64_t models = 0;
  uint64_t sessions = 0;
  uint64_t sessions_lost = 0;
  uint64_t leases = 0;
  uint64_t reserved_blocks = 0;
  uint64_t lookups = 0;
  uint64_t lookup_blocks = 0;
  uint64_t miss_blocks = 0;
  uint64_t corrupt_blocks = 0;
  uint64_t orphans_collected = 0;
  uint64_t put_blocks = 0;
  uint64_t duplicate_blocks = 0;  // put, but already canonical
  uint64_t exhausted = 0;         // calls answered RESOURCE_EXHAUSTED
  uint64_t moves_in_flight = 0;
  // Blocks that left memory without a copy on NVME because Options::nvme_writes was reached.
  uint64_t limited_blocks = 0;
};

struct ModelStats {
  Model model;
  std::array<uint64_t, kTierCount> bytes_used{};  // in GPU of each rank
  std::array<uint64_t, kTierCount> bytes_quota{};
  uint64_t nodes = 0;
  uint64_t blocks = 0;
};

struct LeaseInfo {
  LeaseId lease = 0;
  ModelId model = 0;
  uint32_t end = 0;
  uint32_t reserved_blocks = 0;
  uint32_t duplicate_blocks = 0;
  absl::Duration age;
};

struct SessionInfo {
  SessionId session = 0;  // 0: one of the daemon's own
  std::string worker;
  bool lost = false;
  absl::Duration age;
  uint64_t lease_count = 0;
  std::vector<LeaseInfo> leases;  // when asked for
};

struct ExplainSegment {
  uint32_t position = 0;
  uint32_t blocks = 0;
  std::array<bool, kTierCount> in_tier{};
  uint32_t pins = 0;
  uint64_t hits = 0;
  uint32_t children = 0;
};

struct Explanation {
  uint32_t asked_blocks = 0;
  uint32_t matched_blocks = 0;
  std::vector<ExplainSegment> segments;
  std::string stopped_because;
};

struct TopPrefix {
  ModelId model = 0;
  uint32_t blocks = 0;
  uint64_t hits = 0;
  std::vector<uint32_t> head;
};

class Cache {
 public:
  struct TierOptions {
    uint64_t bytes = 0;       // 0: there is no such tier
    uint64_t slab_bytes = 0;  // the unit in which models take from the tier
    // The cleaner keeps so many bytes of slots free in each model's part, so that Reserve
    // and Prefetch find room without waiting for a copy.
    uint64_t free_bytes_low_water = 0;
  };
  struct Options {
    std::array<TierOptions, kTierCount> tiers;
    uint32_t gpu_ranks = 1;  // memories of tiers[GPU].bytes each: a model's shards at most
    uint64_t first_id = 1;  // of sessions and leases; random at each boot
    uint32_t models_max = 64;
    uint32_t sessions_max = 4096;
    uint32_t leases_per_session_max = 65536;
    uint32_t prefetches_per_lease_max = 64;  // under way
    uint32_t flushes_max = 1024;             // under way, of all leases
    uint32_t background_moves_max = 64;  // in flight at a time, a tier pair
    uint32_t flush_moves_max = 256;      // the same of what flushes wait for
    WriteBudget::Limits nvme_writes;     // what the drive is to endure
  };

  // `clock`, `mover` and, through it, every slot's memory must outlive the cache.
  Cache(const Options& options, const Clock& clock, Mover& mover,
        std::unique_ptr<EvictionPolicy> policy);
  ~Cache();
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  // --- Models and sessions -------------------------------------------------------------

  absl::StatusOr<Model> OpenModel(const ModelSpec& spec);
  absl::StatusOr<Model> FindModel(ModelId id) const;  // NOT_FOUND

  // `secret`: a random id for a session of the daemon's own, which nobody can guess and
  // Sessions() does not tell; 0: the next id. ALREADY_EXISTS: another session has it.
  absl::StatusOr<SessionId> OpenSession(std::string worker, SessionId secret = 0);
  // The stream is gone: the session's calls fail from now on; its pins stay. A session that
  // holds no lease ends at once.
  void LoseSession(SessionId session);
  // No process of the session can touch a slot any more: everything it held is freed.
  void EndSession(SessionId session);

  // --- Leases --------------------------------------------------------------------------

  // `tokens` past the last whole block are ignored. With `peek`, `session` is not looked at.
  absl::StatusOr<LookupResult> Lookup(SessionId session, ModelId model,
                                      std::span<const uint32_t> tokens,
                                      const LookupOptions& options);
  // `tier` GPU or HOST; nullopt: the highest that can take them. See kv_cache.proto for the
  // contract of each of these calls.
  absl::StatusOr<std::vector<SlotRun>> Reserve(SessionId session, LeaseId lease,
                                               uint32_t position, uint32_t count,
                                               std::optional<Tier> tier);
  absl::StatusOr<LeaseState> Put(SessionId session, LeaseId lease, uint32_t position,
                                 std::span<const uint32_t> tokens);
  absl::StatusOr<LeaseState> Truncate(SessionId session, LeaseId lease, uint32_t position);
  // The fork belongs to session `owner`; 0: to the same one.
  absl::StatusOr<LeaseState> Fork(SessionId session, LeaseId lease, SessionId owner = 0);
  // Moves the lease's end from `position` to that of `leader`, a fork of it that has gone on
  // in session `owner`. ABORTED when the lease's end is elsewhere by now.
  absl::StatusOr<LeaseState> Follow(SessionId session, LeaseId lease, uint32_t position,
                                    SessionId owner, LeaseId leader);
  absl::Status Release(SessionId session, LeaseId lease, bool session_over);
  absl::StatusOr<LeaseState> GetLease(SessionId session, LeaseId lease) const;
  // The model of a lease, for turning slots into bytes.
  absl::StatusOr<Model> ModelOfLease(SessionId session, LeaseId lease) const;

  // --- Moves that somebody waits for ---------------------------------------------------

  // Starts bringing the lease's blocks up to `tier`. `on_progress` is called, without any
  // lock and from any thread, whenever Poll has news (never after CancelPrefetch or the
  // final Poll returned, but possibly during them).
  absl::StatusOr<PrefetchId> Prefetch(SessionId session, LeaseId lease,
                                      std::optional<Tier> tier,
                                      std::function<void()> on_progress);
  absl::StatusOr<PrefetchUpdate> PollPrefetch(PrefetchId id);
  // The moves go on; the asker leaves.
  void CancelPrefetch(PrefetchId id);

  // `on_done` is called once, possibly before this returns: OK when every block of the
  // lease was durable, DATA_LOSS when one is only in GPU, which is lost. Not called after
  // CancelFlush returned true.
  absl::StatusOr<FlushId> Flush(SessionId session, LeaseId lease,
                                std::function<void(absl::Status)> on_done);
  bool CancelFlush(FlushId id);

  void OnMoveDone(MoveId id, absl::Status status);

  // --- NVMe ----------------------------------------------------------------------------

  // One durable block found at start. Call for every record, then RecoverDone, before the
  // first lookup. False: the slot cannot belong to this configuration (drop the record).
  bool RecoverBlock(Slot slot, uint32_t bytes, const BlockRecord& record);
  // Drops blocks whose ancestors are missing; returns how many.
  uint64_t RecoverDone();
  // At start: what Options::nvme_writes counts of the time before.
  void RecoverWritten(const NvmeWritten& written);
  // Writing to NVME stops and starts again; reads of healthy slots go on.
  void SetNvmeWritable(bool writable);

  // --- GPU -----------------------------------------------------------------------------

  // The GPU tier's device has failed for good. Nothing new goes there; its copies are dropped,
  // those that somebody reads once they are let go.
  void LoseGpu();

  // --- People --------------------------------------------------------------------------

  CacheStats Stats() const;
  std::vector<ModelStats> Models() const;
  absl::StatusOr<Explanation> Explain(ModelId model, std::span<const uint32_t> tokens) const;
  // These three give the mutex up in between: what changes meanwhile may be missed.
  std::vector<SessionInfo> Sessions(bool leases) const;
  std::vector<TopPrefix> TopPrefixes(ModelId model, uint32_t count) const;
  // Drops at most `blocks` unpinned copies of the tier; returns (dropped, kept).
  std::pair<uint64_t, uint64_t> Evict(Tier tier, ModelId model, uint64_t blocks);

  // Runs the cleaner. Called after operations by itself; a driver may call it on a timer to
  // retry what a full queue refused.
  void Clean();

  // Panics (CHECK) when an invariant does not hold; for tests.
  void CheckInvariants() const;

 private:
  // Defined in cache_state.h.
  struct ModelState;
  struct Lease;
  struct Session;
  struct Move;
  struct PrefetchState;
  struct FlushState;
  struct Hop;
  struct State;
  struct ColdKeys;
  struct Probe;
  enum class Progress;
  // Holds the mutex; on leaving, runs the cleaner, unlocks, and only then submits the moves
  // and makes the calls that were decided on.
  class Section;

  // cache.cc, cache_lease.cc
  absl::StatusOr<Session*> FindSession(SessionId id, bool may_be_lost = false) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<Lease*> FindLease(SessionId session, LeaseId lease) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<ModelState*> FindState(ModelId model) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<Tier> MemoryTier(std::optional<Tier> tier) const;
  Lease& NewLease(Session& session, ModelState& model) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DropLease(Lease& lease, bool session_over) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  LeaseState StateOf(const Lease& lease) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CheckFits(const Model& model) const;
  absl::Status CheckLeaseCount(const Session& session) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FreeReserved(Lease& lease) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FreeDuplicates(Lease& lease, uint32_t from) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void MarkFinished(Lease& lease) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Tier ReserveTier(const Lease& lease) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CheckEnd(const Lease& lease, uint32_t position) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CheckPut(const Lease& lease, uint32_t position,
                        std::span<const uint32_t> tokens) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Publish(Lease& lease, std::span<const uint32_t> tokens) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Exhausted(const ModelState& model, Tier tier, uint64_t blocks)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // cache_pins.cc
  void PinCopy(ModelState& model, TreeNode* node, uint32_t index, Tier tier)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void UnpinCopy(ModelState& model, TreeNode* node, uint32_t index, Tier tier)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void PinRange(Lease& lease, Tier tier, uint32_t begin, uint32_t end)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void PinOnce(Lease& lease, Tier tier, uint32_t begin, uint32_t end)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void UnpinFrom(Lease& lease, uint32_t position) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Pins each block of [begin, end) where a worker is to read it, and says where.
  std::vector<SlotRun> PinBest(Lease& lease, uint32_t begin, uint32_t end)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Where a block is read; GPU that is lost only where it is nowhere else.
  std::optional<Tier> BestTier(const TreeBlock& block) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Whether a lookup may match it: not where it is only in GPU that is lost.
  bool Offered(const TreeBlock& block) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool Durable(const TreeBlock& block) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Slot TakeSlot(ModelState& model, Tier tier, bool drop_dirty) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  uint64_t LowWaterSlots(const ModelState& model, Tier tier) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool BelowLowWater(const ModelState& model, Tier tier) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool DropMirror(ModelState& model) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool MakeRoom(ModelState& model, Tier tier, bool drop_dirty) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  ModelState* RicherModel(const ModelState& model, Tier tier) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool ReclaimSlab(ModelState& model, Tier tier) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DropCopy(ModelState& model, TreeNode* node, uint32_t index, Tier tier)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool ForgetBelow(ModelState& model, TreeNode* node, uint32_t index)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // cache_lookup.cc
  absl::StatusOr<Probe> MatchInMemory(SessionId session, ModelId model,
                                      std::span<const uint32_t> tokens,
                                      const LookupOptions& options)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CheckExtend(const Lease& lease, const ModelState& model) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void StartKeys(const Probe& probe, ColdKeys& keys) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool FindCold(Probe& probe, ColdKeys& keys) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::vector<SlotRun> RunsOf(const Probe& probe) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AddCold(Probe& probe, std::span<const uint32_t> tokens, const ColdKeys& keys)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  LookupResult Grant(Probe& probe, std::span<const uint32_t> tokens, const LookupOptions& options,
                     const ColdKeys& keys) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TouchPath(ModelState& model, TreePosition at) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  uint32_t CutByBreakEven(const ModelState& model, const std::array<uint32_t, kTierCount>& blocks,
                          double prefill_tokens_per_second, RestoreEstimate* estimate) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static BlockKey KeyAt(ModelState& model, TreeNode* node, uint32_t end);

  // cache_moves.cc
  Hop& HopOf(Tier from, Tier to) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Move* FindMove(const TreeBlock& block, Tier to) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Move* StartMove(ModelState& model, TreeNode* node, uint32_t index, SlotRef from, SlotRef to,
                  MoveClass move_class) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SubmitMove(Move& move) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RaiseMove(Move& move) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Arrived(Move& move) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void NoteInHost(ModelState& model, TreeNode* node, uint32_t index)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Commit(Move& move) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Fail(Move& move, const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Discard(Move& move) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndMove(Move& move) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void LoseNvmeCopy(ModelState& model, TreeNode* node, uint32_t index)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // cache_prefetch.cc
  bool ClaimForPrefetch(PrefetchState& prefetch, uint32_t position)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Advance(PrefetchState& prefetch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RaiseMovesOf(const Lease& lease) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void CheckFlushes() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FailFlushes(const absl::Status& why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::optional<uint32_t> FirstOnlyInGpu(const Lease& lease) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FailLostFlushes() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // cache_cleaner.cc
  void CleanLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void CleanGpu(ModelState& model) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DropLostGpu(ModelState& model) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void CleanHost(ModelState& model) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void WriteBehind(ModelState& model) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Progress WriteDown(ModelState& model, TreeNode* node, uint32_t end, MoveClass move_class)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Progress WriteNode(ModelState& model, TreeNode* node, uint32_t from, uint32_t end,
                     MoveClass move_class, bool* waiting) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool MayStart(const Hop& hop, MoveClass move_class) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Progress WriteBlock(ModelState& model, TreeNode* node, uint32_t index, MoveClass move_class)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Progress BringDown(ModelState& model, const Cursor& cursor, uint32_t position,
                     MoveClass move_class) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  uint32_t Written(TreeNode* node) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool NvmeUsable(const ModelState& model) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool WithinBudget(const ModelState& model) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool WorthWriting(const TreeBlock& block) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // cache_inspect.cc
  void ExplainCold(ModelState& model, TreeNode* node, uint32_t end,
                   std::span<const uint32_t> tokens, Explanation* out) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  const Clock& clock_;
  Mover& mover_;
  const std::unique_ptr<EvictionPolicy> policy_;

  std::atomic<bool> gpu_lost_ = false;  // once true, it stays so

  mutable absl::Mutex mu_;
  const std::unique_ptr<State> s_ ABSL_PT_GUARDED_BY(mu_);
};

}  // namespace larder
