#include "client/lease.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/session_state.h"
#include "client/streams.h"

namespace larder {
inline namespace client {
namespace {

using Stub = v1::KvCache::Stub;

absl::Status NotHeld() { return absl::FailedPreconditionError("this Lease holds nothing"); }

// Session and lease, which every request names in fields of the same names.
template <typename Request>
Request RequestOf(const SessionState& state, uint64_t lease_id) {
  Request request;
  request.set_session_id(state.id());
  request.set_lease_id(lease_id);
  return request;
}

}  // namespace

Lease::Lease(std::shared_ptr<SessionState> state, const v1::Model& model)
    : state_(std::move(state)),
      devices_(state_->devices()),
      model_id_(model.model_id()),
      block_bytes_(model.block_bytes()),
      shards_(Shards(model)),
      block_tokens_(model.block_tokens()) {}

Lease::Lease(std::shared_ptr<SessionState> state, const Lease& forked_from, uint64_t id)
    : state_(std::move(state)),
      devices_(forked_from.devices_),
      model_id_(forked_from.model_id_),
      block_bytes_(forked_from.block_bytes_),
      shards_(forked_from.shards_),
      block_tokens_(forked_from.block_tokens_),
      id_(id),
      end_(forked_from.end_),
      places_(forked_from.places_.begin(), forked_from.places_.begin() + forked_from.end_) {}

Lease::Lease(Lease&&) noexcept = default;

Lease& Lease::operator=(Lease&& other) noexcept {
  if (this == &other) return *this;
  Drop();
  state_ = std::move(other.state_);
  devices_ = std::move(other.devices_);
  model_id_ = other.model_id_;
  block_bytes_ = other.block_bytes_;
  shards_ = other.shards_;
  block_tokens_ = other.block_tokens_;
  id_ = other.id_;
  end_ = other.end_;
  places_ = std::move(other.places_);
  restore_ = std::move(other.restore_);
  return *this;
}

Lease::~Lease() { Drop(); }

void Lease::Drop() {
  devices_.reset();
  const std::shared_ptr<SessionState> state = std::exchange(state_, nullptr);
  if (state == nullptr || id_ == 0) return;  // 0: the lookup failed, nothing was granted
  state->ReleaseSoon(RequestOf<v1::ReleaseRequest>(*state, id_));
}

absl::Status Lease::CheckHeld() const {
  if (state_ == nullptr) return NotHeld();
  return state_->Health();
}

absl::StatusOr<std::span<const std::byte>> Lease::Block(uint32_t position, uint32_t rank) const {
  if (position >= end_) {
    return absl::OutOfRangeError(
        absl::StrCat("position ", position, " is not readable: the lease ends at ", end_));
  }
  absl::StatusOr<std::span<std::byte>> block = At(position, rank);
  if (!block.ok()) return block.status();
  return std::span<const std::byte>(*block);
}

absl::StatusOr<std::span<std::byte>> Lease::Reserved(uint32_t position, uint32_t rank) const {
  if (position < end_ || position >= places_.size()) {
    return absl::OutOfRangeError(absl::StrCat("position ", position,
                                              " is not reserved: reserved are ", end_, " to ",
                                              places_.size(), ", exclusive"));
  }
  return At(position, rank);
}

absl::StatusOr<uint64_t> Lease::DeviceAddress(uint32_t position, uint32_t rank) const {
  if (position >= places_.size()) {
    return absl::OutOfRangeError(absl::StrCat("position ", position,
                                              " is not in the lease, which has ", places_.size(),
                                              " blocks, the reserved ones included"));
  }
  if (absl::Status checked = CheckRank(rank); !checked.ok()) return checked;
  absl::Status device_status;
  const absl::StatusOr<std::span<std::byte>> part =
      PartAt(places_[position], rank, block_bytes_, position, [&](uint32_t arena) {
        const absl::StatusOr<DeviceArena> device = state_->DeviceArenaOf(arena);
        device_status = device.status();
        if (!device.ok()) return std::span<std::byte>();
        return std::span(reinterpret_cast<std::byte*>(device->address), device->bytes);
      });
  if (!device_status.ok()) return device_status;
  if (!part.ok()) return part.status();
  return reinterpret_cast<uint64_t>(part->data());
}

absl::Status Lease::CheckRank(uint32_t rank) const {
  if (absl::Status held = CheckHeld(); !held.ok()) return held;
  if (rank < shards_) return absl::OkStatus();
  return absl::OutOfRangeError(
      absl::StrCat("rank ", rank, " has no part: the model has ", shards_, " shards"));
}

absl::StatusOr<std::span<std::byte>> Lease::At(uint32_t position, uint32_t rank) const {
  if (absl::Status checked = CheckRank(rank); !checked.ok()) return checked;
  return PartAt(places_[position], rank, block_bytes_, position,
                [this](uint32_t arena) { return state_->ArenaBytes(arena); });
}

absl::StatusOr<std::vector<v1::Run>> Lease::Runs(uint32_t begin, uint32_t end) const {
  if (begin <= end && end <= places_.size()) {
    return RunsOf(places().subspan(begin, end - begin), begin);
  }
  return absl::OutOfRangeError(absl::StrCat("positions ", begin, " to ", end,
                                            ", exclusive, are not in the lease, which has ",
                                            places_.size()));
}

// Notes where a run's blocks are. Positions past `places_` are the daemon's mistake.
absl::Status Lease::TakeRun(const v1::Run& run) {
  const uint64_t run_end = uint64_t{run.position()} + run.blocks();
  const bool on_nvme = run.tier() == v1::TIER_NVME;
  if (run_end > places_.size() ||
      (!on_nvme && run.offsets_size() != static_cast<int>(run.blocks()))) {
    return absl::InternalError(absl::StrCat(
        "the daemon answered a run of ", run.blocks(), " blocks and ", run.offsets_size(),
        " offsets at position ", run.position(), "; expected at most ", places_.size(), " blocks"));
  }
  for (uint32_t i = 0; i < run.blocks(); ++i) {
    places_[run.position() + i] = {run.tier(), run.arena(),
                                   on_nvme ? 0 : run.offsets(static_cast<int>(i))};
  }
  return absl::OkStatus();
}

absl::Status Lease::LookupFurther(std::span<const uint32_t> tokens, const LookupOptions& options) {
  auto request = RequestOf<v1::LookupPrefixRequest>(*state_, id_);
  request.set_model_id(model_id_);
  request.set_prefill_tokens_per_second(options.prefill_tokens_per_second);
  SetTokens(*request.mutable_tokens(), tokens);
  absl::StatusOr<v1::LookupPrefixResponse> response =
      state_->Call(&Stub::LookupPrefix, request, "LookupPrefix", state_->rpc().call_timeout());
  if (!response.ok()) return response.status();
  const uint32_t matched = response->matched_tokens() / std::max(block_tokens_, 1u);
  const uint64_t asked = end_ + tokens.size() / std::max(block_tokens_, 1u);
  if (matched < end_ || matched > asked) {
    return absl::InternalError(absl::StrCat("the daemon answered a match of ", matched,
                                            " blocks; expected ", end_, " to ", asked));
  }
  id_ = response->lease_id();
  end_ = matched;
  places_.resize(end_);
  restore_ = response->restore();
  for (const v1::Run& run : response->runs()) {
    if (absl::Status taken = TakeRun(run); !taken.ok()) return taken;
  }
  return absl::OkStatus();
}

absl::StatusOr<uint32_t> Lease::Extend(std::span<const uint32_t> tokens,
                                       const LookupOptions& options) {
  if (absl::Status held = CheckHeld(); !held.ok()) return held;
  if (reserved() != 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        reserved(), " blocks are reserved past the end: Put or Truncate before Extend"));
  }
  const uint32_t before = end_;
  if (absl::Status looked = LookupFurther(tokens, options); !looked.ok()) return looked;
  return end_ - before;
}

