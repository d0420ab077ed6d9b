// Fair shares: how a model that came late gets its part of a full tier.
#include <algorithm>

#include "server/cache/cache_state.h"
#include "storage/check.h"

namespace larder {
namespace {

// Blocks [from, size) of the node lie in a slab that is to be emptied, or below such blocks.
struct Doomed {
  TreeNode* node;
  uint32_t from;
};

void ForEachChild(const TreeNode* node, const std::function<void(TreeNode*)>& f) {
  for (const auto& [hash, first] : node->children) {
    for (TreeNode* child = first; child != nullptr; child = child->next_same_hash) f(child);
  }
}

// What emptying `slab` of `tier` takes from the tree, parents before children; nothing when
// the slab cannot be emptied, because something there is pinned or not the tree's.
std::vector<Doomed> DoomedBy(HiRadixTree& tree, const SlotAllocator& slots, Tier tier,
                             uint32_t slab) {
  std::vector<Doomed> order = {{tree.root(), 0}};
  uint32_t in_slab = 0;
  for (size_t at = 0; at < order.size(); ++at) {
    TreeNode* node = order[at].node;
    const auto here = [&](uint32_t i) {
      const Slot slot = node->blocks[i].In(tier);
      return slot && slots.Locate(slot).slab == slab;
    };
    uint32_t& from = order[at].from;  // size or less: an ancestor is doomed
    const bool inherited = node != tree.root() && from == 0;
    if (!inherited) from = 0;
    while (!inherited && from < node->size() && !here(from)) ++from;
    for (uint32_t i = from; i < node->size(); ++i) {
      if (node->blocks[i].Pinned()) return {};
      in_slab += here(i);
    }
    const uint32_t child_from = node != tree.root() && from < node->size() ? 0 : UINT32_MAX;
    ForEachChild(node, [&](TreeNode* child) { order.push_back({child, child_from}); });
  }
  if (in_slab != slots.taken_in_slab(slab)) return {};
  std::erase_if(order, [&](const Doomed& d) {
    return d.node == tree.root() || d.from >= d.node->size();
  });
  return order;
}

}  // namespace

// Whom a model with less than its fair share of slabs may take one from; null: nobody.
Cache::ModelState* Cache::RicherModel(const ModelState& model, Tier tier) const {
  const SlotAllocator& slots = s_->tiers[larder::Index(tier)].slots;
  const auto slabs_of = [&](const ModelState& m) {
    return slots.slabs(m.pool[larder::Index(tier)]);
  };
  const uint32_t share = std::max<uint32_t>(
      1, slots.slab_count() / static_cast<uint32_t>(s_->models.size()));
  if (slots.free(model.pool[larder::Index(tier)]) > 0 || slabs_of(model) >= share) return nullptr;
  const auto richest = std::max_element(
      s_->models.begin(), s_->models.end(),
      [&](const auto& a, const auto& b) { return slabs_of(*a) < slabs_of(*b); });
  return slabs_of(**richest) > share ? richest->get() : nullptr;
}

// Takes a slab from a richer model. Rare: it walks that model's tree, under the mutex.
bool Cache::ReclaimSlab(ModelState& model, Tier tier) {
  ModelState* const richer = RicherModel(model, tier);
  if (richer == nullptr) return false;
  ModelState& rich = *richer;
  SlotAllocator& slots = s_->tiers[larder::Index(tier)].slots;
  const SlotAllocator::Pool pool = rich.pool[larder::Index(tier)];
  if (tier == Tier::kNvme) return s_->nvme.ReclaimSlab(pool);
  for (uint32_t slab = 0; slab < slots.slab_count(); ++slab) {
    if (!slots.SlabIsOf(slab, pool) || !slots.Fits(slab, model.pool[larder::Index(tier)])) {
      continue;
    }
    const std::vector<Doomed> doomed = DoomedBy(rich.tree, slots, tier, slab);
    if (doomed.empty()) continue;
    std::vector<TreeNode*> nodes;
    for (auto it = doomed.rbegin(); it != doomed.rend(); ++it) {
      for (uint32_t i = it->node->count[kMemorySet]; i > it->from; --i) {
        for (Tier each : {Tier::kGpu, Tier::kHost}) {
          if (it->node->blocks[i - 1].In(each)) DropCopy(rich, it->node, i - 1, each);
        }
      }
      nodes.push_back(it->node);
    }
    // Trimming removes and joins nodes; cursors keep their place.
    std::vector<Cursor> cursors(nodes.size());
    for (size_t i = 0; i < nodes.size(); ++i) {
      rich.tree.Bind(cursors[i], {nodes[i], nodes[i]->begin});
    }
    for (Cursor& cursor : cursors) {
      if (cursor.node != rich.tree.root()) rich.tree.Trim(cursor.node);
      rich.tree.Unbind(cursor);
    }
    LARDER_CHECK(slots.slabs_free() > 0);
    return true;
  }
  return false;
}

}  // namespace larder
