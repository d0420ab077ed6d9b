// Leases: reserve, publish, move back, share, let go.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "server/cache/cache_state.h"
#include "storage/check.h"

namespace larder {
namespace {

std::string TierText(Tier tier) { return std::string(TierName(tier)); }

}  // namespace

absl::Status Cache::Exhausted(const ModelState& model, Tier tier, uint64_t blocks) {
  s_->counters.exhausted += 1;
  const SlotAllocator& slots = s_->tiers[larder::Index(tier)].slots;
  const SlotAllocator::Pool pool = model.pool[larder::Index(tier)];
  const uint64_t stride = slots.stride(pool);
  const bool per_rank = tier == Tier::kGpu && model.model.spec.shards > 1;
  return absl::ResourceExhaustedError(absl::StrCat(
      "tier ", TierText(tier), per_rank ? " (each rank): " : ": ", blocks, " blocks (",
      blocks * stride, " bytes) asked for, ", slots.free(pool) * stride,
      " bytes free, and too much of the model's ",
      slots.taken(pool) * stride, " bytes is pinned, reserved or moving"));
}

absl::Status Cache::CheckLeaseCount(const Session& session) {
  if (session.leases.size() < options_.leases_per_session_max) return absl::OkStatus();
  s_->counters.exhausted += 1;
  return absl::ResourceExhaustedError(absl::StrCat("leases: the session holds ",
                                                   session.leases.size(), ", at most ",
                                                   options_.leases_per_session_max));
}

Cache::Lease& Cache::NewLease(Session& session, ModelState& model) {
  auto lease = std::make_unique<Lease>();
  lease->id = s_->next_id++;
  lease->session = &session;
  lease->model = &model;
  lease->opened = clock_.Now();
  model.tree.Bind(lease->cursor, model.tree.Start());
  session.leases[lease->id] = lease.get();
  Lease& result = *lease;
  s_->leases[result.id] = std::move(lease);
  return result;
}

void Cache::FreeReserved(Lease& lease) {
  const int tier = larder::Index(lease.reserved_tier);
  for (Slot slot : lease.reserved) s_->tiers[tier].slots.Give(slot);
  lease.model->held[tier] -= lease.reserved.size();
  s_->counters.reserved_blocks -= lease.reserved.size();
  lease.reserved.clear();
  s_->let_go += 1;
}

void Cache::FreeDuplicates(Lease& lease, uint32_t from) {
  const auto free = [&](const Lease::Duplicate& duplicate) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (duplicate.position < from) return false;
    if (duplicate.slot.use_count() == 1) {
      const int tier = larder::Index(duplicate.slot->tier);
      s_->tiers[tier].slots.Give(duplicate.slot->slot);
      lease.model->held[tier] -= 1;
      s_->let_go += 1;
    }
    return true;
  };
  std::erase_if(lease.duplicates, free);
}

// The unshared tail of a finished conversation may go before anything else.
void Cache::MarkFinished(Lease& lease) {
  HiRadixTree& tree = lease.model->tree;
  const HiRadixTree::Position at = tree.Resolve(lease.cursor);
  if (at.node == tree.root() || at.end != at.node->end() || !at.node->children.empty()) return;
  for (TreeBlock& block : at.node->blocks) block.rank = policy_->Finished(block.rank);
  tree.Reorder(at.node);
}

void Cache::DropLease(Lease& lease, bool session_over) {
  for (PrefetchId id : lease.prefetches) {
    const auto found = s_->prefetches.find(id);
    if (found == s_->prefetches.end()) continue;
    s_->calls.push_back(std::move(found->second->on_progress));
    s_->prefetches.erase(found);
  }
  for (FlushId id : lease.flushes) {
    const auto found = s_->flushes.find(id);
    if (found == s_->flushes.end()) continue;
    s_->calls.push_back([done = std::move(found->second->on_done)] {
      done(absl::CancelledError("lease_id: the lease was released"));
    });
    s_->flushes.erase(found);
  }
  if (session_over) MarkFinished(lease);
  FreeReserved(lease);
  FreeDuplicates(lease, 0);
  UnpinFrom(lease, 0);
  lease.model->tree.Unbind(lease.cursor);
  lease.session->leases.erase(lease.id);
  s_->leases.erase(lease.id);
}

