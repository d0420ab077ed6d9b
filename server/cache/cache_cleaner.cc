// The cleaner: keeps slots free ahead of need, and writes blocks down before they must go.
//
//   GPU   below its low-water mark, the coldest leaves are copied to HOST and then dropped; of a
//         device that is lost all that nobody reads
//   HOST  every block that is not on NVME is written there, ancestors first, unless its
//         conversation is finished (README.md has what that saves and costs); below the
//         low-water mark, copies that GPU has too are dropped, then the coldest durable leaves
//   NVME  its index evicts when a slot is claimed
#include <algorithm>

#include "server/cache/cache_state.h"
#include "storage/check.h"

namespace larder {

bool Cache::WithinBudget(const ModelState& model) const {
  return s_->nvme_writes.Allows(model.model.WholeBlockBytes(), clock_.Now());
}

// Whether a block of the model's may be written down at this moment.
bool Cache::NvmeUsable(const ModelState& model) const {
  return options_.tiers[larder::Index(Tier::kNvme)].bytes > 0 && s_->nvme_writable &&
         WithinBudget(model);
}

// A block of a finished conversation is written only if somebody flushes it or something that
// goes on is below it.
bool Cache::WorthWriting(const TreeBlock& block) const { return !policy_->IsFinished(block.rank); }

void Cache::Clean() {
  Section section(*this);
  for (Hop& hop : s_->hops) hop.refused = false;
}

void Cache::CleanLocked() {
  if (gpu_lost_) FailLostFlushes();
  for (const auto& [id, flush] : s_->flushes) {
    const Lease& lease = *flush->lease;
    if (lease.end() == 0) continue;
    WriteDown(*lease.model, lease.model->tree.Resolve(lease.cursor).node, lease.end(),
              MoveClass::kWaiting);
  }
  for (const auto& model : s_->models) {
    WriteBehind(*model);
    CleanGpu(*model);
    CleanHost(*model);
  }
}

// What nobody reads goes from a device that is lost, in turns, as rule 6 of README.md asks.
void Cache::DropLostGpu(ModelState& model) {
  int left = 512;
  while (left > 0 && MakeRoom(model, Tier::kGpu, /*drop_dirty=*/true)) --left;
}

void Cache::CleanGpu(ModelState& model) {
  if (gpu_lost_) return DropLostGpu(model);
  const SlotAllocator& slots = s_->tiers[larder::Index(Tier::kGpu)].slots;
  const SlotAllocator::Pool pool = model.pool[larder::Index(Tier::kGpu)];
  const uint64_t low = LowWaterSlots(model, Tier::kGpu);
  Hop& hop = HopOf(Tier::kGpu, Tier::kHost);
  while (slots.free(pool) + model.leaving_gpu < low) {
    TreeNode* node = model.tree.Victim(kGpuSet);
    if (node == nullptr) return;
    if (node->blocks[node->count[kGpuSet] - 1].In(Tier::kHost) ||
        options_.tiers[larder::Index(Tier::kHost)].bytes == 0) {
      DropCopy(model, node, node->count[kGpuSet] - 1, Tier::kGpu);
      model.tree.Trim(node);
      continue;
    }
    // The leaf and the blocks before it that are as old: one run of copies.
    if (hop.refused || hop.background >= options_.background_moves_max) return;
    const uint64_t wanted =
        std::min<uint64_t>({low - slots.free(pool) - model.leaving_gpu, HiRadixTree::kNodeBlocksMax,
                            options_.background_moves_max - hop.background});
    std::vector<Slot> targets;
    while (targets.size() < wanted) {
      const Slot slot = TakeSlot(model, Tier::kHost, /*drop_dirty=*/false);
      if (!slot) break;
      targets.push_back(slot);
    }
    node = model.tree.Victim(kGpuSet);
    uint32_t started = 0;
    if (node != nullptr) {
      const uint64_t rank = node->blocks[node->count[kGpuSet] - 1].rank;
      for (uint32_t i = node->count[kGpuSet]; i > 0 && !targets.empty(); --i) {
        TreeBlock& block = node->blocks[i - 1];
        if (block.rank != rank || block.pins[larder::Index(Tier::kGpu)] != 0) break;
        if (block.In(Tier::kHost) || FindMove(block, Tier::kHost) != nullptr) continue;
        StartMove(model, node, i - 1, {Tier::kGpu, block.In(Tier::kGpu)},
                  {Tier::kHost, targets.back()}, MoveClass::kBackground);
        block.in_transit = true;
        targets.pop_back();
        started += 1;
      }
    }
    for (Slot slot : targets) s_->tiers[larder::Index(Tier::kHost)].slots.Give(slot);
    if (started == 0) return;
  }
}

void Cache::CleanHost(ModelState& model) {
  const SlotAllocator& slots = s_->tiers[larder::Index(Tier::kHost)].slots;
  const SlotAllocator::Pool pool = model.pool[larder::Index(Tier::kHost)];
  while (BelowLowWater(model, Tier::kHost)) {
    // What GPU has too, or is about to have, goes before anything that is only here, even
    // where a lease still pins it: otherwise every block that goes up would push one out.
    const uint64_t soon_free = slots.free(pool) + model.tree.mirrors() +
                               model.arriving[larder::Index(Tier::kGpu)];
    const bool enough_mirrors = soon_free >= LowWaterSlots(model, Tier::kHost);
    if (!(enough_mirrors ? DropMirror(model) : MakeRoom(model, Tier::kHost, false))) return;
  }
}

// Works off the list of nodes with HOST blocks that are not on NVME.
void Cache::WriteBehind(ModelState& model) {
  if (!NvmeUsable(model)) return;
  while (TreeNode* node = model.tree.First(HiRadixTree::kDirtyList)) {
    model.tree.Delist(HiRadixTree::kDirtyList, node);
    uint32_t last = node->count[kMemorySet];
    // A finished tail stays; a touch puts the node on the list again.
    while (last > 0 && (!node->blocks[last - 1].In(Tier::kHost) ||
                        !WorthWriting(node->blocks[last - 1]))) {
      --last;
    }
    if (last == 0) continue;
    Cursor cursor;
    model.tree.Bind(cursor, {node, node->begin + last});
    const Progress progress =
        WriteDown(model, node, node->begin + last, MoveClass::kBackground);
    node = model.tree.Resolve(cursor).node;
    model.tree.Unbind(cursor);
    if (progress != Progress::kBlocked) continue;
    model.tree.Enlist(HiRadixTree::kDirtyList, node);
    return;
  }
}

// Starts writing every block up to `end` (in `node`) that is not on NVME, ancestors first.
Cache::Progress Cache::WriteDown(ModelState& model, TreeNode* node, uint32_t end,
                                 MoveClass move_class) {
  // 1. Up to the first ancestor that is written whole.
  // 2. Down again, a node at a time, as far as the path goes on.
  Cursor cursor;
  model.tree.Bind(cursor, {node, end});
  uint32_t from = end;
  for (TreeNode* at = model.tree.Resolve(cursor).node; at->parent != nullptr; at = at->parent) {
    from = at->begin + Written(at);
    if (at->written > 0) break;
  }
  Progress progress = Progress::kDone;
  bool waiting = false;
  while (progress != Progress::kBlocked) {
    TreeNode* at = model.tree.Resolve(cursor).node;
    end = std::min(end, at->end());  // making room may have taken the path's own tail
    if (from >= end) break;
    while (from < at->begin) at = at->parent;
    const uint32_t stop = std::min(end, at->end());
    progress = WriteNode(model, at, from, stop, move_class, &waiting);
    from = stop;
  }
  model.tree.Unbind(cursor);
  return progress == Progress::kDone && waiting ? Progress::kWaiting : progress;
}

// How many leading blocks of the node are durable or being written. The index may have
// evicted what we last thought was.
uint32_t Cache::Written(TreeNode* node) const {
  while (node->written > 0) {
    const TreeBlock& block = node->blocks[node->written - 1];
    if (Durable(block) || FindMove(block, Tier::kNvme) != nullptr) break;
    node->written -= 1;
  }
  return node->written;
}

// Blocks [from, end) of the path, all in `node`. `*waiting` once a block must first come
// down from GPU: then later ones are only copied, not written, since they may not overtake.
Cache::Progress Cache::WriteNode(ModelState& model, TreeNode* node, uint32_t from, uint32_t end,
                                 MoveClass move_class, bool* waiting) {
  Cursor cursor;
  model.tree.Bind(cursor, {node, end});
  Progress progress = Progress::kDone;
  for (uint32_t at = from; at < end && progress == Progress::kDone; ++at) {
    node = model.tree.Resolve(cursor).node;  // taking slots may have reshaped the tree
    if (at >= node->end()) break;            // or taken its tail
    const uint32_t index = at - node->begin;
    const TreeBlock& block = node->blocks[index];
    if (Durable(block) || FindMove(block, Tier::kNvme) != nullptr) {
      if (!*waiting && node->written == index) node->written = index + 1;
    } else if (block.In(Tier::kHost)) {
      if (!*waiting) progress = WriteBlock(model, node, index, move_class);
    } else {
      *waiting = true;
      progress = BringDown(model, cursor, at, move_class);
    }
  }
  node = model.tree.Resolve(cursor).node;
  if (node->written == node->size()) {
    // What hangs below could not go before this; now it can.
    for (const auto& [hash, first] : node->children) {
      for (TreeNode* c = first; c != nullptr; c = c->next_same_hash) {
        if (c->written < c->count[kMemorySet]) model.tree.Enlist(HiRadixTree::kDirtyList, c);
      }
    }
  }
  model.tree.Unbind(cursor);
  return progress;
}

// Whether one more move down may be under way. A flush of a long path goes on when one of its
// moves has ended, so that no hold of the mutex starts all of them.
bool Cache::MayStart(const Hop& hop, MoveClass move_class) const {
  if (hop.refused) return false;
  return move_class == MoveClass::kBackground
             ? hop.background < options_.background_moves_max
             : hop.in_flight - hop.background < options_.flush_moves_max;
}

// One HOST block to NVME; the block before it is durable or on its way there.
Cache::Progress Cache::WriteBlock(ModelState& model, TreeNode* node, uint32_t index,
                                  MoveClass move_class) {
  if (!MayStart(HopOf(Tier::kHost, Tier::kNvme), move_class)) return Progress::kBlocked;
  Slot parent;
  const TreeNode* before_node = index > 0 ? node : node->parent;
  if (before_node->parent != nullptr) {
    const TreeBlock& before = before_node->blocks[index > 0 ? index - 1 : before_node->size() - 1];
    parent = Durable(before) ? before.In(Tier::kNvme) : FindMove(before, Tier::kNvme)->to.slot;
  }
  TreeBlock& block = node->blocks[index];
  const BlockKey key = KeyAt(model, node, node->begin + index + 1);
  if (const Slot known = s_->nvme.Find(key, parent)) {
    // It was written before, and forgotten here.
    if (block.In(Tier::kNvme)) model.tree.Detach(node, index, Tier::kNvme);  // a stale one
    model.tree.Attach(node, index, Tier::kNvme, known);
    block.nvme_tag = key.Tag();
    s_->nvme.Touch(known);
    s_->nvme.SetInMemory(known, true);
  } else {
    if (!WithinBudget(model)) return Progress::kBlocked;
    SlotAllocator& slots = s_->tiers[2].slots;
    if (slots.free(model.pool[2]) == 0) ReclaimSlab(model, Tier::kNvme);
    const Slot slot = s_->nvme.Claim(model.pool[2], key, parent);
    if (!slot) return Progress::kBlocked;
    // Evicted for this very block: its record is about to be overwritten, which costs less.
    std::erase_if(s_->erases, [slot](const auto& erase) { return erase.first == slot; });
    s_->nvme_writes.Take(model.model.WholeBlockBytes(), clock_.Now());
    StartMove(model, node, index, {Tier::kHost, block.In(Tier::kHost)}, {Tier::kNvme, slot},
              move_class);
  }
  if (node->written == index) node->written = index + 1;
  return Progress::kDone;
}

// One GPU block to HOST, on its way to NVME. Its commit puts the node on the dirty list.
Cache::Progress Cache::BringDown(ModelState& model, const Cursor& cursor, uint32_t position,
                                 MoveClass move_class) {
  const auto block_at = [&]() -> std::pair<TreeNode*, uint32_t> {
    TreeNode* node = model.tree.Resolve(cursor).node;
    return {node, position - node->begin};
  };
  auto [node, index] = block_at();
  if (!node->blocks[index].In(Tier::kGpu)) return Progress::kBlocked;  // lost, or NVME only
  if (FindMove(node->blocks[index], Tier::kHost) != nullptr) return Progress::kDone;
  const Hop& hop = HopOf(Tier::kGpu, Tier::kHost);
  // It could go no further.
  if (!WithinBudget(model) || !s_->nvme.MayClaim(model.pool[2])) return Progress::kBlocked;
  if (!MayStart(hop, move_class)) return Progress::kBlocked;
  Slot slot = TakeSlot(model, Tier::kHost, /*drop_dirty=*/false);
  if (!slot && hop.in_flight == 0 && HopOf(Tier::kHost, Tier::kNvme).in_flight == 0) {
    // HOST is full of blocks that wait for this ancestor to be written first, and nothing
    // under way will change that: the coldest of them is given up.
    slot = TakeSlot(model, Tier::kHost, /*drop_dirty=*/true);
  }
  if (!slot) return Progress::kBlocked;
  std::tie(node, index) = block_at();
  node->blocks[index].in_transit = true;
  StartMove(model, node, index, {Tier::kGpu, node->blocks[index].In(Tier::kGpu)},
            {Tier::kHost, slot}, move_class);
  return Progress::kDone;
}

}  // namespace larder
