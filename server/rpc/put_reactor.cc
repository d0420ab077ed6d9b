#include "server/rpc/put_reactor.h"

#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/rpc/convert.h"
#include "server/rpc/validate.h"

namespace larder {

PutReactor::PutReactor(const RpcContext& context, const v1::PutRequest& request,
                       v1::LeaseState& response, InlineQuota::Hold quota)
    : WaitingReactor(context.calls, Method::kPut),
      context_(context),
      request_(request),
      response_(response),
      quota_(std::move(quota)) {}

void PutReactor::Advance(uint32_t signals) {
  if ((signals & kStepStart) == 0) {
    Poll();
    return;
  }
  const bool on_lease = request_.lease_id() != 0;
  const absl::StatusOr<Model> model =
      on_lease ? context_.cache.ModelOfLease(request_.session_id(), request_.lease_id())
               : context_.cache.FindModel(request_.model_id());
  absl::Status status = model.status();
  if (status.ok()) {
    model_ = *model;
    status = ValidateInline(request_, model_);
  }
  if (!status.ok()) {
    End(status);
  } else if (on_lease) {
    StartOnLease();
  } else {
    StartOnPrefix();
  }
}

void PutReactor::StartOnLease() {
  // Written under a lease of the daemon's own: the client may let go of its own meanwhile, or
  // be gone, and another worker must not get slots that are still being written.
  const SessionId session = request_.session_id();
  const LeaseId lease = request_.lease_id();
  absl::StatusOr<std::shared_ptr<PathHold>> hold =
      PathHold::OfLease(context_.cache, context_.sessions, session, lease);
  if (!hold.ok()) {
    End(hold.status());
    return;
  }
  hold_ = *std::move(hold);
  absl::StatusOr<LeaseState> state = Publish(request_.position());
  if (state.ok()) {
    state = context_.cache.Follow(session, lease, request_.position(), hold_->session(),
                                  hold_->lease());
  }
  EndWith(state);
}

void PutReactor::StartOnPrefix() {
  std::vector<uint32_t> path(request_.prefix().begin(), request_.prefix().end());
  path.insert(path.end(), request_.tokens().begin(), request_.tokens().end());
  absl::StatusOr<std::shared_ptr<PathHold>> hold =
      PathHold::OfPrefix(context_.cache, context_.sessions, request_.model_id(), path);
  if (!hold.ok()) {
    End(hold.status());
    return;
  }
  hold_ = *std::move(hold);
  const uint32_t wanted = static_cast<uint32_t>(path.size() / model_.spec.block_tokens);
  if (hold_->blocks() == wanted || !hold_->on_nvme()) {
    PublishFrom(hold_->blocks());
    return;
  }
  // New blocks in memory need their ancestors there.
  const absl::StatusOr<PrefetchId> id = context_.cache.Prefetch(
      hold_->session(), hold_->lease(), Tier::kHost, [weak = weak_from_this()] {
        if (const auto self = weak.lock()) self->Signal(kStepNews);
      });
  if (!id.ok()) {
    End(id.status());
    return;
  }
  prefetch_ = *id;
  Poll();
}

void PutReactor::Poll() {
  if (!prefetch_) return;
  const absl::StatusOr<PrefetchUpdate> update = context_.cache.PollPrefetch(*prefetch_);
  if (update.ok() && !update->done) return;
  prefetch_.reset();
  if (!update.ok()) {
    End(update.status());
    return;
  }
  const uint32_t end = update->ready_blocks;
  if (end < hold_->blocks()) {
    const auto cut = context_.cache.Truncate(hold_->session(), hold_->lease(), end);
    if (!cut.ok()) {
      End(cut.status());
      return;
    }
  }
  PublishFrom(end);
}

void PutReactor::PublishFrom(uint32_t end) {
  const uint32_t first = request_.position();
  const uint32_t tokens = static_cast<uint32_t>(request_.tokens_size());
  const uint32_t past = first + tokens / model_.spec.block_tokens;
  if (end < first) {
    End(absl::FailedPreconditionError(absl::StrCat("prefix: ", first, " blocks given, ", end,
                                                   " of them are cached; put the others first")));
    return;
  }
  absl::StatusOr<LeaseState> state = end == past
                                         ? context_.cache.GetLease(hold_->session(), hold_->lease())
                                         : Publish(end);
  if (state.ok()) state->lease = 0;
  EndWith(state);
}

absl::StatusOr<LeaseState> PutReactor::Publish(uint32_t position) {
  Cache& cache = context_.cache;
  const size_t before = size_t{position - request_.position()} * model_.spec.block_tokens;
  const auto tokens = ToSpan(request_.tokens()).subspan(before);
  const absl::StatusOr<std::vector<SlotRun>> runs =
      cache.Reserve(hold_->session(), hold_->lease(), position,
                    static_cast<uint32_t>(tokens.size() / model_.spec.block_tokens), Tier::kHost);
  if (!runs.ok()) return runs.status();
  if (absl::Status copied = CopyIn(*runs, position); !copied.ok()) return copied;
  return cache.Put(hold_->session(), hold_->lease(), position, tokens);
}

absl::Status PutReactor::CopyIn(const std::vector<SlotRun>& runs, uint32_t position) {
  const uint64_t block_bytes = model_.WholeBlockBytes();
  const char* from = request_.data().data() + (position - request_.position()) * block_bytes;
  for (const SlotRun& run : runs) {
    for (const Slot slot : run.slots) {
      for (uint64_t copied = 0; copied < block_bytes;) {
        const std::span<std::byte> to = context_.BytesOf(model_, {run.tier, slot}, copied);
        if (to.empty()) {
          return absl::FailedPreconditionError(
              absl::StrCat("data: the reserved blocks are in ", ToAbsl(TierName(run.tier)),
                           ", which the daemon cannot write; publish them in place"));
        }
        std::memcpy(to.data(), from, to.size());
        copied += to.size();
        from += to.size();
      }
    }
  }
  return absl::OkStatus();
}

void PutReactor::EndWith(const absl::StatusOr<LeaseState>& state) {
  if (state.ok()) ToProto(*state, response_);
  hold_.reset();
  End(state.status());
}

void PutReactor::Cancelled() {
  if (prefetch_) context_.cache.CancelPrefetch(*prefetch_);
  prefetch_.reset();
  hold_.reset();
}

}  // namespace larder
