// Moves: how a block gets a copy in another tier, and who hears of it.
//
//   StartMove  the target slot is taken, the source pinned, the job handed to the Mover
//   Arrived    the bytes are there; committed only after the block before it, so that
//              every tier stays prefix-closed
//   Commit     the tree has the copy; askers are told, whoever waited for it goes on
//   Fail       the target slot is given back; askers learn which block is unreadable
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "server/cache/block_key.h"
#include "server/cache/cache_state.h"
#include "storage/check.h"

namespace larder {

Cache::Hop& Cache::HopOf(Tier from, Tier to) const {
  for (Hop& hop : s_->hops) {
    if (hop.from == from && hop.to == to) return hop;
  }
  LARDER_CHECK(false, "no such tier pair");
  std::abort();
}

// The move that brings this block to `to`, whatever it comes from.
Cache::Move* Cache::FindMove(const TreeBlock& block, Tier to) const {
  const auto find = [&](SlotRef from, Tier target) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) -> Move* {
    const auto found = s_->move_by_source.find({from, target});
    return found == s_->move_by_source.end() ? nullptr : found->second;
  };
  for (Tier tier : kTiers) {
    if (!block.In(tier)) continue;
    if (Move* move = find({tier, block.In(tier)}, to)) return move;
  }
  if (to != Tier::kGpu || !block.In(Tier::kNvme)) return nullptr;
  // In two hops: the second one is keyed by the HOST slot that the first will fill.
  Move* first = find({Tier::kNvme, block.In(Tier::kNvme)}, Tier::kHost);
  return first != nullptr ? find(first->to, Tier::kGpu) : nullptr;
}

Cache::Move* Cache::StartMove(ModelState& model, TreeNode* node, uint32_t index, SlotRef from,
                              SlotRef to, MoveClass move_class) {
  auto owned = std::make_unique<Move>();
  Move& move = *owned;
  move.id = s_->next_move++;
  move.model = &model;
  move.from = from;
  move.to = to;
  move.move_class = move_class;
  model.tree.Bind(move.at, {node, node->begin + index + 1});
  if (from.tier == Tier::kNvme || to.tier == Tier::kNvme) {
    move.record.parent_key = KeyAt(model, node, node->begin + index);
    move.record.key = KeyAt(model, node, node->begin + index + 1);
    move.record.model_id = model.model.id;
    move.record.depth = node->begin + index;
  }
  model.arriving[larder::Index(to.tier)] += 1;
  model.leaving_gpu += from.tier == Tier::kGpu;
  const bool inserted = s_->move_by_source.emplace(std::pair(from, to.tier), &move).second;
  LARDER_CHECK(inserted);
  s_->moves[move.id] = std::move(owned);
  if (node->blocks[index].In(from.tier) == from.slot) {
    SubmitMove(move);
  } else {
    move.phase = Move::Phase::kBlocked;
  }
  return &move;
}

// The source is in place: pins it and hands the job to the mover.
void Cache::SubmitMove(Move& move) {
  const HiRadixTree::Position at = move.model->tree.Resolve(move.at);
  PinCopy(*move.model, at.node, at.end - 1 - at.node->begin, move.from.tier);
  move.phase = Move::Phase::kMoving;
  Hop& hop = HopOf(move.from.tier, move.to.tier);
  if (hop.in_flight == 0) hop.last = clock_.Now();
  hop.in_flight += 1;
  hop.background += move.move_class == MoveClass::kBackground;
  hop.queued_bytes += move.model->model.WholeBlockBytes();
  MoveJob job;
  job.id = move.id;
  job.from = move.from;
  job.to = move.to;
  job.bytes = move.model->model.WholeBlockBytes();
  job.shards = move.model->model.spec.shards;
  job.move_class = move.move_class;
  job.record = move.record;
  s_->jobs.push_back(std::move(job));
}

void Cache::RaiseMove(Move& move) {
  if (move.move_class == MoveClass::kWaiting) return;
  move.move_class = MoveClass::kWaiting;
  if (move.phase != Move::Phase::kMoving) return;
  HopOf(move.from.tier, move.to.tier).background -= 1;
  s_->raises.push_back(move.id);
}