absl::StatusOr<PrefetchResult> Lease::Prefetch(const PrefetchOptions& options,
                                               const PrefetchCallback& on_event) {
  if (absl::Status held = CheckHeld(); !held.ok()) return held;
  state_->AwaitReleases();
  v1::PrefetchRequest request;
  request.mutable_blocks()->set_session_id(state_->id());
  request.mutable_blocks()->set_lease_id(id_);
  absl::Status taken;
  absl::StatusOr<PrefetchResult> result =
      RunPrefetch(state_->rpc(), std::move(request), options, [&](const v1::PrefetchEvent& event) {
        for (const v1::Run& run : event.runs()) taken.Update(TakeRun(run));
        if (on_event) on_event(event);
      });
  if (!result.ok()) return state_->Explain(result.status());
  if (!taken.ok()) return taken;
  return result;
}

absl::Status Lease::Reserve(uint32_t count, v1::Tier tier) {
  if (absl::Status held = CheckHeld(); !held.ok()) return held;
  auto request = RequestOf<v1::ReserveRequest>(*state_, id_);
  request.set_position(end_);
  request.set_count(count);
  request.set_tier(tier);
  absl::StatusOr<v1::ReserveResponse> response =
      state_->Call(&Stub::Reserve, request, "Reserve", state_->rpc().call_timeout());
  if (!response.ok()) return response.status();
  places_.resize(std::max<size_t>(places_.size(), size_t{end_} + count));
  for (const v1::Run& run : response->runs()) {
    if (absl::Status taken = TakeRun(run); !taken.ok()) return taken;
  }
  return absl::OkStatus();
}

