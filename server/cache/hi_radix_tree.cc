#include "server/cache/hi_radix_tree.h"

#include <algorithm>
#include <cstring>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "storage/check.h"

namespace larder {
namespace {

// Tokens compared by one memcmp before narrowing down to a block.
constexpr uint32_t kCompareTokens = 1024;

bool HasOnlyChild(const TreeNode* node) {
  return node->children.size() == 1 && node->children.begin()->second->next_same_hash == nullptr;
}

}  // namespace

HiRadixTree::HiRadixTree(uint32_t block_tokens, std::array<SlotOwners*, 2> owners)
    : block_tokens_(block_tokens),
      owners_(owners),
      root_(new TreeNode),
      heaps_{LeafHeap(kGpuSet), LeafHeap(kMemorySet)} {}

HiRadixTree::~HiRadixTree() {
  std::vector<TreeNode*> all;
  ForEachNode([&](TreeNode* node) { all.push_back(node); });
  for (TreeNode* node : all) delete node;
  delete root_;
}

uint64_t HiRadixTree::Hash(const uint32_t* first_block) const {
  return XXH3_64bits(first_block, uint64_t{block_tokens_} * sizeof(uint32_t));
}

// --- Matching ----------------------------------------------------------------------------

TreeNode* HiRadixTree::FindChild(const TreeNode* node, const uint32_t* first_block) const {
  const auto found = node->children.find(Hash(first_block));
  if (found == node->children.end()) return nullptr;
  for (TreeNode* child = found->second; child != nullptr; child = child->next_same_hash) {
    if (std::memcmp(child->tokens.data(), first_block, block_tokens_ * sizeof(uint32_t)) == 0) {
      return child;
    }
  }
  return nullptr;
}

// How many blocks of `tokens` equal those of the node from `index` on.
uint32_t HiRadixTree::Compare(const TreeNode* node, uint32_t index,
                              std::span<const uint32_t> tokens) const {
  const uint32_t blocks = static_cast<uint32_t>(
      std::min<uint64_t>(node->size() - index, tokens.size() / block_tokens_));
  const uint32_t* ours = node->tokens.data() + uint64_t{index} * block_tokens_;
  const auto equal = [&](uint32_t from, uint32_t count) {
    return std::memcmp(ours + uint64_t{from} * block_tokens_,
                       tokens.data() + uint64_t{from} * block_tokens_,
                       uint64_t{count} * block_tokens_ * sizeof(uint32_t)) == 0;
  };
  const uint32_t stride = std::max(1u, kCompareTokens / block_tokens_);
  uint32_t done = 0;
  while (done < blocks) {
    const uint32_t count = std::min(stride, blocks - done);
    if (!equal(done, count)) break;
    done += count;
  }
  while (done < blocks && equal(done, 1)) ++done;
  return done;
}

HiRadixTree::Position HiRadixTree::Match(Position from, std::span<const uint32_t> tokens) const {
  // 1. Follow the node we are in as far as it agrees.
  // 2. At its end, go to the child whose first block comes next.
  // 3. Stop where a node disagrees, no child fits, or less than a block is left.
  Position at = from;
  while (true) {
    const uint32_t index = at.end - at.node->begin;
    if (index < at.node->size()) {
      const uint32_t equal = Compare(at.node, index, tokens);
      at.end += equal;
      tokens = tokens.subspan(uint64_t{equal} * block_tokens_);
      if (at.end < at.node->end()) return at;
    }
    if (tokens.size() < block_tokens_) return at;
    TreeNode* child = FindChild(at.node, tokens.data());
    if (child == nullptr) return at;
    at.node = child;
  }
}

Path HiRadixTree::PathTo(Position position, uint32_t begin) const {
  Path path;
  uint32_t end = position.end;
  for (TreeNode* node = position.node; end > begin; node = node->parent) {
    const uint32_t from = std::max(begin, node->begin);
    path.push_back({node, from - node->begin, end - node->begin});
    end = from;
  }
  std::reverse(path.begin(), path.end());
  return path;
}

TreeNode* HiRadixTree::Next(std::vector<uint64_t>& path) const {
  // 1. Down the path as far as it still exists.
  // 2. From its end to the first child; else to the next sibling of the deepest node on it
  //    that has one.
  std::vector<TreeNode*> on_path = {root_};
  while (on_path.size() <= path.size()) {
    const auto& children = on_path.back()->children;
    const auto found = children.find(path[on_path.size() - 1]);
    if (found == children.end()) break;
    on_path.push_back(found->second);
  }
  const auto go = [&](size_t depth, const auto& child) {
    path.resize(depth);
    path.push_back(child->first);
    return child->second;
  };
  if (on_path.size() > path.size()) {
    const auto& children = on_path.back()->children;
    if (!children.empty()) return go(path.size(), children.begin());
    on_path.pop_back();
  }
  for (size_t depth = on_path.size(); depth > 0; --depth) {
    const auto& children = on_path[depth - 1]->children;
    const auto next = children.upper_bound(path[depth - 1]);
    if (next != children.end()) return go(depth - 1, next);
  }
  return nullptr;
}

// --- Growing -----------------------------------------------------------------------------

void HiRadixTree::LinkChild(TreeNode* parent, TreeNode* child) {
  TreeNode*& head = parent->children[child->first_hash];
  child->next_same_hash = head;
  head = child;
  child->parent = parent;
}

void HiRadixTree::UnlinkChild(TreeNode* child) {
  const auto found = child->parent->children.find(child->first_hash);
  TreeNode** at = &found->second;
  while (*at != child) at = &(*at)->next_same_hash;
  *at = child->next_same_hash;
  if (found->second == nullptr) child->parent->children.erase(found);
}

// Cuts the first `index` blocks off into a new node above.
void HiRadixTree::Split(TreeNode* node, uint32_t index) {
  TreeNode* upper = new TreeNode;
  nodes_ += 1;
  const auto token_cut = node->tokens.begin() + uint64_t{index} * block_tokens_;
  upper->tokens.assign(node->tokens.begin(), token_cut);
  upper->blocks.assign(node->blocks.begin(), node->blocks.begin() + index);
  upper->begin = node->begin;
  upper->first_hash = node->first_hash;
  upper->hits = node->hits;
  UnlinkChild(node);
  LinkChild(node->parent, upper);

  node->tokens.erase(node->tokens.begin(), token_cut);
  node->blocks.erase(node->blocks.begin(), node->blocks.begin() + index);
  node->begin += index;
  node->first_hash = Hash(node->tokens.data());
  LinkChild(upper, node);

  for (int set = 0; set < kBlockSetCount; ++set) {
    upper->count[set] = std::min(node->count[set], index);
    node->count[set] -= upper->count[set];
    upper->children_in[set] = node->count[set] > 0 ? 1 : 0;
  }
  if (node->hashed > index) {
    node->hashed -= index;
  } else {
    upper->hashed = node->hashed;
    upper->key = node->key;
    node->hashed = 0;
  }
  upper->written = std::min(node->written, index);
  node->written -= upper->written;
  for (const TreeBlock& block : upper->blocks) {
    if (block.slot[0] && block.slot[1]) upper->mirrors += 1;
  }
  node->mirrors -= upper->mirrors;
  OwnBlocks(upper, 0);
  if (node->listed[kMirrorList] && upper->mirrors > 0) Enlist(kMirrorList, upper);
  if (node->listed[kDirtyList]) Enlist(kDirtyList, upper);
  node->mirror_scan = node->size();
  Reorder(upper);
  Reorder(node);
}

HiRadixTree::Position HiRadixTree::Append(Position from, std::span<const uint32_t> tokens) {
  LARDER_CHECK(tokens.size() % block_tokens_ == 0);
  if (from.end < from.node->end()) {
    Split(from.node, from.end - from.node->begin);
    from.node = from.node->parent;
  }
  TreeNode* node = from.node;
  uint64_t left = tokens.size() / block_tokens_;
  blocks_ += left;
  while (left > 0) {
    // A leaf is extended in place; anything else gets a child.
    if (node == root_ || !node->children.empty() || node->size() == kNodeBlocksMax) {
      TreeNode* child = new TreeNode;
      nodes_ += 1;
      child->begin = node->end();
      child->first_hash = Hash(tokens.data());
      LinkChild(node, child);
      node = child;
    }
    const uint64_t room = kNodeBlocksMax - node->size();
    const uint64_t count = std::min(left, room);
    if (node->size() == 0) {
      node->tokens.reserve(count * block_tokens_);
      node->blocks.reserve(count);
    }
    const auto part = tokens.first(count * block_tokens_);
    node->tokens.insert(node->tokens.end(), part.begin(), part.end());
    node->blocks.resize(node->size() + count);
    tokens = tokens.subspan(part.size());
    left -= count;
    from.end += static_cast<uint32_t>(count);
  }
  return {node, from.end};
}

// --- Owners ---------------------------------------------------------------------------------

void HiRadixTree::Own(Slot slot, Tier tier, TreeNode* node) {
  if (SlotOwners* owners = owners_[Index(tier)]) owners->Set(slot, node);
}

void HiRadixTree::OwnBlocks(TreeNode* node, uint32_t index) {
  for (; index < node->size(); ++index) {
    for (Tier tier : {Tier::kGpu, Tier::kHost}) {
      if (const Slot slot = node->blocks[index].In(tier)) Own(slot, tier, node);
    }
  }
}

// --- Copies ------------------------------------------------------------------------------

void HiRadixTree::SetCount(TreeNode* node, BlockSet set, uint32_t count) {
  const bool had = node->count[set] > 0;
  node->count[set] = count;
  if (had != (count > 0) && node->parent != nullptr) {
    count > 0 ? ++node->parent->children_in[set] : --node->parent->children_in[set];
    Offer(node->parent, set);
  }
}

void HiRadixTree::Attach(TreeNode* node, uint32_t index, Tier tier, Slot slot) {
  TreeBlock& block = node->blocks[index];
  LARDER_CHECK(slot && !block.In(tier));
  block.slot[Index(tier)] = slot;
  if (tier == Tier::kNvme) return;
  Own(slot, tier, node);
  if (tier == Tier::kGpu) {
    LARDER_CHECK(index == node->count[kGpuSet]);
    SetCount(node, kGpuSet, index + 1);
  }
  if (index >= node->count[kMemorySet]) {
    LARDER_CHECK(index == node->count[kMemorySet]);
    SetCount(node, kMemorySet, index + 1);
  }
  if (block.slot[0] && block.slot[1]) {
    node->mirrors += 1;
    mirrors_ += 1;
    Enlist(kMirrorList, node);
  }
  Reorder(node);
}

Slot HiRadixTree::Detach(TreeNode* node, uint32_t index, Tier tier) {
  TreeBlock& block = node->blocks[index];
  const Slot slot = block.In(tier);
  LARDER_CHECK(slot && block.pins[Index(tier)] == 0);
  if (tier != Tier::kNvme && block.slot[0] && block.slot[1]) {
    node->mirrors -= 1;
    mirrors_ -= 1;
  }
  block.slot[Index(tier)] = Slot();
  if (tier == Tier::kNvme) return slot;
  Own(slot, tier, nullptr);
  if (tier == Tier::kGpu) {
    LARDER_CHECK(index + 1 == node->count[kGpuSet]);
    LARDER_CHECK(index + 1 < node->size() || node->children_in[kGpuSet] == 0);
    block.in_transit = false;
    SetCount(node, kGpuSet, index);
  }
  if (!block.InMemory()) {
    LARDER_CHECK(index + 1 == node->count[kMemorySet]);
    LARDER_CHECK(index + 1 < node->size() || node->children_in[kMemorySet] == 0);
    SetCount(node, kMemorySet, index);
  }
  Reorder(node);
  return slot;
}

// --- Shrinking ---------------------------------------------------------------------------

void HiRadixTree::Delete(TreeNode* node) {
  LARDER_CHECK(node->children.empty());
  MoveCursors(node, node->parent);
  for (LeafHeap& heap : heaps_) {
    if (heap.Contains(node)) heap.Remove(node);
  }
  Delist(kMirrorList, node);
  Delist(kDirtyList, node);
  nodes_ -= 1;
  delete node;
}

void HiRadixTree::Trim(TreeNode* node) {
  while (node != root_) {
    const uint32_t before = node->size();
    while (node->children.empty() && node->size() > 0 && !node->blocks.back().InMemory() &&
           !node->blocks.back().Pinned()) {
      node->blocks.pop_back();
      blocks_ -= 1;
    }
    if (node->size() == before) return;
    node->tokens.resize(uint64_t{node->size()} * block_tokens_);
    node->written = std::min(node->written, node->size());
    if (node->hashed > node->size()) node->hashed = 0;
    if (node->size() > 0) {
      if (node->blocks.capacity() > 4 * node->blocks.size() + 8) {
        node->blocks.shrink_to_fit();
        node->tokens.shrink_to_fit();
      }
      Reorder(node);
      return;
    }
    TreeNode* parent = node->parent;
    UnlinkChild(node);
    Delete(node);
    if (parent != root_ && HasOnlyChild(parent)) {
      Merge(parent);
      return;
    }
    Reorder(parent);
    node = parent;
  }
}

// The parent takes over its only child's blocks.
void HiRadixTree::Merge(TreeNode* parent) {
  TreeNode* child = parent->children.begin()->second;
  const uint32_t size = parent->size();
  if (size + child->size() > kNodeBlocksMax) return;
  parent->tokens.insert(parent->tokens.end(), child->tokens.begin(), child->tokens.end());
  parent->blocks.insert(parent->blocks.end(), child->blocks.begin(), child->blocks.end());
  OwnBlocks(parent, size);
  for (int set = 0; set < kBlockSetCount; ++set) parent->count[set] += child->count[set];
  parent->children_in = child->children_in;
  if (parent->written == size) parent->written += child->written;
  if (child->hashed > 0) {
    parent->hashed = size + child->hashed;
    parent->key = child->key;
  }
  parent->mirrors += child->mirrors;
  parent->hits = std::max(parent->hits, child->hits);
  parent->children = std::move(child->children);
  child->children.clear();
  for (auto& [hash, first] : parent->children) {
    for (TreeNode* each = first; each != nullptr; each = each->next_same_hash) {
      each->parent = parent;
    }
  }
  if (parent->mirrors > 0) Enlist(kMirrorList, parent);
  if (child->listed[kDirtyList]) Enlist(kDirtyList, parent);
  child->parent = parent;
  Delete(child);
  Reorder(parent);
}

// --- Eviction order ----------------------------------------------------------------------

bool HiRadixTree::IsCandidate(const TreeNode* node, BlockSet set) const {
  const uint32_t count = node->count[set];
  if (count == 0 || (count == node->size() && node->children_in[set] != 0)) return false;
  const TreeBlock& block = node->blocks[count - 1];
  if (set == kGpuSet) return block.pins[Index(Tier::kGpu)] == 0;
  return !block.In(Tier::kGpu) && block.pins[Index(Tier::kHost)] == 0;
}

uint64_t HiRadixTree::CandidateRank(const TreeNode* node, BlockSet set) const {
  return node->blocks[node->count[set] - 1].rank;
}

void HiRadixTree::Offer(TreeNode* node, BlockSet set) {
  LeafHeap& heap = heaps_[set];
  const bool in_heap = heap.Contains(node);
  if (!IsCandidate(node, set)) {
    if (in_heap) heap.Remove(node);
  } else if (!in_heap) {
    heap.Push(node, CandidateRank(node, set));
  } else if (heap.RankOf(node) != CandidateRank(node, set)) {
    heap.Update(node, CandidateRank(node, set));
  }
}

void HiRadixTree::Reorder(TreeNode* node) {
  Offer(node, kGpuSet);
  Offer(node, kMemorySet);
}

void HiRadixTree::Settle(TreeNode* node) {
  Reorder(node);
  if (node->mirrors > 0) Enlist(kMirrorList, node);
}

TreeNode* HiRadixTree::Victim(BlockSet set) {
  LeafHeap& heap = heaps_[set];
  while (!heap.empty()) {
    const LeafHeap::Entry top = heap.top();
    if (!IsCandidate(top.node, set)) {
      heap.Remove(top.node);  // pinned since; Settle offers it again
    } else if (CandidateRank(top.node, set) != top.rank) {
      heap.Update(top.node, CandidateRank(top.node, set));
    } else {
      return top.node;
    }
  }
  return nullptr;
}

std::pair<TreeNode*, uint32_t> HiRadixTree::UnpinnedMirror(bool transit_too) {
  TreeNode* node = list_head_[kMirrorList];
  while (node != nullptr) {
    bool some_in_transit = false;
    for (uint32_t i = std::min(node->mirror_scan, node->count[kGpuSet]); i > 0; --i) {
      const TreeBlock& block = node->blocks[i - 1];
      if (!block.In(Tier::kHost) || block.pins[Index(Tier::kHost)] != 0) continue;
      if (block.in_transit && !transit_too) {
        some_in_transit = true;
        continue;
      }
      if (!some_in_transit) node->mirror_scan = i;
      return {node, i - 1};
    }
    TreeNode* next = node->list_next[kMirrorList];
    if (!some_in_transit) Delist(kMirrorList, node);
    node = next;
  }
  return {nullptr, 0};
}

void HiRadixTree::Enlist(List list, TreeNode* node) {
  if (list == kMirrorList) node->mirror_scan = node->size();
  if (node->listed[list] || node == root_) return;
  node->listed[list] = true;
  node->list_previous[list] = list_tail_[list];
  node->list_next[list] = nullptr;
  (list_tail_[list] != nullptr ? list_tail_[list]->list_next[list] : list_head_[list]) = node;
  list_tail_[list] = node;
}

void HiRadixTree::Delist(List list, TreeNode* node) {
  if (!node->listed[list]) return;
  node->listed[list] = false;
  TreeNode* previous = node->list_previous[list];
  TreeNode* next = node->list_next[list];
  (previous != nullptr ? previous->list_next[list] : list_head_[list]) = next;
  (next != nullptr ? next->list_previous[list] : list_tail_[list]) = previous;
}

// --- Cursors -----------------------------------------------------------------------------

void HiRadixTree::Bind(Cursor& cursor, Position position) {
  Unbind(cursor);
  cursor.node = position.node;
  cursor.end = position.end;
  cursor.previous = nullptr;
  cursor.next = position.node->cursors;
  if (cursor.next != nullptr) cursor.next->previous = &cursor;
  position.node->cursors = &cursor;
}

void HiRadixTree::Unbind(Cursor& cursor) {
  if (cursor.node == nullptr) return;
  (cursor.previous != nullptr ? cursor.previous->next : cursor.node->cursors) = cursor.next;
  if (cursor.next != nullptr) cursor.next->previous = cursor.previous;
  cursor.node = nullptr;
}

HiRadixTree::Position HiRadixTree::Above(Position at) {
  while (at.node->parent != nullptr && at.end <= at.node->begin) at.node = at.node->parent;
  return at;
}

void HiRadixTree::MoveCursors(TreeNode* from, TreeNode* to) {
  while (Cursor* cursor = from->cursors) Bind(*cursor, {to, cursor->end});
}

}  // namespace larder
