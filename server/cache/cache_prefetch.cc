// Prefetch and Flush: moves that somebody waits for.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "server/cache/cache_state.h"
#include "storage/check.h"

namespace larder {
namespace {

bool ReadableIn(const TreeBlock& block, Tier tier) {
  return tier == Tier::kGpu ? static_cast<bool>(block.In(Tier::kGpu)) : block.InMemory();
}

}  // namespace

// Sees to it that the block at `position` gets to the prefetch's tier. False when there is no
// slot for it, or no copy of it. A block that is wanted now is worth more than the coldest
// one, even where that is stored nowhere else. Taking slots may reshape the tree.
bool Cache::ClaimForPrefetch(PrefetchState& prefetch, uint32_t position) {
  ModelState& model = *prefetch.lease->model;
  Cursor cursor;
  const HiRadixTree::Position lease_end = model.tree.Resolve(prefetch.lease->cursor);
  model.tree.Bind(cursor, {lease_end.node, position + 1});
  const auto block_at = [&]() -> std::pair<TreeNode*, uint32_t> {
    TreeNode* node = model.tree.Resolve(cursor).node;
    return {node, position - node->begin};
  };
  const auto join = [&](Move& move) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    move.askers.push_back(prefetch.id);
    RaiseMove(move);
  };
  const auto claim = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) -> bool {
    auto [node, index] = block_at();
    if (ReadableIn(node->blocks[index], prefetch.tier)) return true;
    Move* to_host = FindMove(node->blocks[index], Tier::kHost);
    if (to_host != nullptr) RaiseMove(*to_host);
    if (Move* move = FindMove(node->blocks[index], prefetch.tier)) {
      join(*move);
      return true;
    }
    const std::optional<Tier> source = BestTier(node->blocks[index]);
    if (!source.has_value()) return false;
    SlotRef host{Tier::kHost, node->blocks[index].In(Tier::kHost)};
    if (*source == Tier::kNvme && to_host == nullptr) {
      host.slot = TakeSlot(model, Tier::kHost, /*drop_dirty=*/true);
      if (!host.slot) return false;
      std::tie(node, index) = block_at();
      to_host = StartMove(model, node, index, {Tier::kNvme, node->blocks[index].In(Tier::kNvme)},
                          host, MoveClass::kWaiting);
    } else if (*source == Tier::kNvme) {
      host = to_host->to;
    }
    if (prefetch.tier == Tier::kHost) {
      join(*to_host);
      return true;
    }
    const Slot gpu = TakeSlot(model, Tier::kGpu, /*drop_dirty=*/true);
    if (!gpu) return false;
    std::tie(node, index) = block_at();
    join(*StartMove(model, node, index, host, {Tier::kGpu, gpu}, MoveClass::kWaiting));
    return true;
  };
  const bool claimed = claim();
  model.tree.Unbind(cursor);
  return claimed;
}

absl::StatusOr<PrefetchId> Cache::Prefetch(SessionId session, LeaseId lease_id,
                                           std::optional<Tier> wanted,
                                           std::function<void()> on_progress) {
  absl::StatusOr<Tier> tier = MemoryTier(wanted);
  if (!tier.ok()) return tier.status();
  Section section(*this);
  absl::StatusOr<Lease*> found = FindLease(session, lease_id);
  if (!found.ok()) return found.status();
  std::erase_if((*found)->prefetches, [&](PrefetchId id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !s_->prefetches.contains(id);
  });
  if ((*found)->prefetches.size() >= options_.prefetches_per_lease_max) {
    s_->counters.exhausted += 1;
    return absl::ResourceExhaustedError(
        absl::StrCat("lease_id: ", (*found)->prefetches.size(),
                     " prefetches of the lease are under way, at most ",
                     options_.prefetches_per_lease_max));
  }
  auto owned = std::make_unique<PrefetchState>();
  PrefetchState& prefetch = *owned;
  prefetch.id = s_->next_id++;
  prefetch.lease = *found;
  prefetch.tier = *tier;
  prefetch.on_progress = std::move(on_progress);
  s_->prefetches[prefetch.id] = std::move(owned);
  prefetch.lease->prefetches.push_back(prefetch.id);
  // What is there already is the path's beginning (both sets are prefix-closed). It is pinned
  // first, so that making room for the rest cannot take it.
  prefetch.promised = prefetch.lease->end();
  Advance(prefetch);
  prefetch.promised = prefetch.ready;
  while (prefetch.promised < prefetch.lease->end() &&
         ClaimForPrefetch(prefetch, prefetch.promised)) {
    prefetch.promised += 1;
  }
  if (prefetch.promised < prefetch.lease->end()) {
    HiRadixTree& tree = prefetch.lease->model->tree;
    TreeNode* node = tree.Resolve(prefetch.lease->cursor).node;
    while (prefetch.promised < node->begin) node = node->parent;
    if (!BestTier(node->blocks[prefetch.promised - node->begin])) {
      prefetch.unreadable = prefetch.promised;
    }
  }
  Advance(prefetch);
  return prefetch.id;
}

// Blocks that have arrived are pinned where they now are and made ready to be given out.
void Cache::Advance(PrefetchState& prefetch) {
  Lease& lease = *prefetch.lease;
  const HiRadixTree& tree = lease.model->tree;
  uint32_t ready = prefetch.ready;
  bool stopped = false;
  for (const PathPart& part : tree.PathTo(tree.Resolve(lease.cursor), ready)) {
    for (uint32_t i = part.begin; i < part.end && !stopped; ++i) {
      stopped = ready == prefetch.promised || !ReadableIn(part.node->blocks[i], prefetch.tier);
      ready += !stopped;
    }
  }
  if (ready == prefetch.ready) return;
  for (SlotRun& run : PinBest(lease, prefetch.ready, ready)) {
    prefetch.runs.push_back(std::move(run));
  }
  prefetch.ready = ready;
  s_->calls.push_back(prefetch.on_progress);
}

