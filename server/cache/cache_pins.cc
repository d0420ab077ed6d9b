// Pins, and room: which copies must stay, and which go when a slot is needed.
#include <algorithm>
#include <cstdlib>

#include "server/cache/cache_state.h"
#include "storage/check.h"

namespace larder {

namespace {

// A child with copies in memory; there is one.
TreeNode* ChildInMemory(const TreeNode* node) {
  for (const auto& [hash, first] : node->children) {
    for (TreeNode* child = first; child != nullptr; child = child->next_same_hash) {
      if (child->count[kMemorySet] > 0) return child;
    }
  }
  LARDER_CHECK(false, "children_in is wrong");
  std::abort();
}

}  // namespace

bool Cache::Durable(const TreeBlock& block) const {
  const Slot slot = block.In(Tier::kNvme);
  return slot && s_->nvme.Is(slot, block.nvme_tag);
}

std::optional<Tier> Cache::BestTier(const TreeBlock& block) const {
  if (block.In(Tier::kGpu) && !gpu_lost_) return Tier::kGpu;
  if (block.In(Tier::kHost)) return Tier::kHost;
  if (Durable(block)) return Tier::kNvme;
  if (block.In(Tier::kGpu)) return Tier::kGpu;
  return std::nullopt;
}

bool Cache::Offered(const TreeBlock& block) const {
  const std::optional<Tier> best = BestTier(block);
  return best && !(*best == Tier::kGpu && gpu_lost_);
}

// --- Pins --------------------------------------------------------------------------------

void Cache::PinCopy(ModelState& model, TreeNode* node, uint32_t index, Tier tier) {
  model.tree.Pin(node, index, tier);
  TreeBlock& block = node->blocks[index];
  if (block.pins[larder::Index(tier)] != 1) return;
  model.pinned[larder::Index(tier)] += 1;
  if (tier == Tier::kNvme) s_->nvme.Hold(block.In(tier));
}

void Cache::UnpinCopy(ModelState& model, TreeNode* node, uint32_t index, Tier tier) {
  model.tree.Unpin(node, index, tier);
  const TreeBlock& block = node->blocks[index];
  if (block.pins[larder::Index(tier)] != 0) return;
  model.pinned[larder::Index(tier)] -= 1;
  s_->let_go += 1;
  if (tier == Tier::kNvme && Durable(block)) s_->nvme.Release(block.In(tier));
}

void Cache::PinRange(Lease& lease, Tier tier, uint32_t begin, uint32_t end) {
  HiRadixTree& tree = lease.model->tree;
  for (const PathPart& part : tree.PathTo(tree.Resolve(lease.cursor), begin)) {
    for (uint32_t i = part.begin; i < part.end && part.node->begin + i < end; ++i) {
      PinCopy(*lease.model, part.node, i, tier);
    }
  }
  if (tier == Tier::kGpu) {
    lease.gpu_end = end;
  } else if (!lease.pins.empty() && lease.pins.back().tier == tier &&
             lease.pins.back().end == begin) {
    lease.pins.back().end = end;
  } else {
    lease.pins.push_back({tier, begin, end});
  }
}

// As PinRange, less what the lease pins there already: asking again must not add up.
void Cache::PinOnce(Lease& lease, Tier tier, uint32_t begin, uint32_t end) {
  for (uint32_t at = begin; at < end;) {
    uint32_t until = end;
    bool pinned = false;
    for (const Lease::PinnedRange& range : lease.pins) {
      if (range.tier != tier || range.end <= at) continue;
      pinned = pinned || range.begin <= at;
      until = std::min(until, range.begin <= at ? range.end : range.begin);
    }
    if (!pinned) PinRange(lease, tier, at, until);
    at = until;
  }
}

std::vector<SlotRun> Cache::PinBest(Lease& lease, uint32_t begin, uint32_t end) {
  HiRadixTree& tree = lease.model->tree;
  std::vector<SlotRun> runs;
  for (const PathPart& part : tree.PathTo(tree.Resolve(lease.cursor), begin)) {
    for (uint32_t i = part.begin; i < part.end && part.node->begin + i < end; ++i) {
      const TreeBlock& block = part.node->blocks[i];
      const std::optional<Tier> tier = BestTier(block);
      LARDER_CHECK(tier.has_value());
      if (runs.empty() || runs.back().tier != *tier) {
        runs.push_back({*tier, part.node->begin + i, {}});
        runs.back().slots.reserve(part.end - i);
      }
      runs.back().slots.push_back(block.In(*tier));
    }
  }
  for (const SlotRun& run : runs) {
    const uint32_t run_end = run.position + static_cast<uint32_t>(run.slots.size());
    if (run.tier != Tier::kGpu) {
      PinOnce(lease, run.tier, run.position, run_end);
    } else if (run_end > lease.gpu_end) {
      // Blocks before this run are in GPU too (rule 2 of the tree), even where this lease
      // was told of another copy: with them its GPU pins stay prefix-closed.
      PinRange(lease, Tier::kGpu, lease.gpu_end, run_end);
    }
  }
  return runs;
}

// Moves the lease's end back to `position` and lets go of what was past it.
void Cache::UnpinFrom(Lease& lease, uint32_t position) {
  ModelState& model = *lease.model;
  const Path path = model.tree.PathTo(model.tree.Resolve(lease.cursor), position);
  const auto unpin = [&](Tier tier, uint32_t begin, uint32_t end)
                         ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (const PathPart& part : path) {
      const uint32_t from = std::max(begin, part.node->begin + part.begin);
      const uint32_t to = std::min(end, part.node->begin + part.end);
      for (uint32_t at = from; at < to; ++at) {
        UnpinCopy(model, part.node, at - part.node->begin, tier);
      }
    }
  };
  unpin(Tier::kGpu, position, lease.gpu_end);
  lease.gpu_end = std::min(lease.gpu_end, position);
  for (Lease::PinnedRange& range : lease.pins) {
    unpin(range.tier, std::max(range.begin, position), range.end);
    range.end = std::min(range.end, position);
  }
  std::erase_if(lease.pins, [](const Lease::PinnedRange& r) { return r.begin >= r.end; });
  if (path.empty()) return;
  for (const PathPart& part : path) model.tree.Settle(part.node);
  lease.cursor.end = position;
  model.tree.Bind(lease.cursor, model.tree.Resolve(lease.cursor));
  model.tree.Trim(path.back().node);
}

