// Restore: brings the blocks of a lease up to where they can be read in place, from NVMe, and for a
// GPU from HOST as well, for as long as that pays.
//
// At any moment, what has arrived saves the time of computing it. The wait ends when
//
//   waited  >  computing what has arrived  +  patience * computing all of it
//
// so that with a patience of a tenth a drive that is slow, sick or busy costs a prompt at most a
// tenth of what it would have taken without the blocks. What did not arrive is computed.
//
// Thread safety: made, asked and taken by one thread; a thread of its own waits.
//
// Invariants:
//   1. The lease that Take gives has no block that cannot be read in place, unless its session is
//      lost.
#pragma once

#include <cstdint>
#include <functional>
#include <thread>

#include "absl/synchronization/notification.h"
#include "client/lease.h"
#include "client/worker/prefill_rate.h"

namespace larder::worker {

// The first block that cannot be read in place, or the lease's end. `lowest` is the lowest tier in
// which blocks can: GPU for who computes on a GPU, HOST for who computes on the CPU.
uint32_t FirstUnreadable(const Lease& lease, v1::Tier lowest);

class Restore {
 public:
  // To `tier`, the lowest that can be read in place. `on_done` is called from the thread, last.
  Restore(Lease lease, v1::Tier tier, uint32_t prompt_tokens, const PrefillRate& rate,
          double patience, std::function<void()> on_done);
  ~Restore();
  Restore(const Restore&) = delete;
  Restore& operator=(const Restore&) = delete;

  bool done() const { return done_.HasBeenNotified(); }
  // Once it is done.
  Lease Take();

 private:
  void Run();
  // How much longer may be waited when blocks [0, ready) are there.
  absl::Duration Budget(uint32_t ready, absl::Duration waited) const;

  Lease lease_;
  const v1::Tier tier_;
  const uint32_t first_;  // block; what is below was readable before
  const uint32_t prompt_tokens_;
  const PrefillRate rate_;
  const double patience_;
  const std::function<void()> on_done_;
  absl::Notification done_;
  std::thread thread_;
};

}  // namespace larder::worker
