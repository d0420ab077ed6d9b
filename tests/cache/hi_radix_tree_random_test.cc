// Random operations on the tree against a map from prefixes to blocks.
#include <gtest/gtest.h>

#include <array>
#include <map>
#include <memory>
#include <optional>
#include <ostream>
#include <random>
#include <sstream>
#include <vector>

#include "server/cache/hi_radix_tree.h"

namespace larder {
namespace {

constexpr uint32_t kBlockTokens = 2;
using Prompt = std::vector<uint32_t>;  // one number a block

struct Op {
  enum Kind {
    kPut,       // match, append and attach the whole prompt in GPU (as far as closed) or HOST
    kMirror,    // give the path's blocks HOST copies beside those in GPU
    kRaise,     // give the path's HOST blocks GPU copies
    kFromNvme,  // append the rest of the prompt as blocks on NVME, pinned
    kMatch,     // and bind a cursor, pinned, to what is found
    kRelease,   // the cursor number `tier`
    kEvict      // the victim of a set
  } kind;
  int tier = 0;
  Prompt prompt;
};

std::ostream& operator<<(std::ostream& out, const Op& op) {
  const char* names[] = {"kPut", "kMirror", "kRaise", "kFromNvme", "kMatch", "kRelease", "kEvict"};
  out << "{Op::" << names[op.kind] << ", " << op.tier << ", {";
  for (uint32_t block : op.prompt) out << block << ", ";
  return out << "}},";
}

struct Block {
  std::array<bool, 3> in = {};
  std::array<uint32_t, 3> pins = {};
  uint64_t rank = 0;
  bool InMemory() const { return in[0] || in[1]; }
  bool Pinned() const { return pins[0] || pins[1] || pins[2]; }
};

std::vector<uint32_t> Tokens(const Prompt& prompt, size_t from = 0) {
  std::vector<uint32_t> tokens;
  for (size_t i = from; i < prompt.size(); ++i) {
    tokens.insert(tokens.end(), {prompt[i] % 2, prompt[i]});
  }
  return tokens;
}

class Pair {
 public:
  ~Pair() {
    for (auto& held : held_) tree.Unbind(held->cursor);
  }

  void Apply(const Op& op) {
    ++now_;
    switch (op.kind) {
      case Op::kPut:
        return Put(op);
      case Op::kMirror:
      case Op::kRaise:
        return Copy(op);
      case Op::kFromNvme:
        return FromNvme(op);
      case Op::kMatch:
        return Hold(op.prompt);
      case Op::kRelease:
        if (!held_.empty()) Release(op.tier % held_.size());
        return;
      case Op::kEvict:
        return Evict(op.tier % 2 == 0 ? kGpuSet : kMemorySet);
    }
  }

  void Agree() const {
    tree.CheckInvariants();
    ASSERT_EQ(tree.blocks(), map.size());
    for (const auto& [prefix, block] : map) {
      const HiRadixTree::Position at = Find(prefix);
      ASSERT_EQ(at.end, prefix.size());
      const TreeBlock& found = at.node->blocks[at.end - 1 - at.node->begin];
      for (int t = 0; t < 3; ++t) {
        ASSERT_EQ(static_cast<bool>(found.slot[t]), block.in[t]);
        ASSERT_EQ(found.pins[t], block.pins[t]);
      }
    }
    for (const auto& held : held_) {
      const HiRadixTree::Position at = tree.Resolve(held->cursor);
      ASSERT_EQ(at.end, held->prefix.size());
      ASSERT_EQ(at.node, Find(held->prefix).node);
    }
  }

  HiRadixTree::Position Find(const Prompt& prompt) const {
    auto& t = const_cast<HiRadixTree&>(tree);
    return t.Match(t.Start(), Tokens(prompt));
  }
  uint32_t Known(const Prompt& prompt) const {
    uint32_t known = 0;
    while (known < prompt.size() && map.contains(Prefix(prompt, known + 1))) ++known;
    return known;
  }
  static Prompt Prefix(const Prompt& prompt, size_t blocks) {
    return {prompt.begin(), prompt.begin() + blocks};
  }

