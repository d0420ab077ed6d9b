// StorageMover: the Mover of the real tiers. GPU (an arena a rank) <-> HOST by a Copier, HOST <->
// NVME through NvmeStore. NVME <-> GPU directly is not used.
//
//                waiting     background
//   GPU  -> HOST [ ][ ]      [ ][ ][ ][ ]  \  batches for the Copier: the oldest waiting jobs
//   HOST -> GPU  [ ]         [ ][ ]        /  first, then the oldest background jobs
//   HOST -> NVME             [ ][ ][ ]     -> at most so many bytes handed to NvmeStore
//   NVME -> HOST [ ]         [ ]           -> at most so many reads handed to NvmeStore
//
// Thread safety: thread-safe. DoneFn runs on a thread of the Copier's or of NvmeStore's, without
// a lock held; it may call Submit, Raise and Erase.
//
// Invariants:
//   1. DoneFn is called exactly once for each accepted job, never from inside Submit.
//   2. Of one pair no background job starts while a waiting one is queued, and no batch has both.
//   3. Each queue (pair and class) holds at most Options::queue_max jobs when one is accepted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "storage/arena.h"
#include "storage/copier.h"
#include "storage/mover.h"
#include "storage/nvme_store.h"
#include "storage/types.h"

namespace larder {

class StorageMover final : public Mover {
 public:
  struct Options {
    // By rank, all of one size; empty or null: no such tier. Borrowed, outlive the mover.
    std::vector<Arena*> gpus;
    Arena* host = nullptr;
    NvmeStore* nvme = nullptr;
    Copier* copier = nullptr;  // null: arenas in shared memory, copied in copy_threads threads
    int copy_threads = 1;
    size_t queue_max = 65536;  // jobs a tier pair and class
    // In flight in NvmeStore. Writes must reach Options::sync_bytes of the store, or each of
    // its groups waits for its delay; reads only have to keep the device busy.
    uint64_t nvme_write_bytes_max = 128 << 20;
    int nvme_reads_max = 16;
  };

  StorageMover(Options options, DoneFn done);

  // Jobs that have not started are failed with CANCELLED; waits for the others.
  ~StorageMover() override;

  // INVALID_ARGUMENT: a pair of tiers that is not used, a slot outside of its tier, or shards
  // that do not divide the bytes or are more than the GPU tier has ranks.
  // UNAVAILABLE: the device of the GPU tier is lost, or NVME takes no writes.
  // ALREADY_EXISTS: a job of that id is queued.
  absl::Status Submit(const MoveJob& job) override;
  void Raise(MoveId id) override;
  void Erase(Slot nvme_slot, uint32_t key_tag) override;

  // Waits until nothing is queued or under way and every DoneFn has returned. False: the
  // deadline passed first.
  bool Drain(absl::Time deadline);

 private:
  class Impl;
  const std::unique_ptr<Impl> impl_;
};

}  // namespace larder