LeaseState Cache::StateOf(const Lease& lease) const {
  LeaseState state;
  state.lease = lease.id;
  state.end = lease.end();
  state.reserved_blocks = static_cast<uint32_t>(lease.reserved.size());
  // NVMe is prefix-closed: what is above a durable block is durable. So the first block of a
  // node says whether the end is in it, and the node is searched by halves.
  const HiRadixTree::Position at = lease.model->tree.Resolve(lease.cursor);
  const TreeNode* node = at.node;
  uint32_t end = at.end;
  while (node->parent != nullptr && !Durable(node->blocks[0])) {
    end = node->begin;
    node = node->parent;
  }
  const auto durable = std::partition_point(
      node->blocks.begin(), node->blocks.begin() + (end - node->begin),
      [&](const TreeBlock& block) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return Durable(block); });
  state.durable_blocks = node->begin + static_cast<uint32_t>(durable - node->blocks.begin());
  return state;
}

// Where new blocks of the lease go when its worker does not say: GPU, unless the block before
// them is not there and not on its way.
Tier Cache::ReserveTier(const Lease& lease) const {
  const Tier highest = *MemoryTier(std::nullopt);
  if (!lease.reserved.empty()) return lease.reserved_tier;
  if (highest == Tier::kHost || lease.end() == 0 ||
      options_.tiers[larder::Index(Tier::kHost)].bytes == 0) {
    return highest;
  }
  const HiRadixTree::Position at = lease.model->tree.Resolve(lease.cursor);
  const TreeBlock& last = at.node->blocks[at.end - at.node->begin - 1];
  const bool follows = last.In(Tier::kGpu) || FindMove(last, Tier::kGpu) != nullptr;
  return follows ? Tier::kGpu : Tier::kHost;
}

absl::StatusOr<std::vector<SlotRun>> Cache::Reserve(SessionId session, LeaseId lease_id,
                                                    uint32_t position, uint32_t count,
                                                    std::optional<Tier> wanted) {
  if (absl::Status status = MemoryTier(wanted).status(); !status.ok()) return status;
  Section section(*this);
  absl::StatusOr<Lease*> found = FindLease(session, lease_id);
  if (!found.ok()) return found.status();
  Lease& lease = **found;
  const absl::StatusOr<Tier> tier = wanted.has_value() ? *wanted : ReserveTier(lease);
  ModelState& model = *lease.model;
  if (absl::Status status = CheckEnd(lease, position); !status.ok()) return status;
  if (!lease.reserved.empty() && lease.reserved_tier != *tier) {
    return absl::FailedPreconditionError(
        absl::StrCat("tier: ", TierText(*tier), " given, but ", lease.reserved.size(),
                     " blocks are reserved in ", TierText(lease.reserved_tier)));
  }
  const int t = larder::Index(*tier);
  if (count > lease.reserved.size()) {
    const uint64_t more = count - lease.reserved.size();
    SlotAllocator& slots = s_->tiers[t].slots;
    if (more + model.pinned[t] + model.held[t] > slots.slots_max(model.pool[t])) {
      return Exhausted(model, *tier, more);
    }
    // 1. What is free, then slabs that are due to this model.
    // 2. Its own unpinned blocks, once it is clear that there are enough.
    std::vector<Slot> taken;
    while (taken.size() < more) {
      const Slot slot = slots.Take(model.pool[t]);
      if (!slot && !ReclaimSlab(model, *tier)) break;
      if (slot) taken.push_back(slot);
    }
    const bool enough = more - taken.size() <= model.blocks[t] - model.pinned[t];
    while (enough && taken.size() < more) {
      const Slot slot = TakeSlot(model, *tier, /*drop_dirty=*/true);
      if (!slot) break;
      taken.push_back(slot);
    }
    if (taken.size() < more) {
      for (Slot slot : taken) s_->tiers[t].slots.Give(slot);
      return Exhausted(model, *tier, more);
    }
    lease.reserved_tier = *tier;
    lease.reserved.insert(lease.reserved.end(), taken.begin(), taken.end());
    model.held[t] += more;
    s_->counters.reserved_blocks += more;
  }
  SlotRun run{*tier, position, {}};
  run.slots.assign(lease.reserved.begin(), lease.reserved.begin() + count);
  return std::vector<SlotRun>{std::move(run)};
}

