// Documents for the tree's benchmarks.
//
//   trunk (20 blocks, 20 documents each)
//     |
//     +-- document 0 ---------------------------------------
//     |            \-- document 1, which forks off it
//     +-- document 2 ---------------------------------------
//                  ...
//
// Half of the documents leave the trunk at its end, the other half leave the one before them 1
// to 99 blocks later. All are equally long, and long enough that `blocks` different ones come out.
//
// Thread safety: values.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "server/cache/hi_radix_tree.h"

namespace larder::bench {

struct WorkloadOptions {
  uint32_t block_tokens = 64;
  uint32_t documents = 500;
  uint32_t blocks = 100'000;  // different ones, of all documents
  uint32_t seed = 1;
};

inline constexpr uint32_t kTrunkBlocks = 20;
inline constexpr uint32_t kDocumentsATrunk = 20;
inline constexpr uint32_t kPromptBlocks = 219;  // 14,016 tokens of 64

struct Workload {
  WorkloadOptions options;
  std::vector<std::vector<uint32_t>> documents;
  std::vector<std::vector<uint32_t>> prompts;  // copies of the first kPromptBlocks of each
};

Workload MakeWorkload(const WorkloadOptions& options);

// A prompt that no document continues past the trunk it shares with document `like`.
std::vector<uint32_t> NewPrompt(const Workload& workload, uint32_t like, uint32_t seed);

// Makes blocks part of the tree as the cache does for a Put into GPU: match, append, and for
// each block a slot and a rank. Slots are counted up; the tree does not look at their order.
class Putter {
 public:
  explicit Putter(HiRadixTree& tree) : tree_(tree) {}
  TreePosition Put(std::span<const uint32_t> tokens) { return Put(tree_.Start(), tokens); }
  TreePosition Put(TreePosition from, std::span<const uint32_t> tokens);
  uint64_t NextRank() { return ++rank_; }

 private:
  HiRadixTree& tree_;
  uint32_t slot_ = 0;
  uint64_t rank_ = 0;
};

void PutWhole(HiRadixTree& tree, const Workload& workload);
// A block of every document in turn, as decoding does: the worst order for a tree.
void PutByBlock(HiRadixTree& tree, const Workload& workload);

// What LookupPrefix does to a tree for a full hit: match, collect the slots of the path, touch
// its ranks. Returns how many blocks matched.
uint32_t LookUp(HiRadixTree& tree, std::span<const uint32_t> prompt, uint64_t rank,
                std::vector<Slot>& slots);

}  // namespace larder::bench
