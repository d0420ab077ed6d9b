#include "client/worker/restore.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/status/statusor.h"

namespace larder::worker {
namespace {

using SteadyClock = std::chrono::steady_clock;

// What the wire can say.
constexpr absl::Duration kTimeoutMin = absl::Milliseconds(1);
constexpr absl::Duration kTimeoutMax = absl::Hours(1);

}  // namespace

uint32_t FirstUnreadable(const Lease& lease, v1::Tier lowest) {
  const std::span<const BlockPlace> places = lease.places().first(lease.end());
  const auto found = std::find_if(places.begin(), places.end(), [lowest](const BlockPlace& place) {
    return place.tier != v1::TIER_GPU && place.tier != lowest;
  });
  return static_cast<uint32_t>(found - places.begin());
}

Restore::Restore(Lease lease, v1::Tier tier, uint32_t prompt_tokens, const PrefillRate& rate,
                 double patience, std::function<void()> on_done)
    : lease_(std::move(lease)),
      tier_(tier),
      first_(FirstUnreadable(lease_, tier)),
      prompt_tokens_(prompt_tokens),
      rate_(rate),
      patience_(patience),
      on_done_(std::move(on_done)),
      thread_([this] {
        Run();
        done_.Notify();
        on_done_();
      }) {}

Restore::~Restore() { thread_.join(); }

Lease Restore::Take() {
  done_.WaitForNotification();
  return std::move(lease_);
}

absl::Duration Restore::Budget(uint32_t ready, absl::Duration waited) const {
  const uint32_t block_tokens = lease_.block_tokens();
  const uint32_t begin = first_ * block_tokens;
  return rate_.Estimate(begin, ready * block_tokens) +
         rate_.Estimate(begin, prompt_tokens_) * patience_ - waited;
}

void Restore::Run() {
  const SteadyClock::time_point start = SteadyClock::now();
  uint32_t ready = first_;
  while (ready < lease_.end()) {
    const absl::Duration budget = Budget(ready, absl::FromChrono(SteadyClock::now() - start));
    if (budget < kTimeoutMin) break;
    PrefetchOptions options;
    options.tier = tier_;
    options.policy = v1::PREFETCH_POLICY_TIMEOUT;
    options.policy_timeout = std::min(budget, kTimeoutMax);
    const absl::StatusOr<PrefetchResult> result = lease_.Prefetch(options);
    ready = FirstUnreadable(lease_, tier_);
    // Gone, unreadable, or no room for more: waiting again brings nothing.
    if (!result.ok() || result->unreadable_position.has_value()) break;
    if (ready >= result->promised_blocks) break;
  }
  if (ready < lease_.end()) (void)lease_.Truncate(ready);
}

}  // namespace larder::worker
