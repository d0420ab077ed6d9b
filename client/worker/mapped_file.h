// MappedFile: a whole file as read-only memory.
//
// Thread safety: immutable.
//
// Invariants:
//   1. The bytes stay where they are until the object is destroyed, also when it is moved.
//      The file must not be cut shorter meanwhile: reading what is gone is a SIGBUS.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "absl/status/statusor.h"

namespace larder::worker {

class MappedFile {
 public:
  // NOT_FOUND when there is none, INVALID_ARGUMENT when it is no regular file or empty.
  static absl::StatusOr<MappedFile> Open(const std::string& path);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  explicit MappedFile(std::span<const std::byte> bytes) : bytes_(bytes) {}

  std::span<const std::byte> bytes_;  // empty: moved away
};

}  // namespace larder::worker
