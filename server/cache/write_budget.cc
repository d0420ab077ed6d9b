#include "server/cache/write_budget.h"

#include <algorithm>

namespace larder {

void WriteBudget::Advance(absl::Time now) {
  if (now > filled_at_) {
    const double seconds = absl::ToDoubleSeconds(now - filled_at_);
    owed_bytes_ =
        std::max(0.0, owed_bytes_ - seconds * static_cast<double>(limits_.bytes_per_second));
    filled_at_ = now;
  }
  day_.Advance(now);
}

bool WriteBudget::Allows(uint64_t bytes, absl::Time now) {
  Advance(now);
  // A block larger than the bucket may go when the bucket is full, and is paid for afterwards.
  const bool in_rate = limits_.bytes_per_second == 0 ||
                       owed_bytes_ < static_cast<double>(limits_.bytes_per_second);
  const uint64_t day_bytes = day_.total_bytes();
  const bool in_day = limits_.bytes_per_day == 0 || (day_bytes <= limits_.bytes_per_day &&
                                                     bytes <= limits_.bytes_per_day - day_bytes);
  return in_rate && in_day;
}

void WriteBudget::Take(uint64_t bytes, absl::Time now) {
  Advance(now);
  owed_bytes_ += limits_.bytes_per_second == 0 ? 0 : static_cast<double>(bytes);
  day_.Add(bytes);
}

// Each hour as one hour younger than it was, because the two clocks' hours do not begin together:
// what one calls two hours ago may be less for the other.
void WriteBudget::Recover(const NvmeWritten& before, absl::Time now) {
  Advance(now);
  for (size_t ago = 0; ago < NvmeWritten::kHours; ++ago) {
    day_.Add(before.bytes(ago), ago == 0 ? 0 : ago - 1);
  }
}

}  // namespace larder