absl::StatusOr<PrefetchUpdate> Cache::PollPrefetch(PrefetchId id) {
  Section section(*this);
  const auto found = s_->prefetches.find(id);
  if (found == s_->prefetches.end()) {
    return absl::NotFoundError("lease_id: the prefetch has ended, or its lease was released");
  }
  PrefetchState& prefetch = *found->second;
  PrefetchUpdate update;
  update.runs = std::move(prefetch.runs);
  prefetch.runs.clear();
  update.ready_blocks = prefetch.ready;
  update.promised_blocks = prefetch.promised;
  const bool failed = prefetch.unreadable.has_value() && prefetch.ready >= *prefetch.unreadable;
  if (failed) update.unreadable_position = prefetch.unreadable;
  update.done = failed || prefetch.ready >= prefetch.promised;
  if (update.done) s_->prefetches.erase(found);
  return update;
}

void Cache::CancelPrefetch(PrefetchId id) {
  Section section(*this);
  s_->prefetches.erase(id);
}

// --- Flush -------------------------------------------------------------------------------

absl::StatusOr<FlushId> Cache::Flush(SessionId session, LeaseId lease_id,
                                     std::function<void(absl::Status)> on_done) {
  if (options_.tiers[larder::Index(Tier::kNvme)].bytes == 0) {
    return absl::FailedPreconditionError("flush: this daemon has no NVME tier");
  }
  Section section(*this);
  absl::StatusOr<Lease*> found = FindLease(session, lease_id);
  if (!found.ok()) return found.status();
  if (!s_->nvme_writable) return NvmeTakesNoWrites();
  if (s_->flushes.size() >= options_.flushes_max) {
    s_->counters.exhausted += 1;
    return absl::ResourceExhaustedError(absl::StrCat("flush: ", s_->flushes.size(),
                                                     " are under way, at most ",
                                                     options_.flushes_max));
  }
  auto flush = std::make_unique<FlushState>();
  flush->id = s_->next_id++;
  flush->lease = *found;
  flush->on_done = std::move(on_done);
  const FlushId id = flush->id;
  std::erase_if((*found)->flushes, [&](FlushId each) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !s_->flushes.contains(each);
  });
  (*found)->flushes.push_back(id);
  s_->flushes[id] = std::move(flush);
  RaiseMovesOf(**found);
  CheckFlushes();
  return id;
}

// Moves towards NVME that are under way already now have somebody who waits for them. Looks at
// the moves, which are bounded, and not at the path, which is not.
void Cache::RaiseMovesOf(const Lease& lease) {
  const HiRadixTree::Position end = lease.model->tree.Resolve(lease.cursor);
  std::vector<MoveId> due;
  for (const auto& [id, move] : s_->moves) {
    if (move->model != lease.model || move->to.tier == Tier::kGpu) continue;
    const HiRadixTree::Position at = lease.model->tree.Resolve(move->at);
    if (at.end <= end.end && HiRadixTree::Above({end.node, at.end}).node == at.node) {
      due.push_back(id);
    }
  }
  std::sort(due.begin(), due.end());  // as they were started
  for (MoveId id : due) RaiseMove(*s_->moves.at(id));
}

bool Cache::CancelFlush(FlushId id) {
  Section section(*this);
  return s_->flushes.erase(id) > 0;
}

// NVMe is prefix-closed: when the last block of a lease is durable, all are.
void Cache::CheckFlushes() {
  for (auto it = s_->flushes.begin(); it != s_->flushes.end();) {
    const Lease& lease = *it->second->lease;
    const HiRadixTree::Position at = lease.model->tree.Resolve(lease.cursor);
    if (at.end > 0 && !Durable(at.node->blocks[at.end - at.node->begin - 1])) {
      ++it;
      continue;
    }
    s_->calls.push_back([done = std::move(it->second->on_done)] { done(absl::OkStatus()); });
    it = s_->flushes.erase(it);
  }
}

void Cache::FailFlushes(const absl::Status& why) {
  for (auto& [id, flush] : s_->flushes) {
    s_->calls.push_back([done = std::move(flush->on_done), why] { done(why); });
  }
  s_->flushes.clear();
}

// The first block of the lease that has no copy below GPU and none on its way down.
std::optional<uint32_t> Cache::FirstOnlyInGpu(const Lease& lease) const {
  const HiRadixTree::Position end = lease.model->tree.Resolve(lease.cursor);
  std::optional<uint32_t> first;
  for (const TreeNode* node = end.node; node->parent != nullptr; node = node->parent) {
    for (uint32_t i = std::min(end.end, node->end()) - node->begin; i > 0; --i) {
      const TreeBlock& block = node->blocks[i - 1];
      if (!block.In(Tier::kHost) && !Durable(block) && FindMove(block, Tier::kHost) == nullptr) {
        first = node->begin + i - 1;
      }
    }
  }
  return first;
}

// Of a GPU that is lost. What is on its way down may fail yet, so this is asked again and again.
void Cache::FailLostFlushes() {
  for (auto it = s_->flushes.begin(); it != s_->flushes.end();) {
    const std::optional<uint32_t> lost = FirstOnlyInGpu(*it->second->lease);
    if (!lost) {
      ++it;
      continue;
    }
    s_->calls.push_back([done = std::move(it->second->on_done), position = *lost] {
      done(absl::DataLossError(
          absl::StrCat("flush: block ", position, " is only in GPU, which is lost")));
    });
    it = s_->flushes.erase(it);
  }
}

}  // namespace larder
