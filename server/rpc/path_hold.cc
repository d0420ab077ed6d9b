#include "server/rpc/path_hold.h"

#include <algorithm>
#include <utility>

namespace larder {

absl::StatusOr<std::shared_ptr<PathHold>> PathHold::Of(Cache& cache, Sessions& sessions,
                                                       const v1::BlockSelector& selector) {
  if (selector.lease_id() != 0) {
    return OfLease(cache, sessions, selector.session_id(), selector.lease_id());
  }
  return OfPrefix(cache, sessions, selector.model_id(),
                  {selector.tokens().data(), static_cast<size_t>(selector.tokens_size())});
}

absl::StatusOr<std::shared_ptr<PathHold>> PathHold::OfLease(Cache& cache, Sessions& sessions,
                                                            SessionId session, LeaseId lease) {
  absl::StatusOr<Sessions::Hold> hold = sessions.OpenHold();
  if (!hold.ok()) return hold.status();
  const absl::StatusOr<LeaseState> fork = cache.Fork(session, lease, hold->session());
  if (!fork.ok()) return fork.status();
  return std::shared_ptr<PathHold>(
      new PathHold(*std::move(hold), fork->lease, fork->end, false));
}

absl::StatusOr<std::shared_ptr<PathHold>> PathHold::OfPrefix(Cache& cache, Sessions& sessions,
                                                             ModelId model,
                                                             std::span<const uint32_t> tokens) {
  if (absl::Status status = sessions.CheckAdmits(); !status.ok()) return status;
  absl::StatusOr<Sessions::Hold> hold = sessions.OpenHold();
  if (!hold.ok()) return hold.status();
  const absl::StatusOr<LookupResult> found = cache.Lookup(hold->session(), model, tokens, {});
  if (!found.ok()) return found.status();
  const bool on_nvme = std::any_of(found->runs.begin(), found->runs.end(),
                                   [](const SlotRun& run) { return run.tier == Tier::kNvme; });
  return std::shared_ptr<PathHold>(
      new PathHold(*std::move(hold), found->lease, found->matched_blocks, on_nvme));
}

}  // namespace larder
