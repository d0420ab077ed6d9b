// Walks over a whole tree: for tests, statistics and the destructor.
#include "server/cache/hi_radix_tree.h"

#include "storage/check.h"

namespace larder {

void HiRadixTree::ForEachNode(const std::function<void(TreeNode*)>& f) const {
  std::vector<TreeNode*> todo = {root_};
  while (!todo.empty()) {
    TreeNode* node = todo.back();
    todo.pop_back();
    for (const auto& [hash, first] : node->children) {
      for (TreeNode* child = first; child != nullptr; child = child->next_same_hash) {
        todo.push_back(child);
      }
    }
    if (node != root_) f(node);
  }
}

uint64_t HiRadixTree::memory_bytes() const {
  uint64_t bytes = sizeof(*this);
  for (const LeafHeap& heap : heaps_) bytes += heap.capacity() * sizeof(LeafHeap::Entry);
  const auto add = [&](const TreeNode* node) {
    bytes += sizeof(*node) + node->blocks.capacity() * sizeof(TreeBlock);
    bytes += (node->tokens.capacity() - node->tokens.size()) * sizeof(uint32_t);
    // A B-tree node of 16-byte values is about 256 bytes and at least half full.
    bytes += node->children.size() * 32;
  };
  add(root_);
  ForEachNode(add);
  return bytes;
}

void HiRadixTree::CheckInvariants() const {
  uint64_t nodes = 0;
  uint64_t blocks = 0;
  uint64_t all_mirrors = 0;
  ForEachNode([&](TreeNode* node) {
    nodes += 1;
    blocks += node->size();
    // 1 and 5.
    LARDER_CHECK(node->size() > 0 && node->size() <= kNodeBlocksMax);
    LARDER_CHECK(node->tokens.size() == uint64_t{node->size()} * block_tokens_);
    LARDER_CHECK(node->begin == node->parent->end());
    LARDER_CHECK(FindChild(node->parent, node->tokens.data()) == node);
    // 2.
    uint32_t mirrors = 0;
    for (uint32_t i = 0; i < node->size(); ++i) {
      const TreeBlock& block = node->blocks[i];
      LARDER_CHECK(static_cast<bool>(block.In(Tier::kGpu)) == (i < node->count[kGpuSet]));
      LARDER_CHECK(block.InMemory() == (i < node->count[kMemorySet]));
      for (Tier tier : {Tier::kGpu, Tier::kHost}) {
        LARDER_CHECK(block.In(tier) || block.pins[Index(tier)] == 0);
      }
      if (block.slot[0] && block.slot[1]) mirrors += 1;
    }
    LARDER_CHECK(mirrors == node->mirrors);
    all_mirrors += mirrors;
    for (int set = 0; set < kBlockSetCount; ++set) {
      uint32_t children = 0;
      for (const auto& [hash, first] : node->children) {
        for (TreeNode* c = first; c != nullptr; c = c->next_same_hash) children += c->count[set] > 0;
      }
      LARDER_CHECK(children == node->children_in[set]);
      LARDER_CHECK(node->count[set] == 0 || node->parent == root_ ||
                   node->parent->count[set] == node->parent->size());
      // 4.
      const BlockSet s = static_cast<BlockSet>(set);
      if (IsCandidate(node, s)) {
        LARDER_CHECK(heaps_[set].Contains(node));
        LARDER_CHECK(heaps_[set].RankOf(node) <= CandidateRank(node, s));
      }
    }
    // 3.
    LARDER_CHECK(node->blocks.back().InMemory() || node->blocks.back().Pinned() ||
                 !node->children.empty());
    LARDER_CHECK(node->written <= node->size() && node->hashed <= node->size());
    for (Cursor* c = node->cursors; c != nullptr; c = c->next) {
      LARDER_CHECK(c->node == node && c->end <= node->end());
    }
  });
  LARDER_CHECK(nodes == nodes_ && blocks == blocks_ && all_mirrors == mirrors_);
}

}  // namespace larder
