// HiRadixTree by itself, and through Cache (tests/bench/README.md has the workload).
//
// One thread. A run is a rotation over all prompts, or several; its figure is the median call, the
// row's the median run. The limit is measured in turn with each run: memcmp of the very tokens that
// the match compares, where they lie.
#include <malloc.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>

#include "absl/strings/str_format.h"
#include "bench.h"
#include "storage/check.h"
#include "tree_workload.h"

namespace larder::bench {

// bench_tree_cache.cc
absl::Status MeasureCacheLookup();

namespace {

constexpr int kRuns = 15;
constexpr size_t kCallsMin = 1000;  // a run; small trees are gone round several times

// One prompt's tokens where the tree keeps them.
using Parts = std::vector<std::span<const uint32_t>>;

std::vector<Parts> WhereTokensLie(HiRadixTree& tree, const Workload& workload) {
  std::vector<Parts> result;
  for (const auto& prompt : workload.prompts) {
    Parts parts;
    for (const PathPart& part : tree.PathTo(tree.Match(tree.Start(), prompt), 0)) {
      parts.push_back(std::span<const uint32_t>(part.node->tokens)
                          .subspan(uint64_t{part.begin} * tree.block_tokens(),
                                   uint64_t{part.end - part.begin} * tree.block_tokens()));
    }
    result.push_back(std::move(parts));
  }
  return result;
}

// The median call of a run, in microseconds.
template <typename F>
double Rotation(size_t calls, F call) {
  std::vector<double> samples(calls);
  for (size_t i = 0; i < calls; ++i) {
    const double start = Now();
    call(i);
    samples[i] = Now() - start;
  }
  return Median(std::move(samples)) * 1e6;
}

struct MatchFigures {
  std::vector<double> match_us;
  std::vector<double> memcmp_us;
};

void MatchRun(HiRadixTree& tree, const Workload& workload, MatchFigures& figures) {
  const std::vector<Parts> tokens = WhereTokensLie(tree, workload);
  std::vector<Slot> slots;
  slots.reserve(kPromptBlocks);
  uint64_t rank = 1'000'000'000;
  const size_t prompts = workload.prompts.size();
  const size_t calls = std::max(prompts, kCallsMin);
  figures.match_us.push_back(Rotation(calls, [&](size_t call) {
    const size_t i = call % prompts;
    LARDER_CHECK(LookUp(tree, workload.prompts[i], ++rank, slots) == kPromptBlocks);
  }));
  figures.memcmp_us.push_back(Rotation(calls, [&](size_t call) {
    const size_t i = call % prompts;
    const uint32_t* at = workload.prompts[i].data();
    for (const std::span<const uint32_t> part : tokens[i]) {
      LARDER_CHECK(std::memcmp(at, part.data(), part.size_bytes()) == 0);
      at += part.size();
    }
  }));
}

absl::Status MeasureMatch() {
  const Workload workload = MakeWorkload({});
  HiRadixTree whole(workload.options.block_tokens);
  HiRadixTree by_block(workload.options.block_tokens);
  PutWhole(whole, workload);
  PutByBlock(by_block, workload);
  LARDER_CHECK(whole.blocks() == by_block.blocks());
  MatchFigures figures;
  MatchFigures figures_by_block;
  std::vector<double> ratios;
  for (int run = 0; run < kRuns; ++run) {
    MatchRun(whole, workload, figures);
    MatchRun(by_block, workload, figures_by_block);
    ratios.push_back(figures_by_block.match_us.back() / figures.match_us.back());
  }
  const double match = Median(figures.match_us);
  const double memcmp_us = Median(figures.memcmp_us);
  Print({"tree_match_14k_us",
         match,
         "us",
         absl::StrFormat("memcmp of the same tokens: %.2f us", memcmp_us),
         match / memcmp_us,
         {Goal::kAtMost, 10, "SGLang's C++ tree, published: 33"}},
        figures.match_us);
  Print({"tree_match_put_by_block",
         Median(ratios),
         "x",
         absl::StrFormat("put whole: %.2f us, %d nodes; by block: %d nodes", match, whole.nodes(),
                         by_block.nodes()),
         Median(ratios),
         {Goal::kAtMost, 1.5, ""}},
        ratios);
  return absl::OkStatus();
}

absl::Status MeasureGrowth() {
  const Workload small_workload = MakeWorkload({.documents = 50, .blocks = 10'000});
  const Workload large_workload = MakeWorkload({.documents = 5'000, .blocks = 1'000'000});
  HiRadixTree small(small_workload.options.block_tokens);
  HiRadixTree large(large_workload.options.block_tokens);
  PutWhole(small, small_workload);
  PutWhole(large, large_workload);
  MatchFigures at_small;
  MatchFigures at_large;
  std::vector<double> ratios;
  std::vector<double> memcmp_ratios;
  for (int run = 0; run < kRuns; ++run) {
    MatchRun(small, small_workload, at_small);
    MatchRun(large, large_workload, at_large);
    ratios.push_back(at_large.match_us.back() / at_small.match_us.back());
    memcmp_ratios.push_back(at_large.memcmp_us.back() / at_small.memcmp_us.back());
  }
  Print(
      {"tree_match_growth",
       Median(ratios),
       "x",
       absl::StrFormat("memcmp of the same tokens grows %.2f x; match %.2f to %.2f us",
                       Median(memcmp_ratios), Median(at_small.match_us), Median(at_large.match_us)),
       Median(ratios) / Median(memcmp_ratios),
       {Goal::kAtMost, 3, ""}},
      ratios);
  return absl::OkStatus();
}

// Takes the last `blocks` blocks of the path away again.
void TakeBack(HiRadixTree& tree, TreePosition at, uint32_t blocks) {
  TreeNode* node = at.node;
  for (uint32_t i = 0; i < blocks; ++i) tree.Detach(node, node->count[kGpuSet] - 1, Tier::kGpu);
  tree.Trim(node);
}

// Prompts of which a tree has the trunk: 199 of their blocks are new to it.
std::vector<std::vector<uint32_t>> NewPrompts(const Workload& workload) {
  std::vector<std::vector<uint32_t>> prompts;
  for (uint32_t i = 0; i < workload.options.documents; ++i) {
    prompts.push_back(NewPrompt(workload, i, 1000 + i));
  }
  return prompts;
}

// A cache that is full takes as much away as it adds: the oldest of half a rotation's prompts
// goes (untimed) before each insert, and malloc has room that is neither new nor warm.
absl::Status MeasureInsert() {
  const Workload workload = MakeWorkload({});
  HiRadixTree tree(workload.options.block_tokens);
  PutWhole(tree, workload);
  Putter putter(tree);
  const std::vector<std::vector<uint32_t>> prompts = NewPrompts(workload);
  const size_t count = prompts.size();
  const size_t kept = count / 2;
  std::vector<TreePosition> ends(count);
  std::vector<std::vector<uint32_t>> copies(count);
  for (size_t i = 0; i < kept; ++i) ends[i] = putter.Put(prompts[i]);
  for (size_t i = 0; i < kept; ++i) copies[i] = prompts[i];
  std::vector<double> runs;
  std::vector<double> copy_runs;
  for (int run = 0; run < kRuns; ++run) {
    std::vector<double> inserts;
    std::vector<double> copied;
    for (size_t i = 0; i < count; ++i) {
      const size_t next = (i + kept) % count;
      TakeBack(tree, ends[i], kPromptBlocks - kTrunkBlocks);
      inserts.push_back(Timed([&] { ends[next] = putter.Put(prompts[next]); }) * 1e6);
    }
    for (size_t i = 0; i < count; ++i) {
      const size_t next = (i + kept) % count;
      copies[i] = {};
      copied.push_back(Timed([&] { copies[next] = prompts[next]; }) * 1e6);
    }
    runs.push_back(Median(std::move(inserts)));
    copy_runs.push_back(Median(std::move(copied)));
  }
  const double copy = Median(copy_runs);
  Print({"tree_insert_14k_us",
         Median(runs),
         "us",
         absl::StrFormat("malloc and copy of the same tokens: %.2f us", copy),
         Median(runs) / copy,
         {Goal::kAtMost, 15, "SGLang's C++ tree, published: 37"}},
        runs);
  return absl::OkStatus();
}

// In a cache that still grows, the kernel's first touch of each page dominates.
absl::Status MeasureInsertGrowing() {
  const Workload workload = MakeWorkload({});
  const std::vector<std::vector<uint32_t>> prompts = NewPrompts(workload);
  std::vector<double> runs;
  std::vector<double> copy_runs;
  for (int run = 0; run < 5; ++run) {
    {
      HiRadixTree tree(workload.options.block_tokens);
      PutWhole(tree, workload);
      Putter putter(tree);
      runs.push_back(Rotation(prompts.size(), [&](size_t i) { putter.Put(prompts[i]); }));
    }
    malloc_trim(0);
    std::vector<std::vector<uint32_t>> copies(prompts.size());
    copy_runs.push_back(Rotation(prompts.size(), [&](size_t i) { copies[i] = prompts[i]; }));
    copies.clear();
    malloc_trim(0);
  }
  const double copy = Median(copy_runs);
  Print({"tree_insert_14k_growing_us",
         Median(runs),
         "us",
         absl::StrFormat("malloc and copy of the same tokens: %.2f us", copy),
         Median(runs) / copy,
         {}},
        runs);
  return absl::OkStatus();
}

// 100 trunks of 20 blocks with 1,000 leaves of two blocks each.
struct LeafyTree {
  static constexpr uint32_t kTrunks = 100;
  static constexpr uint32_t kLeavesATrunk = 1'000;
  static constexpr uint32_t kBlockTokens = 64;

  HiRadixTree tree{kBlockTokens};
  std::vector<TreeNode*> leaves;

  LeafyTree() {
    Putter putter(tree);
    std::mt19937 random(7);
    std::vector<uint32_t> tokens((kTrunkBlocks + 2) * kBlockTokens);
    for (uint32_t i = 0; i < kTrunks * kLeavesATrunk; ++i) {
      const bool new_trunk = i % kLeavesATrunk == 0;
      const size_t shared = new_trunk ? 0 : kTrunkBlocks * kBlockTokens;
      std::generate(tokens.begin() + static_cast<std::ptrdiff_t>(shared), tokens.end(),
                    [&] { return random() % 128'000; });
      leaves.push_back(putter.Put(tokens).node);
    }
    // 1. Offered for eviction in the order of their last use, which is not that of memory.
    // 2. Then every second one is looked up, which leaves its rank in the heap stale.
    std::shuffle(leaves.begin(), leaves.end(), random);
    uint64_t rank = putter.NextRank();
    const auto touch = [&](TreeNode* leaf) {
      ++rank;
      for (TreeBlock& block : leaf->blocks) block.rank = rank;
    };
    for (TreeNode* leaf : leaves) {
      touch(leaf);
      tree.Reorder(leaf);
    }
    for (size_t i = 0; i < leaves.size(); i += 2) touch(leaves[i]);
  }
};

absl::Status MeasureEvict() {
  constexpr int kTrees = 7;
  constexpr int kStretches = 20;
  constexpr int kStretchBlocks = 500;
  std::vector<double> runs;
  std::vector<double> rebuild_runs;
  for (int run = 0; run < kTrees; ++run) {
    LeafyTree leafy;
    LARDER_CHECK(leafy.tree.nodes() >= leafy.leaves.size());
    // What an eviction costs where the heap of leaves is built anew for it.
    rebuild_runs.push_back(Timed([&] {
                             std::vector<std::pair<uint64_t, TreeNode*>> heap;
                             for (TreeNode* leaf : leafy.leaves) {
                               heap.emplace_back(leaf->blocks.back().rank, leaf);
                             }
                             std::make_heap(heap.begin(), heap.end(), std::greater<>());
                             LARDER_CHECK(heap.front().second != nullptr);
                           }) *
                           1e6);
    // Every stretch meets as many stale ranks as any other, so each is the amortised cost.
    std::vector<double> stretches;
    for (int stretch = 0; stretch < kStretches; ++stretch) {
      const double seconds = Timed([&] {
        for (int i = 0; i < kStretchBlocks; ++i) {
          TreeNode* node = leafy.tree.Victim(kGpuSet);
          leafy.tree.Detach(node, node->count[kGpuSet] - 1, Tier::kGpu);
          leafy.tree.Trim(node);
        }
      });
      stretches.push_back(seconds * 1e6 / kStretchBlocks);
    }
    runs.push_back(Median(std::move(stretches)));
  }
  const double rebuild = Median(rebuild_runs);
  Print({"tree_evict_us",
         Median(runs),
         "us",
         absl::StrFormat("building a heap of 100,000 leaves: %.0f us", rebuild),
         Median(runs) / rebuild,
         {Goal::kAtMost, 1, "SGLang, a call, published: 1200"}},
        runs);
  return absl::OkStatus();
}

// Bytes that malloc has given out.
uint64_t AllocatedBytes() {
  const struct mallinfo2 info = mallinfo2();
  return info.uordblks + info.hblkhd;
}

absl::Status MeasureBytes() {
  const Workload workload = MakeWorkload({.block_tokens = 16});
  for (const bool whole : {true, false}) {
    const uint64_t before = AllocatedBytes();
    const auto tree = std::make_unique<HiRadixTree>(workload.options.block_tokens);
    whole ? PutWhole(*tree, workload) : PutByBlock(*tree, workload);
    const double blocks = static_cast<double>(tree->blocks());
    const double token_bytes = workload.options.block_tokens * sizeof(uint32_t);
    const double bytes = static_cast<double>(AllocatedBytes() - before) / blocks - token_bytes;
    const double account = static_cast<double>(tree->memory_bytes()) / blocks;
    Goal goal;
    if (whole) goal = {Goal::kAtMost, 120, ""};
    Print({whole ? "tree_bytes_per_block" : "tree_bytes_per_block_put_by_block", bytes, "B",
           absl::StrFormat("the tokens: %.0f B; memory_bytes() says %.1f", token_bytes, account),
           bytes / token_bytes, goal},
          {bytes});
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace larder::bench

int main(int argc, char** argv) {
  using namespace larder::bench;
  return RunBenchmarks(
      {argv + 1, argv + argc},
      {{{"tree_match_14k_us", "tree_match_put_by_block"}, MeasureMatch},
       {{"tree_insert_14k_us"}, MeasureInsert},
       {{"tree_insert_14k_growing_us"}, MeasureInsertGrowing},
       {{"tree_evict_us"}, MeasureEvict},
       {{"tree_match_growth"}, MeasureGrowth},
       {{"tree_bytes_per_block", "tree_bytes_per_block_put_by_block"}, MeasureBytes},
       {{"tree_lookup_release_14k_us"}, MeasureCacheLookup}});
}
