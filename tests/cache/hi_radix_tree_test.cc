// The rules of the tree by name; hi_radix_tree_random_test.cc has the random operations.
#include "server/cache/hi_radix_tree.h"

#include <gtest/gtest.h>

#include <vector>

namespace larder {
namespace {

constexpr uint32_t kBlockTokens = 2;

// Blocks named by letters: "ABC" is three blocks of two tokens each.
std::vector<uint32_t> Tokens(const std::string& blocks) {
  std::vector<uint32_t> tokens;
  for (char c : blocks) tokens.insert(tokens.end(), {static_cast<uint32_t>(c), 7});
  return tokens;
}

struct Tree {
  HiRadixTree tree{kBlockTokens};
  uint32_t next_slot = 1;
  uint64_t now = 0;

  // Puts the path, its new blocks in `tier`; the path is touched.
  HiRadixTree::Position Put(const std::string& blocks, Tier tier = Tier::kGpu) {
    const std::vector<uint32_t> tokens = Tokens(blocks);
    HiRadixTree::Position at = tree.Match(tree.Start(), tokens);
    at = tree.Append(at, std::span(tokens).subspan(uint64_t{at.end} * kBlockTokens));
    ++now;
    for (const PathPart& part : tree.PathTo(at, 0)) {
      for (uint32_t i = part.begin; i < part.end; ++i) {
        part.node->blocks[i].rank = now;
        if (!part.node->blocks[i].InMemory()) tree.Attach(part.node, i, tier, Slot(next_slot++));
      }
    }
    tree.CheckInvariants();
    return at;
  }
  HiRadixTree::Position Match(const std::string& blocks) {
    return tree.Match(tree.Start(), Tokens(blocks));
  }
  // The block that goes first, by its letter; it goes.
  char EvictOne(BlockSet set) {
    TreeNode* node = tree.Victim(set);
    if (node == nullptr) return '-';
    const uint32_t index = node->count[set] - 1;
    const char name = static_cast<char>(tree.TokensOf(node, index)[0]);
    tree.Detach(node, index, set == kGpuSet ? Tier::kGpu : Tier::kHost);
    tree.Trim(node);
    tree.CheckInvariants();
    return name;
  }
  void Pin(HiRadixTree::Position at, Tier tier, bool on) {
    for (const PathPart& part : tree.PathTo(at, 0)) {
      for (uint32_t i = part.begin; i < part.end; ++i) {
        on ? tree.Pin(part.node, i, tier) : tree.Unpin(part.node, i, tier);
      }
      tree.Settle(part.node);
    }
  }
};

TEST(HiRadixTree, MatchIsTheLongestPrefixOfWholeBlocks) {
  Tree t;
  t.Put("ABCD");
  EXPECT_EQ(t.Match("").end, 0u);
  EXPECT_EQ(t.Match("X").end, 0u);
  EXPECT_EQ(t.Match("AB").end, 2u);
  EXPECT_EQ(t.Match("ABXD").end, 2u);
  EXPECT_EQ(t.Match("ABCDE").end, 4u);
  std::vector<uint32_t> tokens = Tokens("ABC");
  tokens.pop_back();
  EXPECT_EQ(t.tree.Match(t.tree.Start(), tokens).end, 2u) << "a tail shorter than a block";
  tokens = Tokens("ABC");
  tokens[5] += 1;
  EXPECT_EQ(t.tree.Match(t.tree.Start(), tokens).end, 2u) << "a block that differs at its end";
}

TEST(HiRadixTree, MatchGoesOnFromAPositionInsideANode) {
  Tree t;
  t.Put("ABCDEF");
  const HiRadixTree::Position at = t.Match("ABC");
  EXPECT_EQ(t.tree.Match(at, Tokens("DEX")).end, 5u);
  EXPECT_EQ(t.tree.Match(at, Tokens("X")).end, 3u);
}

TEST(HiRadixTree, ASplitKeepsTheExistingObjectAsTheLowerNode) {
  Tree t;
  TreeNode* object = t.Put("ABCD").node;
  const HiRadixTree::Position x = t.Put("ABX");
  EXPECT_EQ(object->begin, 2u);
  EXPECT_EQ(object->size(), 2u);
  EXPECT_EQ(t.Match("ABCD").node, object);
  EXPECT_EQ(object->parent, x.node->parent);
  EXPECT_EQ(object->parent->size(), 2u);
  EXPECT_EQ(t.tree.nodes(), 3u);
  EXPECT_EQ(t.tree.blocks(), 5u);
}

TEST(HiRadixTree, NodesSplitOnlyWherePathsDiverge) {
  Tree t;
  const HiRadixTree::Position at = t.Put("ABCD");
  t.tree.Attach(at.node, 0, Tier::kHost, Slot(50));
  t.Pin(t.Match("AB"), Tier::kGpu, true);
  EXPECT_EQ(t.tree.nodes(), 1u) << "tiers and pins do not split";
  t.tree.CheckInvariants();
  EXPECT_EQ(t.EvictOne(kGpuSet), 'D');
  EXPECT_EQ(t.EvictOne(kGpuSet), 'C');
  EXPECT_EQ(t.EvictOne(kGpuSet), '-') << "pinned";
}

TEST(HiRadixTree, CursorsSurviveSplitMergeAndRemoval) {
  Tree t;
  t.Put("ABCD");
  Cursor whole, middle, start;
  t.tree.Bind(whole, t.Match("ABCD"));
  t.tree.Bind(middle, t.Match("AB"));
  t.tree.Bind(start, t.tree.Start());
  const auto spells = [&](const Cursor& cursor, const std::string& blocks) {
    const HiRadixTree::Position at = t.tree.Resolve(cursor);
    const HiRadixTree::Position match = t.Match(blocks);
    return at.end == blocks.size() && at.node == match.node && match.end == at.end;
  };
  t.Put("ABX");  // split
  EXPECT_TRUE(spells(whole, "ABCD"));
  EXPECT_TRUE(spells(middle, "AB"));
  t.Put("AY");  // split above the middle
  EXPECT_TRUE(spells(whole, "ABCD"));
  EXPECT_TRUE(spells(middle, "AB"));
  t.Pin(t.Match("ABCD"), Tier::kGpu, true);
  EXPECT_EQ(t.EvictOne(kGpuSet), 'X');  // merge
  EXPECT_EQ(t.EvictOne(kGpuSet), 'Y');
  EXPECT_EQ(t.tree.nodes(), 1u);
  EXPECT_TRUE(spells(whole, "ABCD"));
  EXPECT_TRUE(spells(middle, "AB"));
  t.Pin(t.Match("ABCD"), Tier::kGpu, false);
  t.tree.Unbind(whole);
  t.tree.Unbind(middle);
  while (t.EvictOne(kGpuSet) != '-') {
  }
  EXPECT_EQ(t.tree.nodes(), 0u);
  EXPECT_EQ(t.tree.Resolve(start).node, t.tree.root());
  t.tree.Unbind(start);
}

TEST(HiRadixTree, APromptPutBlockByBlockIsOneNode) {
  Tree t;
  std::string prompt;
  for (char c = 'A'; c <= 'Z'; ++c) t.Put(prompt += c);
  EXPECT_EQ(t.tree.nodes(), 1u);
  EXPECT_EQ(t.tree.blocks(), 26u);
  EXPECT_EQ(t.Match(prompt).end, 26u);
}

TEST(HiRadixTree, NodesAreMergedWhenASiblingGoes) {
  Tree t;
  t.Put("ABX");
  t.Put("ABCD");
  EXPECT_EQ(t.tree.nodes(), 3u);
  EXPECT_EQ(t.EvictOne(kGpuSet), 'X');
  EXPECT_EQ(t.tree.nodes(), 1u);
  EXPECT_EQ(t.Match("ABCD").end, 4u);
  EXPECT_EQ(t.Match("ABX").end, 2u);
}

TEST(HiRadixTree, SiblingsOfAMergedNodeAreStillFound) {
  Tree t;
  t.Put("AX");
  t.Put("ABC");
  t.Put("ABD");
  EXPECT_EQ(t.EvictOne(kGpuSet), 'X');  // [A]-[B]-[C],[D] becomes [AB]-[C],[D]
  EXPECT_EQ(t.tree.nodes(), 3u);
  EXPECT_EQ(t.Match("ABC").end, 3u);
  EXPECT_EQ(t.Match("ABD").end, 3u);
}

TEST(HiRadixTree, ANodeHoldsAtMostItsBound) {
  HiRadixTree tree(1);
  std::vector<uint32_t> tokens(2 * HiRadixTree::kNodeBlocksMax + 1);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<uint32_t>(i);
  const HiRadixTree::Position at = tree.Append(tree.Start(), tokens);
  EXPECT_EQ(tree.nodes(), 3u);
  EXPECT_EQ(at.end, tokens.size());
  uint32_t slot = 0;
  for (const PathPart& part : tree.PathTo(at, 0)) {
    for (uint32_t i = part.begin; i < part.end; ++i) {
      tree.Attach(part.node, i, Tier::kHost, Slot(++slot));
    }
  }
  tree.CheckInvariants();
  EXPECT_EQ(tree.Match(tree.Start(), tokens).end, tokens.size());
  // A merge does not go past the bound either.
  std::vector<uint32_t> fork(tokens.begin(), tokens.begin() + 1000);
  const HiRadixTree::Position base = tree.Match(tree.Start(), fork);
  fork = {999'999};
  const HiRadixTree::Position sibling = tree.Append(base, fork);
  tree.Attach(sibling.node, 0, Tier::kHost, Slot(++slot));
  tree.CheckInvariants();
  EXPECT_EQ(tree.nodes(), 5u);
  tree.Detach(sibling.node, 0, Tier::kHost);
  tree.Trim(sibling.node);
  tree.CheckInvariants();
  EXPECT_EQ(tree.nodes(), 3u) << "1000 and 24 blocks are one node again, no more";
}

TEST(HiRadixTree, VictimsAreTheLeastRecentLeaves) {
  Tree t;
  t.Put("ABC");  // 1
  t.Put("ABD");  // 2
  t.Put("E");    // 3
  t.Put("ABC");  // 4: touched again
  std::string order;
  for (char c = t.EvictOne(kGpuSet); c != '-'; c = t.EvictOne(kGpuSet)) order += c;
  EXPECT_EQ(order, "DECBA");
}

TEST(HiRadixTree, AHostBlockUnderAGpuBlockIsNoReasonToKeepTheGpuCopy) {
  Tree t;
  const HiRadixTree::Position a = t.Put("A");
  t.Put("AB", Tier::kHost);
  EXPECT_EQ(t.tree.Victim(kMemorySet)->begin, 0u);
  EXPECT_EQ(t.EvictOne(kMemorySet), 'B');
  EXPECT_EQ(t.EvictOne(kMemorySet), '-') << "what is in GPU is not HOST's to drop";
  EXPECT_EQ(a.node->count[kGpuSet], 1u);
}

TEST(HiRadixTree, AnUnpinnedMirrorIsFoundAndAPinnedOneIsNot) {
  Tree t;
  const HiRadixTree::Position at = t.Put("AB");
  t.tree.Attach(at.node, 0, Tier::kHost, Slot(50));
  t.tree.Attach(at.node, 1, Tier::kHost, Slot(51));
  EXPECT_EQ(t.tree.mirrors(), 2u);
  t.tree.Pin(at.node, 1, Tier::kHost);
  EXPECT_EQ(t.tree.UnpinnedMirror(true), std::make_pair(at.node, 0u));
  at.node->blocks[0].in_transit = true;
  EXPECT_EQ(t.tree.UnpinnedMirror(false).first, nullptr) << "it is on its way down";
  EXPECT_EQ(t.tree.UnpinnedMirror(true), std::make_pair(at.node, 0u));
  t.tree.Detach(at.node, 0, Tier::kHost);
  EXPECT_EQ(t.tree.UnpinnedMirror(true).first, nullptr);
  t.tree.Unpin(at.node, 1, Tier::kHost);
  t.tree.Settle(at.node);
  EXPECT_EQ(t.tree.UnpinnedMirror(true), std::make_pair(at.node, 1u));
  t.tree.CheckInvariants();
}

TEST(HiRadixTree, BlocksOnNvmeOnlyLiveWhileTheyArePinned) {
  Tree t;
  t.Put("A");
  const HiRadixTree::Position at = t.tree.Append(t.Match("A"), Tokens("BC"));
  for (uint32_t i : {1u, 2u}) {
    t.tree.Attach(at.node, i, Tier::kNvme, Slot(90 + i));
    t.tree.Pin(at.node, i, Tier::kNvme);
  }
  t.tree.CheckInvariants();
  t.tree.Unpin(at.node, 1, Tier::kNvme);
  t.tree.Trim(at.node);
  EXPECT_EQ(t.Match("ABC").end, 3u) << "one below it is pinned";
  t.tree.Unpin(at.node, 2, Tier::kNvme);
  t.tree.Trim(at.node);
  t.tree.CheckInvariants();
  EXPECT_EQ(t.Match("ABC").end, 1u);
}

}  // namespace
}  // namespace larder