void Cache::OnMoveDone(MoveId id, absl::Status status) {
  Section section(*this);
  const auto found = s_->moves.find(id);
  if (found == s_->moves.end()) return;
  Move& move = *found->second;
  Hop& hop = HopOf(move.from.tier, move.to.tier);
  hop.in_flight -= 1;
  hop.background -= move.move_class == MoveClass::kBackground;
  hop.queued_bytes -= move.model->model.WholeBlockBytes();
  if (!status.ok()) {
    hop.failed += 1;
    // A queue that is full empties; a tier that is unavailable says when it is back.
    hop.refused = absl::IsResourceExhausted(status) || absl::IsUnavailable(status);
    Fail(move, status);
    return;
  }
  constexpr double kDecay = 0.95;
  const absl::Time now = clock_.Now();
  hop.refused = false;
  hop.done += 1;
  hop.bytes += move.model->model.WholeBlockBytes();
  hop.sum_bytes = hop.sum_bytes * kDecay + move.model->model.WholeBlockBytes();
  hop.sum_seconds = hop.sum_seconds * kDecay +
                    std::max(1e-7, absl::ToDoubleSeconds(now - hop.last));
  hop.last = now;
  Arrived(move);
}

void Cache::Arrived(Move& move) {
  const HiRadixTree::Position at = move.model->tree.Resolve(move.at);
  const uint32_t index = at.end - 1 - at.node->begin;
  const TreeNode* before_node = index > 0 ? at.node : at.node->parent;
  if (before_node->parent != nullptr) {
    const TreeBlock& before = before_node->blocks[index > 0 ? index - 1 : before_node->size() - 1];
    const Tier to = move.to.tier;
    const bool ready = to == Tier::kGpu    ? static_cast<bool>(before.In(Tier::kGpu))
                       : to == Tier::kHost ? before.InMemory()
                                           : Durable(before);
    if (!ready) {
      if (Move* leader = FindMove(before, to)) {
        move.phase = Move::Phase::kArrived;
        leader->followers.push_back(move.id);
      } else {
        Fail(move, absl::AbortedError("the block before it did not arrive"));
      }
      return;
    }
  }
  Commit(move);
}

// Takes the move out of the books; its slots are no longer its own.
void Cache::EndMove(Move& move) {
  ModelState& model = *move.model;
  s_->move_by_source.erase({move.from, move.to.tier});
  s_->let_go += 1;
  model.arriving[larder::Index(move.to.tier)] -= 1;
  model.leaving_gpu -= move.from.tier == Tier::kGpu;
  if (move.phase != Move::Phase::kBlocked) {
    const HiRadixTree::Position at = model.tree.Resolve(move.at);
    const uint32_t index = at.end - 1 - at.node->begin;
    UnpinCopy(model, at.node, index, move.from.tier);
    model.tree.Settle(at.node);
  }
}

// A block got a copy in HOST: it is either durable, or to be written.
void Cache::NoteInHost(ModelState& model, TreeNode* node, uint32_t index) {
  const TreeBlock& block = node->blocks[index];
  if (Durable(block)) {
    s_->nvme.SetInMemory(block.In(Tier::kNvme), true);
  } else {
    model.tree.Enlist(HiRadixTree::kDirtyList, node);
  }
}

void Cache::Commit(Move& move) {
  ModelState& model = *move.model;
  const Tier tier = move.to.tier;
  const HiRadixTree::Position at = model.tree.Resolve(move.at);
  const uint32_t index = at.end - 1 - at.node->begin;
  TreeBlock& block = at.node->blocks[index];
  // While it moved, a Put may have given the block a copy in this tier.
  const bool needed = tier == Tier::kNvme ? !Durable(block) : !block.In(tier);
  if (needed) {
    if (tier == Tier::kNvme) {
      if (block.In(Tier::kNvme)) model.tree.Detach(at.node, index, Tier::kNvme);  // a stale one
      s_->nvme.Commit(move.to.slot);
      block.nvme_tag = move.record.key.Tag();
      block.in_transit = false;
    }
    model.tree.Attach(at.node, index, tier, move.to.slot);
    if (tier != Tier::kNvme) model.blocks[larder::Index(tier)] += 1;
    if (tier == Tier::kHost) NoteInHost(model, at.node, index);
  } else if (tier == Tier::kNvme) {
    s_->nvme.Abort(move.to.slot);
  } else {
    s_->tiers[larder::Index(tier)].slots.Give(move.to.slot);
  }
  EndMove(move);

  // A second hop that waited for this copy. When the block was put again meanwhile, it has
  // another copy in HOST, and the second hop has nothing to start from.
  if (tier == Tier::kHost) {
    const auto next = s_->move_by_source.find({move.to, Tier::kGpu});
    if (next != s_->move_by_source.end()) {
      if (block.In(Tier::kHost) == move.to.slot) {
        SubmitMove(*next->second);
      } else {
        Fail(*next->second, absl::AbortedError("the block was put again meanwhile"));
      }
    }
  }
  const std::vector<PrefetchId> askers = std::move(move.askers);
  Discard(move);
  for (PrefetchId asker : askers) {
    const auto prefetch = s_->prefetches.find(asker);
    if (prefetch != s_->prefetches.end()) Advance(*prefetch->second);
  }
  if (tier == Tier::kNvme) CheckFlushes();
}

