// LeafHeap: nodes of a tree ordered by the rank of the block that would go first.
//
// A binary heap in which every node knows its place, so that any node leaves or moves in
// O(log n). Ranks may be stale, but only too small: whoever takes the top looks at the
// block and puts the node where it belongs.
//
// Thread safety: none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace larder {

struct TreeNode;

class LeafHeap {
 public:
  struct Entry {
    uint64_t rank;
    TreeNode* node;
  };

  // `set` tells which of a node's heap positions this heap keeps.
  explicit LeafHeap(int set) : set_(set) {}

  bool empty() const { return entries_.empty(); }
  size_t size() const { return entries_.size(); }
  size_t capacity() const { return entries_.capacity(); }
  const Entry& top() const { return entries_.front(); }
  bool Contains(const TreeNode* node) const;
  uint64_t RankOf(const TreeNode* node) const;
  // CHECK: not in it.
  void Push(TreeNode* node, uint64_t rank);
  void Update(TreeNode* node, uint64_t rank);
  void Remove(TreeNode* node);

 private:
  void Place(size_t at, Entry entry);
  void Up(size_t at);
  void Down(size_t at);

  const int set_;
  std::vector<Entry> entries_;
};

}  // namespace larder