// Fewer slots free in the model's part of the tier than the cleaner is to keep.
bool Cache::BelowLowWater(const ModelState& model, Tier tier) const {
  const SlotAllocator& slots = s_->tiers[larder::Index(tier)].slots;
  return slots.free(model.pool[larder::Index(tier)]) < LowWaterSlots(model, tier);
}

// A mark above 0 is at least one slot.
uint64_t Cache::LowWaterSlots(const ModelState& model, Tier tier) const {
  const TierOptions& options = options_.tiers[larder::Index(tier)];
  if (options.bytes == 0) return 0;
  const uint64_t stride =
      s_->tiers[larder::Index(tier)].slots.stride(model.pool[larder::Index(tier)]);
  return (options.free_bytes_low_water + stride - 1) / stride;
}

// --- Room --------------------------------------------------------------------------------

// Takes one copy out of the tree and frees its slot. The caller trims.
void Cache::DropCopy(ModelState& model, TreeNode* node, uint32_t index, Tier tier) {
  s_->tiers[larder::Index(tier)].slots.Give(model.tree.Detach(node, index, tier));
  s_->tiers[larder::Index(tier)].evictions += 1;
  model.blocks[larder::Index(tier)] -= 1;
  const TreeBlock& block = node->blocks[index];
  if (block.InMemory()) return;
  if (Durable(block)) {
    s_->nvme.Touch(block.In(Tier::kNvme));
    s_->nvme.SetInMemory(block.In(Tier::kNvme), false);
  } else if (options_.tiers[larder::Index(Tier::kNvme)].bytes > 0 && !WithinBudget(model)) {
    s_->counters.limited_blocks += 1;
  }
}

