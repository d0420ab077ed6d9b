#include "server/cache/leaf_heap.h"

#include "server/cache/hi_radix_tree.h"
#include "storage/check.h"

namespace larder {

bool LeafHeap::Contains(const TreeNode* node) const { return node->heap_position[set_] != 0; }

uint64_t LeafHeap::RankOf(const TreeNode* node) const {
  return entries_[node->heap_position[set_] - 1].rank;
}

void LeafHeap::Place(size_t at, Entry entry) {
  entries_[at] = entry;
  entry.node->heap_position[set_] = static_cast<uint32_t>(at + 1);
}

void LeafHeap::Up(size_t at) {
  const Entry entry = entries_[at];
  while (at > 0 && entries_[(at - 1) / 2].rank > entry.rank) {
    Place(at, entries_[(at - 1) / 2]);
    at = (at - 1) / 2;
  }
  Place(at, entry);
}

void LeafHeap::Down(size_t at) {
  const Entry entry = entries_[at];
  while (true) {
    size_t child = 2 * at + 1;
    if (child >= entries_.size()) break;
    if (child + 1 < entries_.size() && entries_[child + 1].rank < entries_[child].rank) ++child;
    if (entries_[child].rank >= entry.rank) break;
    Place(at, entries_[child]);
    at = child;
  }
  Place(at, entry);
}

void LeafHeap::Push(TreeNode* node, uint64_t rank) {
  LARDER_CHECK(!Contains(node));
  entries_.push_back({rank, node});
  Up(entries_.size() - 1);
}

void LeafHeap::Update(TreeNode* node, uint64_t rank) {
  const size_t at = node->heap_position[set_] - 1;
  const bool up = rank < entries_[at].rank;
  entries_[at].rank = rank;
  up ? Up(at) : Down(at);
}

void LeafHeap::Remove(TreeNode* node) {
  const size_t at = node->heap_position[set_] - 1;
  const Entry last = entries_.back();
  entries_.pop_back();
  node->heap_position[set_] = 0;
  if (last.node == node) return;
  const bool up = last.rank < entries_[at].rank;
  Place(at, last);
  up ? Up(at) : Down(at);
}

}  // namespace larder
