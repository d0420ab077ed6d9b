// SimulatedDrive: a slot file and an index in memory that fail, flip bits and lose power.
//
// It outlives the stores that use it, one after the other: Io() and an index are what a store is
// given in place of the real ones. The index is either Records(), a map that costs little and
// whose records can be damaged, or RocksDB in env() (simulated_files.h); one power for both.
//
// Calls return short counts, EINTR and EAGAIN as they like. Until a sync a write is in the drive's
// cache only; when the power goes, any subset of its 512-byte sectors has reached the medium. A
// sync that fails may have dropped what it was to write, for ever, although later ones succeed. Of
// unsynced changes of the map a random number of the first ones survives, as of a log.
//
// Thread safety: thread-safe.
#pragma once

#include <sys/uio.h>

#include <array>
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
#include "tests/storage/simulated_files.h"

namespace larder::testing {

class SimulatedDrive {
 public:
  SimulatedDrive(uint64_t bytes, uint64_t seed);

  std::unique_ptr<IoBackend> Io();
  std::unique_ptr<NvmeRecords> Records();
  rocksdb::Env* env() { return files_.env(); }

  // Every operation of the kind fails with this errno, of syncs only the next; 0: works.
  std::atomic<int> read_errno{0};
  std::atomic<int> write_errno{0};
  std::atomic<int> sync_errno{0};
  std::atomic<int> index_errno{0};

  // The power goes with the n-th write, sync or change of the index or its files; everything
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
  static constexpr uint64_t kSector = 512;
  struct Sector {
    std::array<std::byte, kSector> bytes;
    bool dropped = false;  // by a sync that failed
  };
  struct Batch {
    std::vector<std::pair<Slot, std::optional<std::string>>> changes;
  };
  using Index = std::map<Slot, std::string>;

  bool Event() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  int64_t Call(bool write, uint64_t offset, std::span<const iovec> parts);
  void Read(uint64_t offset, uint64_t bytes, std::span<const iovec> parts)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Write(uint64_t offset, uint64_t bytes, std::span<const iovec> parts)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status SyncNow();
  absl::Status ApplyNow(Batch batch, bool sync);
  int FileError(bool change);
  void Settle(uint64_t at, const Sector& sector) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static void Put(Index& index, const Batch& batch);

  mutable absl::Mutex mu_;
  std::mt19937_64 random_ ABSL_GUARDED_BY(mu_);
  std::vector<std::byte> seen_ ABSL_GUARDED_BY(mu_);    // what a read finds
  std::vector<std::byte> medium_ ABSL_GUARDED_BY(mu_);  // what is left without power
  std::map<uint64_t, Sector> cached_ ABSL_GUARDED_BY(mu_);  // by offset
  Index seen_index_ ABSL_GUARDED_BY(mu_);
  Index medium_index_ ABSL_GUARDED_BY(mu_);
  std::vector<Batch> cached_batches_ ABSL_GUARDED_BY(mu_);
  bool index_refuses_ ABSL_GUARDED_BY(mu_) = false;  // after a failure, until probed
  uint64_t events_left_ ABSL_GUARDED_BY(mu_) = 0;    // 0: no cut is due
  bool off_ ABSL_GUARDED_BY(mu_) = false;
  SimulatedFiles files_;
};

}  // namespace larder::testing
