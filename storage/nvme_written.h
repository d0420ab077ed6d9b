// NvmeWritten: how many bytes were written in each of the last 24 hours and in the current one.
//
//   bytes   | now | 1 h ago | 2 h ago | ... | 24 h ago |     together always a day or more
//
// Stored, it is what an endurance limit remembers of the time before a restart: 216 bytes,
// integers little-endian: the current hour since 1970 (u64), 25 counts (u64), XXH3-64 of those.
//
// Thread safety: none; its owner locks. Deterministic: the caller tells the time.
//
// Invariants:
//   1. A clock that was set back has let no time pass: nothing is forgotten, and later hours
//      count from there. One that was set forward has let that time pass.
//   2. No sum overflows; it stays at the largest number.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace larder {

class NvmeWritten {
 public:
  static constexpr size_t kHours = 25;
  static constexpr size_t kEncodedBytes = (1 + kHours + 1) * sizeof(uint64_t);

  // Forgets what lies too far back from `now`.
  void Advance(absl::Time now);
  // `hours_ago`, below kHours: counted from the hour of the last Advance.
  void Add(uint64_t bytes, size_t hours_ago = 0);

  uint64_t bytes(size_t hours_ago) const { return bytes_[hours_ago]; }
  uint64_t total_bytes() const;

  std::array<char, kEncodedBytes> Encode() const;
  // nullopt: damaged.
  static std::optional<NvmeWritten> Decode(absl::string_view text);

 private:
  int64_t hour_ = 0;  // since 1970; of bytes_[0]
  std::array<uint64_t, kHours> bytes_{};
};

}  // namespace larder
