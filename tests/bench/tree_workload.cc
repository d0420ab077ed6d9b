#include "tree_workload.h"

#include <algorithm>
#include <random>

namespace larder::bench {
namespace {

void AppendRandom(std::vector<uint32_t>& tokens, uint64_t count, std::mt19937& random) {
  for (uint64_t i = 0; i < count; ++i) tokens.push_back(random() % 128'000);
}

}  // namespace

Workload MakeWorkload(const WorkloadOptions& options) {
  Workload result{options, {}, {}};
  std::mt19937 random(options.seed);
  // 1. Where each odd document leaves the even one before it, in blocks past the trunk.
  std::vector<uint32_t> fork(options.documents, 0);
  uint64_t shared = 0;
  for (uint32_t i = 1; i < options.documents; i += 2) {
    fork[i] = 1 + random() % 99;
    shared += fork[i];
  }
  // 2. The length that makes the sum right.
  const uint32_t trunks = (options.documents + kDocumentsATrunk - 1) / kDocumentsATrunk;
  const uint64_t bodies = options.blocks - uint64_t{trunks} * kTrunkBlocks + shared;
  const uint64_t body_blocks = (bodies + options.documents / 2) / options.documents;
  // 3. The tokens.
  std::vector<uint32_t> trunk;
  for (uint32_t i = 0; i < options.documents; ++i) {
    if (i % kDocumentsATrunk == 0) {
      trunk.clear();
      AppendRandom(trunk, uint64_t{kTrunkBlocks} * options.block_tokens, random);
    }
    std::vector<uint32_t> document = trunk;
    if (fork[i] > 0) {
      const auto& before = result.documents[i - 1];
      document.assign(before.begin(),
                      before.begin() + uint64_t{kTrunkBlocks + fork[i]} * options.block_tokens);
    }
    AppendRandom(document, (kTrunkBlocks + body_blocks) * options.block_tokens - document.size(),
                 random);
    result.documents.push_back(std::move(document));
  }
  const uint64_t prompt_tokens = uint64_t{kPromptBlocks} * options.block_tokens;
  for (const auto& document : result.documents) {
    result.prompts.emplace_back(document.begin(), document.begin() + prompt_tokens);
  }
  return result;
}

std::vector<uint32_t> NewPrompt(const Workload& workload, uint32_t like, uint32_t seed) {
  std::mt19937 random(seed);
  const uint64_t block = workload.options.block_tokens;
  const auto& document = workload.documents[like];
  std::vector<uint32_t> prompt(document.begin(), document.begin() + kTrunkBlocks * block);
  AppendRandom(prompt, (kPromptBlocks - kTrunkBlocks) * block, random);
  return prompt;
}

TreePosition Putter::Put(TreePosition from, std::span<const uint32_t> tokens) {
  const TreePosition matched = tree_.Match(from, tokens);
  const uint64_t known = uint64_t{matched.end - from.end} * tree_.block_tokens();
  const TreePosition at = tree_.Append(matched, tokens.subspan(known));
  const uint64_t rank = NextRank();
  for (const PathPart& part : tree_.PathTo(at, from.end)) {
    for (uint32_t i = part.begin; i < part.end; ++i) {
      TreeBlock& block = part.node->blocks[i];
      block.rank = rank;
      if (!block.In(Tier::kGpu)) tree_.Attach(part.node, i, Tier::kGpu, Slot(++slot_));
    }
  }
  return at;
}

void PutWhole(HiRadixTree& tree, const Workload& workload) {
  Putter putter(tree);
  for (const auto& document : workload.documents) putter.Put(document);
}

void PutByBlock(HiRadixTree& tree, const Workload& workload) {
  Putter putter(tree);
  const uint64_t block = workload.options.block_tokens;
  // Each document has a cursor, as a lease has: positions move when others split a node.
  std::vector<Cursor> cursors(workload.documents.size());
  for (Cursor& cursor : cursors) tree.Bind(cursor, tree.Start());
  const uint64_t tokens = workload.documents.front().size();
  for (uint64_t at = 0; at < tokens; at += block) {
    for (size_t i = 0; i < cursors.size(); ++i) {
      const std::span<const uint32_t> next = std::span(workload.documents[i]).subspan(at, block);
      tree.Bind(cursors[i], putter.Put(tree.Resolve(cursors[i]), next));
    }
  }
  for (Cursor& cursor : cursors) tree.Unbind(cursor);
}

uint32_t LookUp(HiRadixTree& tree, std::span<const uint32_t> prompt, uint64_t rank,
                std::vector<Slot>& slots) {
  slots.clear();
  const TreePosition at = tree.Match(tree.Start(), prompt);
  for (const PathPart& part : tree.PathTo(at, 0)) {
    part.node->hits += 1;
    for (uint32_t i = part.begin; i < part.end; ++i) {
      TreeBlock& block = part.node->blocks[i];
      slots.push_back(block.In(Tier::kGpu));
      block.rank = rank;
    }
  }
  return at.end;
}

}  // namespace larder::bench