absl::Status Cache::CheckEnd(const Lease& lease, uint32_t position) const {
  if (position == lease.end()) return absl::OkStatus();
  return absl::AbortedError(absl::StrCat("position: ", position,
                                         " given, the lease's end is at block ", lease.end()));
}

absl::Status Cache::CheckPut(const Lease& lease, uint32_t position,
                             std::span<const uint32_t> tokens) const {
  const uint32_t block_tokens = lease.model->model.spec.block_tokens;
  if (absl::Status status = CheckEnd(lease, position); !status.ok()) return status;
  if (tokens.empty() || tokens.size() % block_tokens != 0) {
    return absl::InvalidArgumentError(absl::StrCat("tokens: ", tokens.size(),
                                                   " given, must be a multiple of ", block_tokens,
                                                   " and at least that many"));
  }
  const uint64_t count = tokens.size() / block_tokens;
  if (count > lease.reserved.size()) {
    return absl::FailedPreconditionError(absl::StrCat("tokens: ", count, " blocks given, but only ",
                                                      lease.reserved.size(), " are reserved"));
  }
  const HiRadixTree::Position at = lease.model->tree.Resolve(lease.cursor);
  if (at.end == 0) return absl::OkStatus();
  const TreeBlock& last = at.node->blocks[at.end - at.node->begin - 1];
  const bool readable =
      lease.reserved_tier == Tier::kGpu ? static_cast<bool>(last.In(Tier::kGpu)) : last.InMemory();
  if (readable) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "position: block ", at.end - 1, " of the lease, before the first new one, is not in ",
      lease.reserved_tier == Tier::kGpu ? "GPU" : "GPU or HOST",
      "; Prefetch the lease there, or Truncate it, before Put"));
}

// Makes the first reserved blocks part of the tree at the lease's end. Where another worker's
// block is canonical: its tier may lack a copy, then ours becomes it; or ours stays a
// duplicate of this lease, because its kernels may be reading it.
void Cache::Publish(Lease& lease, std::span<const uint32_t> tokens) {
  ModelState& model = *lease.model;
  HiRadixTree& tree = model.tree;
  const Tier tier = lease.reserved_tier;
  const int t = larder::Index(tier);
  const uint32_t begin = lease.end();
  const HiRadixTree::Position matched = tree.Match(tree.Resolve(lease.cursor), tokens);
  const uint64_t known = uint64_t{matched.end - begin} * tree.block_tokens();
  const HiRadixTree::Position at = tree.Append(matched, tokens.subspan(known));
  s_->operation += 1;
  s_->let_go += 1;
  for (const PathPart& part : tree.PathTo(at, begin)) {
    for (uint32_t i = part.begin; i < part.end; ++i) {
      const uint32_t position = part.node->begin + i;
      TreeBlock& block = part.node->blocks[i];
      const Slot slot = lease.reserved[position - begin];
      if (!WorthWriting(block)) tree.Enlist(HiRadixTree::kDirtyList, part.node);
      block.rank = policy_->Touched(block.rank, s_->operation);
      if (block.In(tier)) {
        lease.duplicates.push_back(
            {position, std::make_shared<const SlotRef>(SlotRef{tier, slot})});
        s_->counters.duplicate_blocks += 1;
        continue;
      }
      tree.Attach(part.node, i, tier, slot);
      model.blocks[t] += 1;
      model.held[t] -= 1;
      if (tier == Tier::kHost) {
        NoteInHost(model, part.node, i);
      } else if (Durable(block)) {
        s_->nvme.SetInMemory(block.In(Tier::kNvme), true);
      }
    }
  }
  tree.Bind(lease.cursor, at);
  lease.reserved.erase(lease.reserved.begin(), lease.reserved.begin() + (at.end - begin));
  PinRange(lease, tier, tier == Tier::kGpu ? lease.gpu_end : begin, at.end);
  s_->counters.put_blocks += at.end - begin;
  s_->counters.reserved_blocks -= at.end - begin;
}