// Forgets a move that has ended, then lets those go on that had to wait for it.
void Cache::Discard(Move& move) {
  HiRadixTree& tree = move.model->tree;
  const std::vector<MoveId> followers = std::move(move.followers);
  TreeNode* node = tree.Resolve(move.at).node;
  tree.Unbind(move.at);
  const MoveId id = move.id;
  s_->moves.erase(id);
  tree.Trim(node);
  for (MoveId follower : followers) {
    const auto next = s_->moves.find(follower);
    if (next != s_->moves.end()) Arrived(*next->second);
  }
}

void Cache::Fail(Move& move, const absl::Status& status) {
  ModelState& model = *move.model;
  const Tier tier = move.to.tier;
  const HiRadixTree::Position at = model.tree.Resolve(move.at);
  const uint32_t index = at.end - 1 - at.node->begin;
  if (move.from.tier == Tier::kNvme && absl::IsDataLoss(status)) {
    s_->counters.corrupt_blocks += 1;
    LoseNvmeCopy(model, at.node, index);
  }
  if (tier == Tier::kNvme) {
    s_->nvme.Abort(move.to.slot);
    at.node->written = std::min(at.node->written, index);
    model.tree.Enlist(HiRadixTree::kDirtyList, at.node);
  } else {
    s_->tiers[larder::Index(tier)].slots.Give(move.to.slot);
  }
  Move* second = nullptr;
  if (tier == Tier::kHost) {
    const auto next = s_->move_by_source.find({move.to, Tier::kGpu});
    if (next != s_->move_by_source.end()) second = next->second;
  }
  EndMove(move);
  const uint32_t position = at.end - 1;
  const std::vector<PrefetchId> askers = std::move(move.askers);
  if (second != nullptr) Fail(*second, status);
  Discard(move);
  for (PrefetchId asker : askers) {
    const auto found = s_->prefetches.find(asker);
    if (found == s_->prefetches.end()) continue;
    PrefetchState& prefetch = *found->second;
    Advance(prefetch);  // another copy of it may be there by now
    if (prefetch.ready <= position && position < prefetch.promised) {
      prefetch.unreadable = std::min(prefetch.unreadable.value_or(position), position);
      s_->calls.push_back(prefetch.on_progress);
    }
  }
}

// What NVMe holds there is not this block. What is below it on NVMe can no longer be found
// from above: unless a lease reads it, it counts as not written.
void Cache::LoseNvmeCopy(ModelState& model, TreeNode* node, uint32_t index) {
  TreeBlock& block = node->blocks[index];
  if (Durable(block)) s_->nvme.Condemn(block.In(Tier::kNvme));
  std::vector<std::pair<TreeNode*, uint32_t>> todo = {{node, index}};
  while (!todo.empty()) {
    const auto [at, from] = todo.back();
    todo.pop_back();
    for (uint32_t i = from; i < at->size(); ++i) {
      TreeBlock& lost = at->blocks[i];
      if (!lost.In(Tier::kNvme) || (lost.pins[2] != 0 && !(at == node && i == index))) continue;
      if (Durable(lost)) s_->nvme.SetInMemory(lost.In(Tier::kNvme), false);
      lost.slot[larder::Index(Tier::kNvme)] = Slot();
    }
    at->written = std::min(at->written, from);
    if (at->count[kMemorySet] > 0) model.tree.Enlist(HiRadixTree::kDirtyList, at);
    for (const auto& [hash, first] : at->children) {
      for (TreeNode* c = first; c != nullptr; c = c->next_same_hash) todo.emplace_back(c, 0);
    }
  }
}

}  // namespace larder
