// Steps: runs one function serially, on whatever thread brings news.
//
//   gRPC thread    --Signal(kStepWritten)---|
//   mover's thread --Signal(kStepNews)------|-->  Step(kStepWritten | kStepNews)
//   gRPC thread    --Signal(kStepCancelled)-|     one at a time
//
// A call that waits for moves hears from several threads at once. Here they only leave a bit;
// whoever finds nobody stepping runs Step until no bit is left. So Step needs no lock, is never
// entered twice, and news that comes while it runs (also from inside it) makes it run again:
// news is coalesced and never lost.
//
// Thread safety: Signal is thread-safe; Step runs on one thread at a time, each run after the
// one before, so members touched only by Step need no guard. What a signaller writes before
// Signal is seen by the Step that gets its bit.
//
// Invariants:
//   1. Step is called without a lock held.
//   2. The object lives until Signal has returned.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace larder {

class Steps : public std::enable_shared_from_this<Steps> {
 public:
  virtual ~Steps() = default;
  Steps(const Steps&) = delete;
  Steps& operator=(const Steps&) = delete;

  // `bits` is not 0. The object must be owned by a shared_ptr.
  void Signal(uint32_t bits) ABSL_LOCKS_EXCLUDED(mu_);

 protected:
  Steps() = default;

 private:
  // `signals`: all bits left since the last step; never 0.
  virtual void Step(uint32_t signals) = 0;

  absl::Mutex mu_;
  bool stepping_ ABSL_GUARDED_BY(mu_) = false;
  uint32_t signals_ ABSL_GUARDED_BY(mu_) = 0;
};

// What a Step may hear. Shared by all calls that wait.
enum StepSignal : uint32_t {
  kStepStart = 1,
  kStepNews = 2,       // the cache has something to say
  kStepWritten = 4,    // the message is on its way, the next may be written
  kStepCancelled = 8,  // the client is gone, or the call's deadline has passed
  kStepTimeout = 16,
  kStepDraining = 32,  // tell the worker that the daemon is about to stop
  kStepClose = 64,     // end the stream
};

}  // namespace larder
