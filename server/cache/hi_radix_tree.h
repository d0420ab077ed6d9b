// HiRadixTree: token prefixes of one model, and in which slots their blocks lie.
//
//   root
//    |
//   [A B C D]              GPU  12 7 3 9     HOST  4 . . 8       one slot a block and tier
//    |       \                                                   ('.': not there)
//   [E F]     [G H I]      GPU  . .          HOST  5 6           siblings differ in their
//                                                                first block
//
// A node is a run of whole blocks. A split cuts it in two where paths diverge; the existing
// object stays the lower part, so whoever points at it points at or below where it was:
//
//   [A B C D]  + A B X  ->  [A B] - [C D]      (the object that was [A B C D] is now [C D])
//                               \ - [X]
//
// Thread safety: none; the cache locks. Deterministic; allocates nothing on a match.
//
// Invariants:
//   1. Children of a node differ in their first block; a node but the root has a block.
//   2. GPU copies are prefix-closed: in a node they are its first count[kGpuSet] blocks, and
//      a node has some only when its parent has all. The same for GPU-or-HOST (kMemorySet).
//   3. A block in neither tier is here only while it is pinned on NVME or has such blocks
//      below it.
//   4. An unpinned last block of a set with no block of the set below it is in that set's
//      heap, with a rank that is at most its own.
//   5. A node holds at most kNodeBlocksMax blocks, which bounds the cost of a split.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/inlined_vector.h"
#include "server/cache/leaf_heap.h"
#include "server/cache/slot_owners.h"
#include "storage/types.h"

namespace larder {

// The two prefix-closed sets of rule 2.
enum BlockSet : int { kGpuSet = 0, kMemorySet = 1 };
inline constexpr int kBlockSetCount = 2;

struct TreeBlock {
  std::array<Slot, kTierCount> slot;          // empty: no copy there
  std::array<uint32_t, kTierCount> pins = {}; // leases and moves that need this copy
  uint32_t nvme_tag = 0;                      // the tag of its key, with slot[NVME]
  bool in_transit = false;  // copied to HOST to leave GPU, or to be written to NVME
  uint64_t rank = 0;                          // EvictionPolicy's

  Slot In(Tier tier) const { return slot[Index(tier)]; }
  bool InMemory() const { return slot[0] || slot[1]; }
  bool Pinned() const { return pins[0] != 0 || pins[1] != 0 || pins[2] != 0; }
};

struct TreeNode;

// A position on a path, kept valid through splits, merges and removals: `node` is the node
// that holds block end - 1, or one below it. Intrusive; it must outlive no tree.
struct Cursor {
  TreeNode* node = nullptr;
  uint32_t end = 0;
  Cursor* previous = nullptr;
  Cursor* next = nullptr;
};

// A path from the root: `node` holds block end - 1, or is the root when end is 0.
struct TreePosition {
  TreeNode* node = nullptr;
  uint32_t end = 0;
};

struct TreeNode {
  TreeNode* parent = nullptr;
  uint32_t begin = 0;  // blocks before this node on its path
  std::array<uint32_t, kBlockSetCount> count = {};          // leading blocks in the set
  std::array<uint32_t, kBlockSetCount> children_in = {};    // children with count > 0
  std::array<uint32_t, kBlockSetCount> heap_position = {};  // LeafHeap's; 0: not in it
  std::vector<uint32_t> tokens;
  std::vector<TreeBlock> blocks;
  absl::btree_map<uint64_t, TreeNode*> children;  // by hash of the first block
  TreeNode* next_same_hash = nullptr;             // siblings whose first blocks collide
  uint64_t first_hash = 0;
  uint64_t hits = 0;
  Cursor* cursors = nullptr;

  // Blocks [0, hashed) have been hashed; `key` is the key of block hashed - 1.
  uint32_t hashed = 0;
  BlockKey key;
  // Blocks [0, written) were durable, or being written, when last looked at.
  uint32_t written = 0;

  uint32_t mirrors = 0;       // blocks both in GPU and HOST
  uint32_t mirror_scan = 0;   // none to drop at or above this index
  TreeNode* list_previous[2] = {};  // of HiRadixTree's two lists
  TreeNode* list_next[2] = {};
  bool listed[2] = {};

  uint32_t size() const { return static_cast<uint32_t>(blocks.size()); }
  uint32_t end() const { return begin + size(); }
};

// Part of a path: blocks [begin, end) of a node, by index in the node.
struct PathPart {
  TreeNode* node;
  uint32_t begin;
  uint32_t end;
};
using Path = absl::InlinedVector<PathPart, 16>;

class HiRadixTree {
 public:
  static constexpr uint32_t kNodeBlocksMax = 1024;

  // Nodes with copies the cache may want to look at, first come first served.
  enum List : int { kMirrorList = 0, kDirtyList = 1 };

  // `owners`, of GPU and HOST, are told which node holds a slot's block; null: nobody is.
  explicit HiRadixTree(uint32_t block_tokens, std::array<SlotOwners*, 2> owners = {});
  ~HiRadixTree();
  HiRadixTree(const HiRadixTree&) = delete;
  HiRadixTree& operator=(const HiRadixTree&) = delete;

