// NvmeAudit: looks through the directory of an NVMe tier that no daemon has open, and takes
// records out of it.
//
// There is nothing that could leak: a slot is in use exactly when it has a record. What can be
// wrong is a record, its place, its ancestors, or the payload.
//
// Thread safety: none; Check starts its own threads and ends them.
//
// Invariants:
//   1. Only Erase changes a byte (and the lock file, which says who holds it).
//   2. Memory: 40 bytes a record, 32 more while Check looks for orphans, and a buffer of the
//      largest payload a thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "storage/nvme_directory.h"
#include "storage/nvme_format.h"
#include "storage/types.h"
#include "storage/unique_fd.h"

namespace larder {

class NvmeAudit {
 public:
  enum class Problem {
    kDamagedRecord,  // of another version, or fails its own hash
    kOutside,        // reaches past the slot file
    kOverlap,        // shares bytes with the record before it: one of them is overwritten
    kDuplicate,      // another record has this key
    kOrphan,         // an ancestor is missing, so it is never found
    kUnreadable,     // the drive fails
    kChecksum,       // the payload is not what was written
  };
  static constexpr int kProblemCount = 7;
  // "damaged record", "orphan".
  static const char* Name(Problem problem);

  struct Finding {
    Problem problem = Problem::kDamagedRecord;
    Slot slot;
    uint64_t model_id = 0;  // 0 where the record does not say
    std::string detail;
  };

  using ProgressFn = std::function<void(uint64_t bytes_done, uint64_t bytes_total)>;

  // FAILED_PRECONDITION: a daemon has the directory, it is of another version or holds no
  // tier. UNAVAILABLE: the file system fails.
  static absl::StatusOr<std::unique_ptr<NvmeAudit>> Open(const std::string& directory);

  uint64_t slots_bytes() const { return directory_->slots_bytes(); }

  // Every good record in slot order. DATA_LOSS: the index is damaged; a daemon's start, and
  // Erase, repair it as far as that goes.
  absl::Status ForEach(const std::function<void(Slot, const NvmeRecord&)>& visit) const;

  // Everything that is wrong, in slot order; reads every payload with `threads` threads.
  // `progress` is called from one thread at a time. Errors as ForEach.
  absl::StatusOr<std::vector<Finding>> Check(int threads, const ProgressFn& progress) const;

  // Deletes the records of these slots, durably.
  absl::Status Erase(std::span<const Slot> slots);

 private:
  struct Entry;
  explicit NvmeAudit(std::unique_ptr<NvmeDirectory> directory)
      : directory_(std::move(directory)), slots_(directory_->TakeSlots()) {}
  absl::StatusOr<std::vector<Entry>> Read(std::vector<Finding>& findings) const;
  void CheckPlaces(const std::vector<Entry>& entries, std::vector<Finding>& findings) const;
  static void CheckAncestors(std::vector<Entry> entries, std::vector<Finding>& findings);
  std::optional<Finding> CheckPayload(const Entry& entry, std::span<std::byte> buffer) const;
  void CheckPayloads(const std::vector<Entry>& entries, int threads, const ProgressFn& progress,
                     std::vector<Finding>& findings) const;

  const std::unique_ptr<NvmeDirectory> directory_;  // holds the lock
  const UniqueFd slots_;
};

}  // namespace larder