 private:
  struct Held {
    Cursor cursor;
    Prompt prefix;
    std::vector<Tier> tiers;
  };

  template <typename F>
  void ForPath(HiRadixTree::Position at, uint32_t from, F&& f) {
    for (const PathPart& part : tree.PathTo(at, from)) {
      for (uint32_t i = part.begin; i < part.end; ++i) f(part.node, i, part.node->begin + i);
    }
  }

  void Put(const Op& op) {
    HiRadixTree::Position at = Find(op.prompt);
    ASSERT_EQ(at.end, Known(op.prompt));
    at = tree.Append(at, Tokens(op.prompt, at.end));
    ASSERT_EQ(at.end, op.prompt.size());
    bool gpu_closed = true;
    ForPath(at, 0, [&](TreeNode* node, uint32_t i, uint32_t position) {
      Block& block = map[Prefix(op.prompt, position + 1)];
      const Tier tier = op.tier % 2 == 0 && gpu_closed ? Tier::kGpu : Tier::kHost;
      block.rank = node->blocks[i].rank = now_;
      if (!block.InMemory()) {
        tree.Attach(node, i, tier, Slot(++next_slot_));
        block.in[Index(tier)] = true;
      }
      gpu_closed = gpu_closed && block.in[0];
    });
  }

  void Copy(const Op& op) {
    const Tier to = op.kind == Op::kMirror ? Tier::kHost : Tier::kGpu;
    bool closed = true;
    ForPath(Find(op.prompt), 0, [&](TreeNode* node, uint32_t i, uint32_t position) {
      Block& block = map[Prefix(op.prompt, position + 1)];
      closed = closed && block.InMemory();
      if (!closed || block.in[Index(to)]) return;
      tree.Attach(node, i, to, Slot(++next_slot_));
      block.in[Index(to)] = true;
    });
  }

  void FromNvme(const Op& op) {
    HiRadixTree::Position at = Find(op.prompt);
    const uint32_t from = at.end;
    if (from == op.prompt.size()) return;
    at = tree.Append(at, Tokens(op.prompt, from));
    ForPath(at, from, [&](TreeNode* node, uint32_t i, uint32_t position) {
      tree.Attach(node, i, Tier::kNvme, Slot(++next_slot_));
      map[Prefix(op.prompt, position + 1)].in[2] = true;
    });
    Hold(op.prompt);
  }

  void Hold(const Prompt& prompt) {
    const HiRadixTree::Position at = Find(prompt);
    ASSERT_EQ(at.end, Known(prompt));
    auto held = std::make_unique<Held>();
    held->prefix = Prefix(prompt, at.end);
    tree.Bind(held->cursor, at);
    ForPath(at, 0, [&](TreeNode* node, uint32_t i, uint32_t position) {
      Block& block = map[Prefix(prompt, position + 1)];
      const Tier tier = block.in[0] ? Tier::kGpu : block.in[1] ? Tier::kHost : Tier::kNvme;
      tree.Pin(node, i, tier);
      block.pins[Index(tier)] += 1;
      held->tiers.push_back(tier);
    });
    held_.push_back(std::move(held));
  }

  void Release(size_t which) {
    Held& held = *held_[which];
    ForPath(tree.Resolve(held.cursor), 0, [&](TreeNode* node, uint32_t i, uint32_t position) {
      tree.Unpin(node, i, held.tiers[position]);
      map[Prefix(held.prefix, position + 1)].pins[Index(held.tiers[position])] -= 1;
    });
    const HiRadixTree::Position at = tree.Resolve(held.cursor);
    for (const PathPart& part : tree.PathTo(at, 0)) tree.Settle(part.node);
    tree.Unbind(held.cursor);
    tree.Trim(at.node);
    const Prompt prefix = std::move(held.prefix);
    held_.erase(held_.begin() + which);
    Prune(prefix);
  }

