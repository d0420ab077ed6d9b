// NvmeDirectory: the folder of one NVMe tier, locked, of a known format, its slot file ready.
//
//   LOCK     flock'ed by the daemon that has it; holds its pid
//   FORMAT   kNvmeFormatText, then "slab N\n" where slots were laid out in slabs of N bytes
//   slots    the payloads
//   index/   RocksDB: the records
//
// Thread safety: constant after Open.
//
// Invariants:
//   1. While it lives no other process has this directory open.
//   2. The slot file's blocks are allocated, so writing into it never needs disk space. One
//      page follows the slots, for probes.
//   3. A directory that is refused is left as it was found.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "storage/unique_fd.h"

namespace larder {

class NvmeDirectory {
 public:
  struct Options {
    std::string path;
    uint64_t slots_bytes = 0;
    uint64_t slab_bytes = 0;  // wanted where the directory has no layout yet; 0: no matter
    bool direct_io = true;
  };

  // As NvmeStore::Open.
  static absl::StatusOr<std::unique_ptr<NvmeDirectory>> Open(const Options& options);

  // What is there, for looking at it: creates and resizes nothing, and TakeSlots gives the
  // slot file for reading only. FAILED_PRECONDITION as Open, and when `path` holds no tier.
  static absl::StatusOr<std::unique_ptr<NvmeDirectory>> OpenExisting(const std::string& path);

  const std::string& path() const { return path_; }
  uint64_t slots_bytes() const { return slots_bytes_; }
  // In which slabs the slots are laid out. The directory keeps it when the tier grows or
  // shrinks, so that blocks stay where they are aligned; a tier of fewer than four slabs
  // takes the wanted size.
  uint64_t slab_bytes() const { return slab_bytes_; }
  std::string index_path() const { return path_ + "/index"; }
  std::string slots_path() const { return path_ + "/slots"; }
  bool direct() const { return direct_; }  // the slot file is open with O_DIRECT
  // The slot file, open for reading and writing. Once.
  UniqueFd TakeSlots() { return std::move(slots_); }

 private:
  explicit NvmeDirectory(std::string path) : path_(std::move(path)) {}
  enum class Content { kEmpty, kTier };
  absl::StatusOr<Content> Look();
  absl::Status Lock();
  absl::Status WriteFormat();
  absl::Status ChooseSlab(Content found, uint64_t wanted);
  absl::Status OpenFile(int flags, bool direct_io);
  absl::Status OpenSlots(bool direct_io);

  const std::string path_;
  uint64_t slots_bytes_ = 0;
  uint64_t slab_bytes_ = 0;
  UniqueFd lock_;
  UniqueFd slots_;
  bool direct_ = false;
};

}  // namespace larder
