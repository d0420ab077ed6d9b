// NvmeRecords: the records of all slots, in RocksDB, and how much was written when. The only
// file that knows RocksDB is this one's .cc.
//
// Thread safety: Get, Apply and Probe are thread-safe; Scan runs before any of them.
//
// Memory: a memtable of 2 MiB (twice at most) and a block cache of 8 MiB, indexes included.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "storage/nvme_format.h"
#include "storage/nvme_written.h"
#include "storage/types.h"

namespace rocksdb {
class Env;
}

namespace larder {

class NvmeRecords {
 public:
  struct Change {
    Slot slot;
    std::optional<NvmeRecord> record;  // nullopt: delete
  };
  using KeepFn = std::function<bool(Slot, const NvmeRecord&)>;
  // nullopt: the record is damaged. An empty slot: the key is none of ours.
  using VisitFn = std::function<void(Slot, const std::optional<NvmeRecord>&)>;

  // A damaged index is repaired as far as RocksDB can, and begun anew where it cannot: what
  // it loses are misses. UNAVAILABLE: the file system fails. `env`: where `path` is; null: this
  // machine. Tests give one that loses power; it outlives the records.
  static absl::StatusOr<std::unique_ptr<NvmeRecords>> Open(const std::string& path,
                                                           rocksdb::Env* env = nullptr);
  // Changes no byte of the index: for looking only; Apply, Scan and Probe fail. DATA_LOSS: it
  // is damaged, which Open would repair.
  static absl::StatusOr<std::unique_ptr<NvmeRecords>> OpenReadOnly(const std::string& path);
  virtual ~NvmeRecords() = default;

  // NOT_FOUND: none. DATA_LOSS: one that is damaged or of an unknown version.
  virtual absl::StatusOr<NvmeRecord> Get(Slot slot) const = 0;

  // All or nothing, in order, each with the time of now as written_at_s. `sync`: durable when
  // it returns OK. Payloads of new records count as written.
  virtual absl::Status Apply(std::span<const Change> changes, bool sync) = 0;

  // By this machine's clock, as of the last Apply, which may have been before a restart.
  virtual NvmeWritten Written() const = 0;

  // Every good record in slot order; deletes those that `keep` rejects and those that are
  // not good.
  virtual absl::Status Scan(const KeepFn& keep) = 0;

  // Every record in slot order, deleting nothing.
  virtual absl::Status Visit(const VisitFn& visit) const = 0;

  // OK when records can be written durably (again).
  virtual absl::Status Probe() = 0;
};

}  // namespace larder
