// SimulatedDrive: a slot file and an index in memory that fail, flip bits and lose power.
//
// It outlives the stores that use it, one after the other: Io() and Records() are what a store
// is given in place of the real ones. Until a sync a write is in the drive's cache only; when
// the power goes, any subset of its 512-byte sectors has reached the medium. A sync that fails
// may have dropped what it was to write, for ever, although later ones succeed. Of unsynced
// changes of the index a random number of the first ones survives, as of a log.
//
// Thread safety: thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "storage/io_backend.h"
#include "storage/nvme_records.h"

namespace larder::testing {

class SimulatedDrive {
 public:
  SimulatedDrive(uint64_t bytes, uint64_t seed);

  std::unique_ptr<IoBackend> Io();
  std::unique_ptr<NvmeRecords> Records();

  // Every operation of the kind fails with this errno, of syncs only the next; 0: works.
  std::atomic<int> read_errno{0};
  std::atomic<int> write_errno{0};
  std::atomic<int> sync_errno{0};
  std::atomic<int> index_errno{0};

  // The power goes with the n-th write, sync or change of the index from now on; everything
  // fails from then on.
  void CutAfter(uint64_t events);
  bool off() const;
  // To be called between two stores: the power is back; decides what has survived.
  void PowerOn();

  void FlipPayloadBit(uint64_t offset, int bit);
  void FlipRecordBit(Slot slot, uint64_t bit);

 private:
  friend class SimulatedIo;
  friend class SimulatedRecords;
  struct Write {
    uint64_t offset;
    std::vector<std::byte> bytes;
    bool dropped = false;  // by a sync that failed
  };
  struct Batch {
    std::vector<std::pair<Slot, std::optional<std::string>>> changes;
  };
  using Index = std::map<Slot, std::string>;

  bool Event() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status WriteNow(uint64_t offset, std::span<const std::byte> from);
  absl::Status ReadNow(uint64_t offset, std::span<std::byte> to);
  absl::Status SyncNow();
  absl::Status ApplyNow(Batch batch, bool sync);
  static void Put(std::vector<std::byte>& image, const Write& write, uint64_t from, uint64_t bytes);
  static void Put(Index& index, const Batch& batch);

  mutable absl::Mutex mu_;
  std::mt19937_64 random_ ABSL_GUARDED_BY(mu_);
  std::vector<std::byte> seen_ ABSL_GUARDED_BY(mu_);    // what a read finds
  std::vector<std::byte> medium_ ABSL_GUARDED_BY(mu_);  // what is left without power
  std::vector<Write> cached_ ABSL_GUARDED_BY(mu_);
  Index seen_index_ ABSL_GUARDED_BY(mu_);
  Index medium_index_ ABSL_GUARDED_BY(mu_);
  std::vector<Batch> cached_batches_ ABSL_GUARDED_BY(mu_);
  bool index_refuses_ ABSL_GUARDED_BY(mu_) = false;  // after a failure, until probed
  uint64_t events_left_ ABSL_GUARDED_BY(mu_) = 0;    // 0: no cut is due
  bool off_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace larder::testing