  using Position = TreePosition;

  TreeNode* root() { return root_; }
  Position Start() { return {root_, 0}; }
  // The longest path of whole blocks below `from` that spells `tokens`.
  Position Match(Position from, std::span<const uint32_t> tokens) const;
  // The parts of the path to `position` that lie in blocks [begin, position.end), in order.
  Path PathTo(Position position, uint32_t begin) const;

  // Makes the blocks of `tokens` part of the path below `from`, which must not continue with
  // the first of them. New blocks have no slots: Attach them, in order.
  Position Append(Position from, std::span<const uint32_t> tokens);

  // Puts the block's copy into its tier. CHECK: rule 2 allows it and it has none there.
  void Attach(TreeNode* node, uint32_t index, Tier tier, Slot slot);
  // Takes it out again. CHECK: rule 2 allows it.
  Slot Detach(TreeNode* node, uint32_t index, Tier tier);

  void Pin(TreeNode* node, uint32_t index, Tier tier) { ++node->blocks[index].pins[Index(tier)]; }
  // Call Settle when a round of unpinning is over.
  void Unpin(TreeNode* node, uint32_t index, Tier tier) { --node->blocks[index].pins[Index(tier)]; }
  // Offers the node's leaves for eviction where they are free to go, and its mirrors.
  void Settle(TreeNode* node);
  // Removes trailing blocks that rule 3 no longer keeps, and the node itself when none is
  // left; then joins a parent that is left with one child. The node may be gone after it.
  void Trim(TreeNode* node);

  // The last block of `set` that the policy wants gone first: its node, or null when
  // nothing can go. The block's index is count[set] - 1. Never one that is in GPU for
  // kMemorySet.
  TreeNode* Victim(BlockSet set);
  // A rank was lowered, or a block of a set was taken away: the heaps follow.
  void Reorder(TreeNode* node);
  // An unpinned HOST copy of a block that is in GPU as well; {nullptr, 0} when there is none.
  // Without `transit_too`, one that is not on its way down.
  std::pair<TreeNode*, uint32_t> UnpinnedMirror(bool transit_too);

  void Enlist(List list, TreeNode* node);
  void Delist(List list, TreeNode* node);
  TreeNode* First(List list) const { return list_head_[list]; }

  // Cursors.
  void Bind(Cursor& cursor, Position position);
  void Unbind(Cursor& cursor);
  Position Resolve(const Cursor& cursor) const { return Above({cursor.node, cursor.end}); }
  // The position of `at.end`, where `at.node` may be below it.
  static Position Above(Position at);

  uint32_t block_tokens() const { return block_tokens_; }
  uint64_t nodes() const { return nodes_; }
  uint64_t blocks() const { return blocks_; }
  uint64_t mirrors() const { return mirrors_; }  // blocks both in GPU and HOST
  // Memory of the structure, without the tokens themselves.
  uint64_t memory_bytes() const;
  std::span<const uint32_t> TokensOf(const TreeNode* node, uint32_t index) const {
    return std::span(node->tokens).subspan(uint64_t{index} * block_tokens_, block_tokens_);
  }
  // A walk over the nodes that may stop and go on after the tree has changed: the node after
  // the one at `path` (empty: the first), parents before children; null at the end. `path`
  // holds first_hash of each node on the way, and follows; it need not exist any more. Of
  // siblings whose hashes collide it knows one.
  TreeNode* Next(std::vector<uint64_t>& path) const;
  void ForEachNode(const std::function<void(TreeNode*)>& f) const;
  // CHECKs rules 1 to 5.
  void CheckInvariants() const;

 private:
  TreeNode* FindChild(const TreeNode* node, const uint32_t* first_block) const;
  uint64_t Hash(const uint32_t* first_block) const;
  void LinkChild(TreeNode* parent, TreeNode* child);
  void UnlinkChild(TreeNode* child);
  uint32_t Compare(const TreeNode* node, uint32_t index, std::span<const uint32_t> tokens) const;
  void Split(TreeNode* node, uint32_t index);
  void Merge(TreeNode* parent);
  void SetCount(TreeNode* node, BlockSet set, uint32_t count);
  bool IsCandidate(const TreeNode* node, BlockSet set) const;
  uint64_t CandidateRank(const TreeNode* node, BlockSet set) const;
  void Offer(TreeNode* node, BlockSet set);
  void MoveCursors(TreeNode* from, TreeNode* to);
  void Own(Slot slot, Tier tier, TreeNode* node);
  // The node's blocks from `index` on have come from another node.
  void OwnBlocks(TreeNode* node, uint32_t index);
  void Delete(TreeNode* node);

  const uint32_t block_tokens_;
  const std::array<SlotOwners*, 2> owners_;
  TreeNode* root_;
  std::array<LeafHeap, kBlockSetCount> heaps_;
  std::array<TreeNode*, 2> list_head_ = {};
  std::array<TreeNode*, 2> list_tail_ = {};
  uint64_t nodes_ = 0;
  uint64_t blocks_ = 0;
  uint64_t mirrors_ = 0;
};

}  // namespace larder
