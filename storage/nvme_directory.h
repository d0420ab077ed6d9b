// NvmeDirectory: the folder of one NVMe tier, locked, of a known format, its slot file ready.
//
//   LOCK     flock'ed by the daemon that has it; holds its pid
//   FORMAT   kNvmeFormatText
//   slots    the payloads
//   index/   RocksDB: the records
//
// Thread safety: constant after Open.
//
// Invariants:
//   1. While it lives no other process has this directory open.
//   2. The slot file's blocks are allocated, so writing into it never needs disk space. One
//      page follows the slots, for probes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "storage/unique_fd.h"

namespace larder {

class NvmeDirectory {
 public:
  // As NvmeStore::Open.
  static absl::StatusOr<std::unique_ptr<NvmeDirectory>> Open(const std::string& path,
                                                             uint64_t slots_bytes, bool direct_io);

  const std::string& path() const { return path_; }
  std::string index_path() const { return path_ + "/index"; }
  std::string slots_path() const { return path_ + "/slots"; }
  bool direct() const { return direct_; }  // the slot file is open with O_DIRECT
  // The slot file, open for reading and writing. Once.
  UniqueFd TakeSlots() { return std::move(slots_); }

 private:
  explicit NvmeDirectory(std::string path) : path_(std::move(path)) {}
  absl::Status Lock();
  absl::Status CheckFormat();
  absl::Status OpenSlots(uint64_t bytes, bool direct_io);

  const std::string path_;
  UniqueFd lock_;
  UniqueFd slots_;
  bool direct_ = false;
};

}  // namespace larder
