// Fair shares: how a model that came late gets its part of a full tier.
#include <algorithm>

#include "absl/container/flat_hash_map.h"
#include "server/cache/cache_state.h"
#include "storage/check.h"

namespace larder {
namespace {

// A slab that takes more blocks with it than these stays: it holds what very many paths begin
// with. One search looks at twice as many blocks, so its work is that of a slab, not of a tree.
uint64_t DoomedMax(const SlotAllocator& slots, SlotAllocator::Pool pool) {
  return std::max<uint64_t>(4096, 4 * slots.slab_bytes() / slots.stride(pool));
}

// Blocks [from, size) of the node lie in a slab that is to be emptied, or below such blocks.
struct Doomed {
  TreeNode* node;
  uint32_t from;
};

// What emptying a slab takes from a tree: the blocks in it and all that is below them.
class Doom {
 public:
  explicit Doom(uint64_t visits) : visits_(visits) {}
  uint64_t visits_left() const { return visits_; }
  bool Has(TreeNode* node) const { return from_.contains(node); }

  // Adds blocks [from, size) of the node and everything below. False when some of it is
  // pinned, or no visits are left.
  bool Add(TreeNode* node, uint32_t from) {
    std::vector<Doomed> todo = {{node, from}};
    while (!todo.empty()) {
      const Doomed next = todo.back();
      todo.pop_back();
      const auto [known, added] = from_.try_emplace(next.node, next.node->size());
      for (; known->second > next.from; --known->second) {
        if (visits_ == 0 || next.node->blocks[known->second - 1].Pinned()) return false;
        visits_ -= 1;
      }
      if (!added) continue;
      order_.push_back(next.node);
      for (const auto& [hash, first] : next.node->children) {
        for (TreeNode* c = first; c != nullptr; c = c->next_same_hash) todo.push_back({c, 0});
        if (todo.size() > visits_) return false;  // each of them is a visit at least
      }
    }
    return true;
  }

  // Parents before children.
  std::vector<Doomed> Take() const {
    std::vector<Doomed> all;
    for (TreeNode* node : order_) all.push_back({node, from_.at(node)});
    std::stable_sort(all.begin(), all.end(), [](const Doomed& a, const Doomed& b) {
      return a.node->begin < b.node->begin;
    });
    return all;
  }

 private:
  uint64_t visits_;
  absl::flat_hash_map<TreeNode*, uint32_t> from_;
  std::vector<TreeNode*> order_;  // as they were added, so that every run does the same
};

// Nothing when the slab cannot be emptied, because something there is pinned or not the
// tree's, or because too much hangs on it.
std::vector<Doomed> DoomedBy(const SlotOwners& owners, const SlotAllocator& slots, Tier tier,
                             uint32_t slab, uint64_t doomed_max, uint64_t* visits) {
  const std::span<TreeNode* const> in_slab = owners.In(slab);
  const auto owned = std::count_if(in_slab.begin(), in_slab.end(), [](auto* n) { return n; });
  *visits += in_slab.size() / 16;  // a read of 8 bytes each
  if (static_cast<uint64_t>(owned) != slots.taken_in_slab(slab)) return {};
  Doom doom(doomed_max);
  const uint64_t base = slab * slots.slab_bytes();
  bool may_go = true;
  for (TreeNode* node : in_slab) {
    if (node == nullptr || doom.Has(node)) continue;  // had, or below one that was
    const auto first = std::find_if(node->blocks.begin(), node->blocks.end(), [&](const auto& b) {
      return b.In(tier) && b.In(tier).offset() - base < slots.slab_bytes();
    });
    may_go = doom.Add(node, static_cast<uint32_t>(first - node->blocks.begin()));
    if (!may_go) break;
  }
  *visits += doomed_max - doom.visits_left();
  return may_go ? doom.Take() : std::vector<Doomed>();
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

// Takes a slab from a richer model. The search goes on where the last one stopped; once it has
// been round in vain, it is not worth another before somebody lets go of something.
bool Cache::ReclaimSlab(ModelState& model, Tier tier) {
  ModelState* const richer = RicherModel(model, tier);
  if (richer == nullptr) return false;
  State::TierState& state = s_->tiers[larder::Index(tier)];
  const SlotAllocator& slots = state.slots;
  const SlotAllocator::Pool pool = richer->pool[larder::Index(tier)];
  if (tier == Tier::kNvme) return s_->nvme.ReclaimSlab(pool);
  if (state.reclaim_let_go != s_->let_go) state.reclaim_in_vain = 0;
  state.reclaim_let_go = s_->let_go;
  const uint64_t doomed_max = DoomedMax(slots, pool);
  uint64_t visits = 0;
  while (state.reclaim_in_vain < slots.slab_count() && visits < 2 * doomed_max) {
    state.reclaim_in_vain += 1;
    const uint32_t slab = state.reclaim_next++ % slots.slab_count();
    if (!slots.SlabIsOf(slab, pool) || !slots.Fits(slab, model.pool[larder::Index(tier)])) {
      continue;
    }
    const std::vector<Doomed> doomed = DoomedBy(state.owners, slots, tier, slab, doomed_max, &visits);
    if (doomed.empty()) continue;
    // Trimming removes and joins nodes; cursors keep their place.
    std::vector<Cursor> cursors(doomed.size());
    for (size_t at = doomed.size(); at > 0; --at) {
      TreeNode* const node = doomed[at - 1].node;
      for (uint32_t index = node->count[kMemorySet]; index > doomed[at - 1].from; --index) {
        for (Tier each : {Tier::kGpu, Tier::kHost}) {
          if (node->blocks[index - 1].In(each)) DropCopy(*richer, node, index - 1, each);
        }
      }
      richer->tree.Bind(cursors[at - 1], {node, node->begin});
    }
    for (size_t at = doomed.size(); at > 0; --at) {
      Cursor& cursor = cursors[at - 1];
      if (cursor.node != richer->tree.root()) richer->tree.Trim(cursor.node);
      richer->tree.Unbind(cursor);
    }
    LARDER_CHECK(slots.slabs_free() > 0);
    state.reclaim_in_vain = 0;
    return true;
  }
  return false;
}

}  // namespace larder
