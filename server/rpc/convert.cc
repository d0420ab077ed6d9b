#include "server/rpc/convert.h"

#include <algorithm>

#include "proto/larder/v1/handover.h"

namespace larder {

ModelSpec FromProto(const v1::ModelSpec& spec) {
  ModelSpec out;
  out.name = spec.name();
  out.weights_revision = spec.weights_revision();
  out.lora = spec.lora();
  out.salt = spec.salt();
  out.layers = spec.layers();
  out.kv_heads = spec.kv_heads();
  out.head_dim = spec.head_dim();
  out.mla_latent_dim = spec.mla_latent_dim();
  out.mla_rope_dim = spec.mla_rope_dim();
  out.dtype = static_cast<DType>(spec.dtype());
  out.block_tokens = spec.block_tokens();
  out.shards = spec.shards() == 0 ? 1 : spec.shards();
  return out;
}

std::optional<Tier> FromProto(v1::Tier tier) {
  if (tier == v1::TIER_UNSPECIFIED) return std::nullopt;
  return static_cast<Tier>(static_cast<int>(tier) - 1);
}

v1::Tier ToProto(Tier tier) { return static_cast<v1::Tier>(Index(tier) + 1); }

void ToProto(const Model& model, v1::Model& out) {
  out.set_model_id(model.id);
  out.set_fingerprint(model.fingerprint.bytes.data(), model.fingerprint.bytes.size());
  out.set_block_bytes(model.block_bytes);
  out.set_block_tokens(model.spec.block_tokens);
  v1::ModelSpec& spec = *out.mutable_spec();
  spec.set_name(model.spec.name);
  spec.set_weights_revision(model.spec.weights_revision);
  spec.set_lora(model.spec.lora);
  spec.set_salt(model.spec.salt);
  spec.set_layers(model.spec.layers);
  spec.set_kv_heads(model.spec.kv_heads);
  spec.set_head_dim(model.spec.head_dim);
  spec.set_mla_latent_dim(model.spec.mla_latent_dim);
  spec.set_mla_rope_dim(model.spec.mla_rope_dim);
  spec.set_dtype(static_cast<v1::DType>(model.spec.dtype));
  spec.set_block_tokens(model.spec.block_tokens);
  spec.set_shards(model.spec.shards);
}

void ToProto(std::span<const SlotRun> runs, google::protobuf::RepeatedPtrField<v1::Run>& out) {
  out.Reserve(out.size() + static_cast<int>(runs.size()));
  for (const SlotRun& run : runs) {
    v1::Run& to = *out.Add();
    to.set_tier(ToProto(run.tier));
    to.set_position(run.position);
    to.set_blocks(static_cast<uint32_t>(run.slots.size()));
    if (run.tier == Tier::kNvme) continue;
    to.set_arena(run.tier == Tier::kGpu ? 0 : wire::kHostArena);
    auto& offsets = *to.mutable_offsets();
    offsets.Resize(static_cast<int>(run.slots.size()), 0);
    std::transform(run.slots.begin(), run.slots.end(), offsets.begin(),
                   [](Slot slot) { return slot.offset(); });
  }
}

void ToProto(const LookupResult& result, v1::LookupPrefixResponse& out) {
  out.set_lease_id(result.lease);
  out.set_matched_tokens(result.matched_blocks * result.block_tokens);
  ToProto(result.runs, *out.mutable_runs());
  v1::RestoreEstimate& restore = *out.mutable_restore();
  restore.set_bytes(result.restore.bytes);
  restore.set_microseconds(
      static_cast<uint64_t>(std::max<int64_t>(0, absl::ToInt64Microseconds(result.restore.time))));
  restore.set_cut_blocks(result.restore.cut_blocks);
}

void ToProto(const LeaseState& state, v1::LeaseState& out) {
  out.set_lease_id(state.lease);
  out.set_end(state.end);
  out.set_durable_blocks(state.durable_blocks);
  out.set_reserved_blocks(state.reserved_blocks);
}

void ToProto(const PrefetchUpdate& update, v1::PrefetchEvent& out) {
  ToProto(update.runs, *out.mutable_runs());
  out.set_ready_blocks(update.ready_blocks);
  out.set_promised_blocks(update.promised_blocks);
  out.set_done(update.done);
  if (!update.unreadable_position) return;
  out.set_unreadable(true);
  out.set_unreadable_position(*update.unreadable_position);
}

void ToProto(const CacheStats& stats, v1::Status& out) {
  for (Tier tier : kTiers) {
    const TierStats& from = stats.tiers[Index(tier)];
    v1::TierStatus& to = *out.add_tiers();
    to.set_tier(ToProto(tier));
    to.set_bytes_total(from.bytes_total);
    to.set_bytes_used(from.bytes_used);
    to.set_bytes_pinned(from.bytes_pinned);
    to.set_blocks(from.blocks);
    to.set_hits(from.hits);
    to.set_evictions(from.evictions);
  }
  for (const HopStats& hop : stats.hops) {
    v1::MoveStatus& to = *out.add_moves();
    to.set_from(ToProto(hop.from));
    to.set_to(ToProto(hop.to));
    to.set_queued(hop.queued);
    to.set_done(hop.done);
    to.set_failed(hop.failed);
    to.set_bytes(hop.bytes);
    to.set_bytes_per_second(hop.bytes_per_second);
  }
  out.set_models(stats.models);
  out.set_sessions(stats.sessions);
  out.set_sessions_lost(stats.sessions_lost);
  out.set_leases(stats.leases);
  out.set_reserved_blocks(stats.reserved_blocks);
  out.set_lookups(stats.lookups);
  out.set_lookup_blocks(stats.lookup_blocks);
  out.set_miss_blocks(stats.miss_blocks);
  out.set_corrupt_blocks(stats.corrupt_blocks);
  out.set_orphans_collected(stats.orphans_collected);
  out.set_moves_in_flight(stats.moves_in_flight);
}

void ToProto(const ModelStats& stats, v1::ModelStatus& out) {
  ToProto(stats.model, *out.mutable_model());
  for (Tier tier : kTiers) {
    v1::ModelStatus::TierUse& use = *out.add_use();
    use.set_tier(ToProto(tier));
    use.set_bytes_used(stats.bytes_used[Index(tier)]);
    use.set_bytes_quota(stats.bytes_quota[Index(tier)]);
  }
  out.set_tree_nodes(stats.nodes);
  out.set_tree_blocks(stats.blocks);
}

void ToProto(const SessionInfo& session, v1::SessionStatus& out) {
  out.set_session_id(session.session);
  out.set_worker(session.worker);
  out.set_lost(session.lost);
  out.set_age_seconds(static_cast<uint64_t>(absl::ToInt64Seconds(session.age)));
  for (const LeaseInfo& lease : session.leases) {
    v1::LeaseStatus& to = *out.add_leases();
    to.set_lease_id(lease.lease);
    to.set_model_id(lease.model);
    to.set_end(lease.end);
    to.set_reserved_blocks(lease.reserved_blocks);
    to.set_duplicate_blocks(lease.duplicate_blocks);
    to.set_age_seconds(static_cast<uint64_t>(absl::ToInt64Seconds(lease.age)));
  }
}

void ToProto(const Explanation& explanation, v1::ExplainResponse& out) {
  out.set_asked_blocks(explanation.asked_blocks);
  out.set_matched_blocks(explanation.matched_blocks);
  for (const ExplainSegment& segment : explanation.segments) {
    v1::ExplainSegment& to = *out.add_segments();
    to.set_position(segment.position);
    to.set_blocks(segment.blocks);
    to.set_gpu(segment.in_tier[Index(Tier::kGpu)]);
    to.set_host(segment.in_tier[Index(Tier::kHost)]);
    to.set_nvme(segment.in_tier[Index(Tier::kNvme)]);
    to.set_pins(segment.pins);
    to.set_hits(segment.hits);
    to.set_children(segment.children);
  }
  out.set_stopped_because(explanation.stopped_because);
}

void ToProto(const TopPrefix& prefix, v1::TopPrefix& out) {
  out.set_model_id(prefix.model);
  out.set_blocks(prefix.blocks);
  out.set_hits(prefix.hits);
  const size_t count = std::min<size_t>(prefix.head.size(), 16);
  out.mutable_head()->Add(prefix.head.begin(), prefix.head.begin() + count);
}

}  // namespace larder
