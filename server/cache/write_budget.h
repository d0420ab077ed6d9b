// WriteBudget: how much may still be written to a drive that wears out.
//
//   rate   a bucket that fills with bytes_per_second, up to one second's worth
//   day    what was written in each of the last 24 hours and in the current one, restarts included
//
// Thread safety: none; the cache locks. Deterministic: the caller tells the time.
//
// Invariants:
//   1. In no span of t seconds more than bytes_per_second * (t + 1) bytes and one block.
//   2. In no 24 hours more than bytes_per_day.
#pragma once

#include <cstdint>

#include "absl/time/time.h"
#include "storage/nvme_written.h"

namespace larder {

class WriteBudget {
 public:
  struct Limits {
    uint64_t bytes_per_second = 0;  // 0: no such limit
    uint64_t bytes_per_day = 0;
  };

  explicit WriteBudget(const Limits& limits) : limits_(limits) {}

  // Whether Take(bytes) at this time is within both limits. `now` never goes back.
  bool Allows(uint64_t bytes, absl::Time now);
  // Counts what is about to be written, allowed or not.
  void Take(uint64_t bytes, absl::Time now);
  // Counts for the day what was written before, up to now, by another clock.
  void Recover(const NvmeWritten& before, absl::Time now);

 private:
  void Advance(absl::Time now);

  const Limits limits_;
  absl::Time filled_at_ = absl::InfinitePast();
  double owed_bytes_ = 0;  // taken from the bucket and not filled in again
  NvmeWritten day_;
};

}  // namespace larder