absl::StatusOr<uint32_t> Lease::ReserveUpTo(uint32_t count, v1::Tier only) {
  if (count == 0) return absl::InvalidArgumentError("count: 0 given, must be at least 1");
  std::vector<v1::Tier> tiers = {v1::TIER_HOST};
  if (end_ == 0 || places_[end_ - 1].tier == v1::TIER_GPU) {
    tiers.insert(tiers.begin(), v1::TIER_UNSPECIFIED);
  }
  if (only != v1::TIER_UNSPECIFIED) tiers = {only};
  // What is reserved already lies in one tier, and more can be had only there.
  if (reserved() > 0) tiers = {places_[end_].tier};
  absl::Status full;
  for (uint32_t want = count; want > reserved(); want /= 2) {
    for (const v1::Tier tier : tiers) {
      full = Reserve(want, tier);
      if (full.ok()) return want;
      if (!absl::IsResourceExhausted(full)) return full;
    }
  }
  if (reserved() > 0) return std::min(count, reserved());
  return full;
}

// After an answer the daemon's state is ours.
absl::StatusOr<v1::LeaseState> Lease::TakeState(absl::StatusOr<v1::LeaseState> answer) {
  if (!answer.ok()) return answer;
  end_ = answer->end();
  places_.resize(size_t{end_} + answer->reserved_blocks());
  return answer;
}

absl::StatusOr<v1::LeaseState> Lease::Put(std::span<const uint32_t> tokens) {
  return PutInline(tokens, {});
}

absl::StatusOr<v1::LeaseState> Lease::PutInline(std::span<const uint32_t> tokens,
                                                std::span<const std::byte> data) {
  if (absl::Status held = CheckHeld(); !held.ok()) return held;
  auto request = RequestOf<v1::PutRequest>(*state_, id_);
  request.set_position(end_);
  SetTokens(*request.mutable_tokens(), tokens);
  request.mutable_data()->assign(reinterpret_cast<const char*>(data.data()), data.size());
  const uint32_t before = end_;
  absl::StatusOr<v1::LeaseState> put =
      TakeState(state_->Call(&Stub::Put, request, "Put", state_->rpc().call_timeout()));
  if (put.ok() && !data.empty()) {
    std::fill(places_.begin() + before, places_.begin() + end_, BlockPlace());
  }
  return put;
}

absl::StatusOr<v1::LeaseState> Lease::Truncate(uint32_t position) {
  if (absl::Status held = CheckHeld(); !held.ok()) return held;
  auto request = RequestOf<v1::TruncateRequest>(*state_, id_);
  request.set_position(position);
  return TakeState(
      state_->Call(&Stub::Truncate, request, "Truncate", state_->rpc().call_timeout()));
}

absl::StatusOr<Lease> Lease::Fork() const {
  if (absl::Status held = CheckHeld(); !held.ok()) return held;
  const auto request = RequestOf<v1::ForkRequest>(*state_, id_);
  absl::StatusOr<v1::LeaseState> forked =
      state_->Call(&Stub::Fork, request, "Fork", state_->rpc().call_timeout());
  if (!forked.ok()) return forked.status();
  return Lease(state_, *this, forked->lease_id());
}

absl::StatusOr<v1::LeaseState> Lease::Flush(absl::Duration timeout) {
  if (absl::Status held = CheckHeld(); !held.ok()) return held;
  const auto request = RequestOf<v1::FlushRequest>(*state_, id_);
  if (timeout == absl::InfiniteDuration()) timeout = state_->rpc().call_timeout();
  return state_->Call(&Stub::Flush, request, "Flush", timeout);
}

absl::Status Lease::Download(uint32_t position, uint32_t count, absl::Duration timeout,
                             const DownloadCallback& on_chunk) const {
  if (absl::Status held = CheckHeld(); !held.ok()) return held;
  state_->AwaitReleases();
  v1::DownloadRequest request;
  request.mutable_blocks()->set_session_id(state_->id());
  request.mutable_blocks()->set_lease_id(id_);
  request.set_position(position);
  request.set_count(count);
  absl::Status status = RunDownload(state_->rpc(), request, timeout, on_chunk);
  return status.ok() ? status : state_->Explain(status);
}

absl::Status Lease::Release(bool session_over) {
  const std::shared_ptr<SessionState> state = std::exchange(state_, nullptr);
  if (state == nullptr) return NotHeld();
  const uint64_t id = std::exchange(id_, 0);
  devices_.reset();
  end_ = 0;
  places_.clear();
  if (id == 0) return absl::OkStatus();  // a lookup that failed: nothing was granted
  auto request = RequestOf<v1::ReleaseRequest>(*state, id);
  request.set_session_over(session_over);
  return state->Call(&Stub::Release, request, "Release", state->rpc().call_timeout()).status();
}

}  // namespace client
}  // namespace larder
