// NvmeCommitter: makes written payloads durable in groups, one thread for everything that
// changes a record, so that changes of one slot keep their order.
//
//   queue:  [put][put][erase][put] ... until sync_bytes or sync_delay
//           1. fdatasync of the slot file, once, when a put is among them
//           2. one WriteBatch in queue order, synced when a put is among them
//           3. done of each, in order
//
//   healthy --a write, sync or batch failed--> degraded --probe written and synced--> healthy
//   healthy --no write done for stall_limit--> degraded --a write is done--> healthy
//
// Thread safety: thread-safe. done and on_writable run on the committer's thread.
//
// Invariants:
//   1. A put's done(OK) comes after both syncs that cover it. No sync has failed since its
//      payload's write began: one that fails may have dropped what the next calls durable.
//   2. on_writable is told every change, in order.
//   3. Everything queued is completed before the destructor returns.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "storage/io_backend.h"
#include "storage/nvme_format.h"
#include "storage/nvme_records.h"
#include "storage/nvme_store.h"
#include "storage/types.h"

namespace larder {

class NvmeCommitter {
 public:
  using DoneFn = NvmeStore::DoneFn;

  struct Options {
    uint64_t sync_bytes = 0;
    absl::Duration sync_delay;
    absl::Duration probe_interval;
    absl::Duration stall_limit;
    uint64_t probe_offset = 0;  // of a page of the slot file that is no slot's
    std::function<void(bool)> on_writable;
  };

  // Borrows both; they outlive it.
  NvmeCommitter(Options options, IoBackend& io, NvmeRecords& records);
  // Nobody calls the others any more.
  ~NvmeCommitter();

  // How many syncs had failed at some time.
  using SyncEpoch = uint64_t;

  // Each payload write is told of when it starts, and ends with Put or FailDevice.
  SyncEpoch WriteStarts();
  // The payload of this record has been written; `epoch` is what WriteStarts said.
  void Put(Slot slot, const NvmeRecord& record, SyncEpoch epoch, DoneFn done);
  // Deletes the record if its key has this tag.
  void Erase(Slot slot, uint32_t key_tag);
  // Deletes the record, whatever it is, then done(status).
  void Forget(Slot slot, absl::Status status, DoneFn done);
  // done(status) in its turn.
  void Fail(absl::Status status, DoneFn done);
  // The same for a payload write that the device failed: degrades.
  void FailDevice(absl::Status status, DoneFn done);

  // From now on no group waits for company. Before the end.
  void Hurry();

  NvmeStore::Health health() const;
  uint64_t syncs() const;
  uint64_t errors() const;

 private:
  enum class Kind { kPut, kErase, kForget, kFail, kProbe };
  struct Pending {
    Kind kind = Kind::kFail;
    Slot slot;
    NvmeRecord record;
    uint64_t tag = 0;     // kErase: of the key. kPut: its SyncEpoch
    absl::Status status;  // what done gets, unless the group fails a put
    DoneFn done;
  };
  using Group = std::vector<Pending>;

  void Queue(Pending pending);
  void QueueLocked(Pending pending) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Degrade(const absl::Status& why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void WritesEndLocked(uint64_t count) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  NvmeStore::Health HealthLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Run();
  bool NextGroup(Group& group);
  void Commit(Group& group);
  absl::Status Sync();
  bool MayPut(const Pending& pending) const;
  std::vector<NvmeRecords::Change> ChangesOf(const Group& group, bool with_puts);
  void StartProbe();
  void FinishProbe(absl::Status status);
  void AnnounceHealth();

  const Options options_;
  const std::vector<std::byte> probe_page_;
  IoBackend& io_;
  NvmeRecords& records_;

  // Times are the monotonic clock's, as absl::Time.
  mutable absl::Mutex mu_;
  absl::CondVar changed_;
  Group queue_ ABSL_GUARDED_BY(mu_);
  uint64_t queue_bytes_ ABSL_GUARDED_BY(mu_) = 0;  // of puts
  absl::Time queue_since_ ABSL_GUARDED_BY(mu_);    // of the oldest entry
  NvmeStore::Health health_ ABSL_GUARDED_BY(mu_);  // but for stalls
  uint64_t writes_out_ ABSL_GUARDED_BY(mu_) = 0;   // started, not yet failed or committed
  absl::Time progress_at_ ABSL_GUARDED_BY(mu_);    // some write started with none out, or went on
  bool probing_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time probe_at_ ABSL_GUARDED_BY(mu_);
  bool hurry_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  uint64_t syncs_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t errors_ ABSL_GUARDED_BY(mu_) = 0;

  std::atomic<SyncEpoch> syncs_failed_{0};  // changed by the thread only

  bool announced_degraded_ = false;  // the thread's own
  std::thread thread_;               // last: it uses all of the above
};

}  // namespace larder