  void Evict(BlockSet set) {
    std::optional<uint64_t> oldest;
    for (const auto& [prefix, block] : map) {
      if (MayGo(prefix, block, set)) oldest = std::min(oldest.value_or(block.rank), block.rank);
    }
    TreeNode* node = tree.Victim(set);
    ASSERT_EQ(node != nullptr, oldest.has_value());
    if (node == nullptr) return;
    const uint32_t index = node->count[set] - 1;
    ASSERT_EQ(node->blocks[index].rank, *oldest);
    Prompt prefix;
    for (TreeNode* at = node; at->parent != nullptr; at = at->parent) {
      const uint32_t blocks = at == node ? index + 1 : at->size();
      for (uint32_t i = blocks; i > 0; --i) {
        prefix.insert(prefix.begin(), tree.TokensOf(at, i - 1)[1]);
      }
    }
    Block& block = map.at(prefix);
    ASSERT_TRUE(MayGo(prefix, block, set));
    const Tier tier = set == kGpuSet ? Tier::kGpu : Tier::kHost;
    // A GPU block with HOST blocks below it may go only when HOST has it as well.
    if (tier == Tier::kGpu && !block.in[1] && HasBelow(prefix, kMemorySet)) return;
    tree.Detach(node, index, tier);
    block.in[Index(tier)] = false;
    tree.Trim(node);
    Prune(prefix);
  }

  bool HasBelow(const Prompt& prefix, std::optional<BlockSet> set) const {
    for (auto at = map.upper_bound(prefix); at != map.end(); ++at) {
      if (at->first.size() <= prefix.size() || Prefix(at->first, prefix.size()) != prefix) break;
      if (!set || (*set == kGpuSet ? at->second.in[0] : at->second.InMemory())) return true;
    }
    return false;
  }
  bool MayGo(const Prompt& prefix, const Block& block, BlockSet set) const {
    if (HasBelow(prefix, set)) return false;
    if (set == kGpuSet) return block.in[0] && block.pins[0] == 0;
    return block.in[1] && !block.in[0] && block.pins[1] == 0;
  }
  // Rule 3: what is in no memory stays only while pinned or with such blocks below it.
  void Prune(Prompt prefix) {
    for (; !prefix.empty(); prefix.pop_back()) {
      const auto at = map.find(prefix);
      if (at == map.end()) continue;
      if (at->second.InMemory() || at->second.Pinned() || HasBelow(prefix, std::nullopt)) return;
      map.erase(at);
    }
  }

 public:
  HiRadixTree tree{kBlockTokens};
  std::map<Prompt, Block> map;

 private:
  std::vector<std::unique_ptr<Held>> held_;
  uint32_t next_slot_ = 0;
  uint64_t now_ = 0;
};

Op RandomOp(std::mt19937& random) {
  const Op::Kind kinds[] = {Op::kPut,      Op::kPut,   Op::kPut,     Op::kMirror,  Op::kRaise,
                            Op::kFromNvme, Op::kMatch, Op::kRelease, Op::kRelease, Op::kEvict,
                            Op::kEvict,    Op::kEvict, Op::kEvict};
  Op op{kinds[random() % std::size(kinds)], static_cast<int>(random() % 1000), {}};
  const uint32_t blocks = random() % 9;
  for (uint32_t i = 0; i < blocks; ++i) op.prompt.push_back(random() % (i < 2 ? 2 : 3));
  return op;
}

TEST(HiRadixTree, RandomOperationsAgreeWithAMapOfPrefixes) {
  for (uint32_t seed = 1; seed <= 400; ++seed) {
    std::mt19937 random(seed);
    Pair pair;
    std::ostringstream log;
    for (int i = 0; i < 200; ++i) {
      const Op op = RandomOp(random);
      log << op << "\n";
      pair.Apply(op);
      if (!HasFailure()) pair.Agree();
      ASSERT_FALSE(HasFailure()) << "seed " << seed << "\n" << log.str();
    }
  }
}

}  // namespace
}  // namespace larder
