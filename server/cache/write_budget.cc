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
  const int64_t hour = absl::ToUnixSeconds(now) / 3600;
  const int64_t passed = std::min<int64_t>(hour - hour_, kHours);
  for (int64_t i = 1; i <= passed; ++i) {
    uint64_t& oldest = hours_[static_cast<size_t>(hour_ + i) % kHours];
    day_bytes_ -= oldest;
    oldest = 0;
  }
  hour_ = std::max(hour_, hour);
}

bool WriteBudget::Allows(uint64_t bytes, absl::Time now) {
  Advance(now);
  // A block larger than the bucket may go when the bucket is full, and is paid for afterwards.
  const bool in_rate = limits_.bytes_per_second == 0 ||
                       owed_bytes_ < static_cast<double>(limits_.bytes_per_second);
  const bool in_day = limits_.bytes_per_day == 0 || day_bytes_ + bytes <= limits_.bytes_per_day;
  return in_rate && in_day;
}

void WriteBudget::Take(uint64_t bytes, absl::Time now) {
  Advance(now);
  owed_bytes_ += limits_.bytes_per_second == 0 ? 0 : static_cast<double>(bytes);
  hours_[static_cast<size_t>(hour_) % kHours] += bytes;
  day_bytes_ += bytes;
}

}  // namespace larder
