#include "server/rpc/call_stats.h"

#include <algorithm>

namespace larder {

std::string_view MethodName(Method method) {
  static constexpr std::array<std::string_view, kMethodCount> kNames = {
      "OpenModel",  "Attach",       "LookupPrefix", "Prefetch",    "Reserve",  "Put",
      "Flush",      "Truncate",     "Fork",         "Release",     "Download", "GetStatus",
      "ListModels", "ListSessions", "Explain",      "TopPrefixes", "Evict",    "Echo"};
  return kNames[static_cast<size_t>(method)];
}

void CallStats::Record(Method method, absl::StatusCode code, absl::Duration took) {
  Counters& counters = methods_[static_cast<size_t>(method)];
  const int number = std::clamp(static_cast<int>(code), 0, kCodeCount - 1);
  const auto bucket =
      std::lower_bound(kBucketSeconds.begin(), kBucketSeconds.end(), absl::ToDoubleSeconds(took)) -
      kBucketSeconds.begin();
  counters.by_code[number].fetch_add(1, std::memory_order_relaxed);
  counters.by_bucket[bucket].fetch_add(1, std::memory_order_relaxed);
  counters.nanoseconds.fetch_add(absl::ToInt64Nanoseconds(took), std::memory_order_relaxed);
}

CallStats::Snapshot CallStats::Read(Method method) const {
  const Counters& counters = methods_[static_cast<size_t>(method)];
  Snapshot snapshot;
  for (int i = 0; i < kCodeCount; ++i) {
    snapshot.by_code[i] = counters.by_code[i].load(std::memory_order_relaxed);
  }
  for (int i = 0; i < kBucketCount; ++i) {
    snapshot.by_bucket[i] = counters.by_bucket[i].load(std::memory_order_relaxed);
  }
  snapshot.seconds = 1e-9 * static_cast<double>(counters.nanoseconds.load());
  return snapshot;
}

}  // namespace larder