absl::StatusOr<LeaseState> Cache::Put(SessionId session, LeaseId lease, uint32_t position,
                                      std::span<const uint32_t> tokens) {
  Section section(*this);
  absl::StatusOr<Lease*> found = FindLease(session, lease);
  if (!found.ok()) return found.status();
  if (absl::Status status = CheckPut(**found, position, tokens); !status.ok()) return status;
  Publish(**found, tokens);
  return StateOf(**found);
}

absl::StatusOr<LeaseState> Cache::Truncate(SessionId session, LeaseId lease_id,
                                           uint32_t position) {
  Section section(*this);
  absl::StatusOr<Lease*> found = FindLease(session, lease_id);
  if (!found.ok()) return found.status();
  Lease& lease = **found;
  if (position > lease.end()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "position: ", position, " given, at most the lease's end, block ", lease.end()));
  }
  FreeReserved(lease);
  FreeDuplicates(lease, position);
  for (PrefetchId id : lease.prefetches) {
    const auto prefetch = s_->prefetches.find(id);
    if (prefetch == s_->prefetches.end()) continue;
    PrefetchState& p = *prefetch->second;
    p.promised = std::min(p.promised, position);
    p.ready = std::min(p.ready, position);
    s_->calls.push_back(p.on_progress);
  }
  UnpinFrom(lease, position);
  if (!lease.flushes.empty()) CheckFlushes();  // what is left may be durable
  return StateOf(lease);
}

absl::StatusOr<LeaseState> Cache::Fork(SessionId session, LeaseId lease_id, SessionId owner) {
  Section section(*this);
  absl::StatusOr<Lease*> found = FindLease(session, lease_id);
  if (!found.ok()) return found.status();
  Lease& from = **found;
  absl::StatusOr<Session*> to = owner == 0 ? from.session : FindSession(owner);
  if (!to.ok()) return to.status();
  if (absl::Status status = CheckLeaseCount(**to); !status.ok()) return status;
  Lease& fork = NewLease(**to, *from.model);
  fork.model->tree.Bind(fork.cursor, from.model->tree.Resolve(from.cursor));
  if (from.gpu_end > 0) PinRange(fork, Tier::kGpu, 0, from.gpu_end);
  for (const Lease::PinnedRange& range : from.pins) {
    PinRange(fork, range.tier, range.begin, range.end);
  }
  fork.duplicates = from.duplicates;
  return StateOf(fork);
}

absl::StatusOr<LeaseState> Cache::Follow(SessionId session, LeaseId lease_id, uint32_t position,
                                         SessionId owner, LeaseId leader_id) {
  Section section(*this);
  absl::StatusOr<Lease*> found = FindLease(session, lease_id);
  if (!found.ok()) return found.status();
  absl::StatusOr<Lease*> leader = FindLease(owner, leader_id);
  if (!leader.ok()) return leader.status();
  Lease& lease = **found;
  if (absl::Status status = CheckEnd(lease, position); !status.ok()) return status;
  HiRadixTree& tree = lease.model->tree;
  const HiRadixTree::Position at = tree.Resolve((*leader)->cursor);
  const HiRadixTree::Position fork = tree.Above({at.node, position});
  const HiRadixTree::Position end = tree.Resolve(lease.cursor);
  if ((*leader)->model != lease.model || at.end < position || fork.node != end.node) {
    return absl::AbortedError(
        absl::StrCat("position: ", position, " given, the lease was moved meanwhile"));
  }
  tree.Bind(lease.cursor, at);
  PinBest(lease, position, at.end);
  return StateOf(lease);
}

absl::Status Cache::Release(SessionId session, LeaseId lease, bool session_over) {
  Section section(*this);
  absl::StatusOr<Lease*> found = FindLease(session, lease);
  if (!found.ok()) return found.status();
  DropLease(**found, session_over);
  return absl::OkStatus();
}

absl::StatusOr<LeaseState> Cache::GetLease(SessionId session, LeaseId lease) const {
  absl::MutexLock lock(&mu_);
  absl::StatusOr<Lease*> found = FindLease(session, lease);
  if (!found.ok()) return found.status();
  return StateOf(**found);
}

absl::StatusOr<Model> Cache::ModelOfLease(SessionId session, LeaseId lease) const {
  absl::MutexLock lock(&mu_);
  absl::StatusOr<Lease*> found = FindLease(session, lease);
  if (!found.ok()) return found.status();
  return (*found)->model->model;
}

}  // namespace larder
