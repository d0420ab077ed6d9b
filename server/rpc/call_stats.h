// CallStats: how many calls of each method ended with which code, and how long they took.
//
// Thread safety: thread-safe; Record is three relaxed increments.
//
// Invariants:
//   1. A call is recorded exactly once, when its status is known.
//   2. Streams count with their whole life; Attach, which lives as long as its worker, too.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <string_view>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace larder {

enum class Method : uint8_t {
  kOpenModel,
  kAttach,
  kLookupPrefix,
  kPrefetch,
  kReserve,
  kPut,
  kFlush,
  kTruncate,
  kFork,
  kRelease,
  kDownload,
  kGetStatus,
  kListModels,
  kListSessions,
  kExplain,
  kTopPrefixes,
  kEvict,
  kEcho,
};
inline constexpr int kMethodCount = static_cast<int>(Method::kEcho) + 1;

// As in the proto, e.g. "LookupPrefix".
std::string_view MethodName(Method method);

class CallStats {
 public:
  // Upper bounds of the latency buckets; a last one takes the rest.
  static constexpr std::array<double, 14> kBucketSeconds = {
      25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 50e-3, 250e-3, 1, 5, 30};
  static constexpr int kBucketCount = static_cast<int>(kBucketSeconds.size()) + 1;
  static constexpr int kCodeCount = 17;  // canonical codes, OK to UNAUTHENTICATED

  struct Snapshot {
    std::array<uint64_t, kCodeCount> by_code{};
    std::array<uint64_t, kBucketCount> by_bucket{};
    double seconds = 0;
  };

  void Record(Method method, absl::StatusCode code, absl::Duration took);
  Snapshot Read(Method method) const;

 private:
  struct Counters {
    std::array<std::atomic<uint64_t>, kCodeCount> by_code{};
    std::array<std::atomic<uint64_t>, kBucketCount> by_bucket{};
    std::atomic<uint64_t> nanoseconds{0};
  };
  std::array<Counters, kMethodCount> methods_;
};

// Measures one call from its construction to End.
class CallTimer {
 public:
  CallTimer(CallStats& stats, Method method)
      : stats_(stats), method_(method), start_(std::chrono::steady_clock::now()) {}

  void End(absl::StatusCode code) const {
    stats_.Record(method_, code, absl::FromChrono(std::chrono::steady_clock::now() - start_));
  }

 private:
  CallStats& stats_;
  const Method method_;
  const std::chrono::steady_clock::time_point start_;
};

}  // namespace larder
