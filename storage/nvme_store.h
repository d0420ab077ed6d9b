// NvmeStore: blocks in a preallocated slot file, their records in RocksDB (storage/README.md
// has both formats byte by byte).
//
//   Write:  payload -> slot file .. group .. fdatasync .. one synced WriteBatch .. done(OK)
//   Read:   payload <- slot file .. record: same key, length, model? XXH3 right? .. done(OK)
//
// Thread safety: thread-safe. The caller owns a slot from the call until done: two
// operations on one slot never run at once, except that Erase may follow anything.
//
// Invariants:
//   1. done(OK) of a Write comes only after its payload and then its record are durable.
//   2. Read delivers the bytes of the block that was asked for, or an error. A record that
//      does not fit is deleted.
//   3. A record has one slot and a slot one record; Erase removes only a record whose key has
//      the tag.
//   4. done is called exactly once, never from inside Read or Write, and without a lock held.
//   5. A device that fails writes, or does none for stall_limit, stops them (UNAVAILABLE at
//      once) until it has written again; reads go on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "storage/io_backend.h"
#include "storage/mover.h"
#include "storage/nvme_written.h"
#include "storage/types.h"

namespace larder {

class NvmeRecords;

class NvmeStore {
 public:
  struct Options {
    std::string directory;               // created when missing (its parent must exist)
    uint64_t bytes = 0;                  // of the slot file; a positive multiple of 4096
    uint64_t slab_bytes = 0;             // of a new directory's layout; what is there keeps its own
    std::span<std::byte> memory;         // where most blocks lie (IoOptions::memory)
    IoWay io = IoWay::kUringRegistered;  // or the best below that the kernel allows
    int io_threads = 4;                  // of IoWay::kThreads
    uint64_t sync_bytes = 48 << 20;      // a group is closed by its bytes
    absl::Duration sync_delay = absl::Milliseconds(3);  // or by the age of its first block
    bool direct_io = true;                              // where the file system can
    absl::Duration probe_interval = absl::Seconds(1);   // while degraded
    absl::Duration stall_limit = absl::Seconds(10);     // writes under way and none done: degraded
    std::function<void(bool writable)> on_writable;     // each change; must not block
    // Wraps the real I/O, so that tests can make it fail.
    std::function<std::unique_ptr<IoBackend>(std::unique_ptr<IoBackend>)> wrap_io;
    // Where records are kept; null: in RocksDB, in the directory. Tests keep them where the power
    // can be cut.
    std::function<absl::StatusOr<std::unique_ptr<NvmeRecords>>()> open_records;
  };

  struct Health {
    bool degraded = false;
    std::string why;
  };

  struct Stats {
    uint64_t reads = 0;  // done, whatever came of it
    uint64_t writes = 0;
    uint64_t read_bytes = 0;  // of those that were right
    uint64_t written_bytes = 0;
    uint64_t corrupt = 0;  // reads that ended in DATA_LOSS
    uint64_t errors = 0;   // of the device or the index
    uint64_t syncs = 0;    // groups
  };

  using DoneFn = std::function<void(absl::Status)>;
  using KeepFn = std::function<bool(Slot, uint32_t bytes, const BlockRecord&)>;

  // FAILED_PRECONDITION: another daemon has the directory, its format is of another version,
  // or it holds something else. RESOURCE_EXHAUSTED: the disk has not `bytes` left.
  // INVALID_ARGUMENT: an option. UNAVAILABLE: the file system fails.
  static absl::StatusOr<std::unique_ptr<NvmeStore>> Open(Options options);

  // Completes everything that was accepted, then closes.
  ~NvmeStore();
  NvmeStore(const NvmeStore&) = delete;
  NvmeStore& operator=(const NvmeStore&) = delete;

  uint64_t bytes() const;
  // The layout to place slots by. Blocks laid out otherwise would be lost.
  uint64_t slab_bytes() const;
  const std::string& io() const;  // "io_uring, registered buffers"; or what was in the way

  // At start, before any Read or Write: every readable record whose slot lies within the
  // file, in slot order. Those that `keep` rejects, and all others, are deleted.
  absl::Status Scan(const KeepFn& keep);

  // Bytes of blocks made durable, by the hour, also before this start; up to now by the
  // machine's clock. What was under way when a process or the machine died is not counted.
  NvmeWritten written() const;

  // `block` must stay unchanged until done. INVALID_ARGUMENT: slot or length outside of the
  // file. UNAVAILABLE: the device failed or the tier is degraded.
  void Write(Slot slot, std::span<const std::byte> block, const BlockRecord& record, DoneFn done);

  // DATA_LOSS: the slot does not hold the block `expected`; its record is deleted.
  // UNAVAILABLE: the device failed; the record stays.
  void Read(Slot slot, std::span<std::byte> block, const BlockRecord& expected, DoneFn done);

  // Asynchronous; ordered before every Write to that slot that is called later.
  void Erase(Slot slot, uint32_t key_tag);

  Health health() const;
  Stats stats() const;

 private:
  class Impl;
  explicit NvmeStore(std::unique_ptr<Impl> impl);
  const std::unique_ptr<Impl> impl_;
};

}  // namespace larder