// Forgets every copy in memory below block `index` of the node. False when one is pinned;
// those below it are gone by then.
bool Cache::ForgetBelow(ModelState& model, TreeNode* node, uint32_t index) {
  while (true) {
    TreeNode* leaf = node;
    while (leaf->count[kMemorySet] == leaf->size() && leaf->children_in[kMemorySet] > 0) {
      leaf = ChildInMemory(leaf);
    }
    const uint32_t last = leaf->count[kMemorySet] - 1;
    if (leaf == node && last == index) return true;
    if (leaf->blocks[last].Pinned()) return false;
    for (Tier tier : {Tier::kGpu, Tier::kHost}) {
      if (leaf->blocks[last].In(tier)) DropCopy(model, leaf, last, tier);
    }
    model.tree.Trim(leaf);
  }
}

// Drops a HOST copy of a block that is in GPU as well. One on its way down stays while that
// way is open; it would only be made again.
bool Cache::DropMirror(ModelState& model) {
  const bool can_be_written = NvmeUsable(model) && s_->nvme.MayClaim(model.pool[2]);
  const bool transit_too = !can_be_written && !BelowLowWater(model, Tier::kGpu);
  const auto [node, index] = model.tree.UnpinnedMirror(transit_too);
  if (node == nullptr) return false;
  DropCopy(model, node, index, Tier::kHost);
  return true;
}

// Frees one slot of the model's. Clean copies only, unless `drop_dirty`: then, where nothing
// else is left, the coldest block that is stored nowhere else is forgotten.
bool Cache::MakeRoom(ModelState& model, Tier tier, bool drop_dirty) {
  HiRadixTree& tree = model.tree;
  if (tier == Tier::kHost) {
    if (DropMirror(model)) return true;
    const bool can_be_written = NvmeUsable(model) && s_->nvme.MayClaim(model.pool[2]);
    TreeNode* node = tree.Victim(kMemorySet);
    if (node == nullptr) return false;
    const uint32_t index = node->count[kMemorySet] - 1;
    const TreeBlock& block = node->blocks[index];
    if (!drop_dirty && can_be_written && WorthWriting(block) && !Durable(block)) return false;
    DropCopy(model, node, index, Tier::kHost);
    tree.Trim(node);
    return true;
  }
  TreeNode* node = tree.Victim(kGpuSet);
  if (node == nullptr) return false;
  const uint32_t index = node->count[kGpuSet] - 1;
  const TreeBlock& block = node->blocks[index];
  if (!block.In(Tier::kHost)) {
    const bool memory_leaf =
        node->count[kMemorySet] == index + 1 &&
        (index + 1 < node->size() || node->children_in[kMemorySet] == 0);
    const bool clean = memory_leaf && (Durable(block) || options_.tiers[1].bytes == 0);
    if (!clean && (!drop_dirty || !ForgetBelow(model, node, index))) return false;
  }
  DropCopy(model, node, index, Tier::kGpu);
  tree.Trim(node);
  return true;
}

Slot Cache::TakeSlot(ModelState& model, Tier tier, bool drop_dirty) {
  SlotAllocator& slots = s_->tiers[larder::Index(tier)].slots;
  const SlotAllocator::Pool pool = model.pool[larder::Index(tier)];
  if (slots.slots_max(pool) == 0) return Slot();
  while (true) {
    if (const Slot slot = slots.Take(pool)) return slot;
    if (ReclaimSlab(model, tier)) continue;
    if (!MakeRoom(model, tier, drop_dirty)) return Slot();
  }
}

}  // namespace larder
