// LookupPrefix: the walk in memory, then NVMe by chained key, then the lease.
//
//   1. Locked: match in the tree. A match that ends in a block that is not on NVMe cannot go
//      on there (the tier is prefix-closed), and most lookups end here.
//   2. Unlocked: hash the blocks that follow.
//   3. Locked: match again, since the tree may have changed; ask the index for each key;
//      add what was found to the tree, pinned on NVMe; pin everything else where it is best
//      read.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "server/cache/block_key.h"
#include "server/cache/cache_state.h"
#include "storage/check.h"

namespace larder {

// The key of the block before `end` in `node` (or of the root), hashing what is not known.
// Runs of calls with growing ends hash every block once.
BlockKey Cache::KeyAt(ModelState& model, TreeNode* node, uint32_t end) {
  if (node->parent == nullptr) return model.model.fingerprint;
  const uint32_t count = end - node->begin;
  if (count == 0) return KeyAt(model, node->parent, end);
  if (node->hashed == count) return node->key;
  uint32_t at = node->hashed < count ? node->hashed : 0;
  BlockKey key = at > 0 ? node->key : KeyAt(model, node->parent, node->begin);
  for (; at < count; ++at) key = ChildKey(key, model.tree.TokensOf(node, at));
  if (node->hashed < count) {
    node->hashed = count;
    node->key = key;
  }
  return key;
}

// One lookup under way: who asks, what matches in memory, and what goes on on NVMe.
struct Cache::Probe {
  ModelState* model = nullptr;
  Session* session = nullptr;  // null for a peek
  Lease* lease = nullptr;      // to extend; null: a new one
  uint32_t start = 0;          // blocks before the request's tokens
  uint32_t asked = 0;          // blocks, `start` included
  HiRadixTree::Position at;    // of the match in memory
  bool lost_block = false;     // the match was cut where no copy is left
  std::vector<Slot> cold;      // NVMe slots of the blocks after `at`
};

absl::StatusOr<LookupResult> Cache::Lookup(SessionId session, ModelId model,
                                           std::span<const uint32_t> tokens,
                                           const LookupOptions& options) {
  ColdKeys keys;
  while (true) {
    uint32_t block_tokens = 0;
    {
      Section section(*this);
      absl::StatusOr<Probe> probe = MatchInMemory(session, model, tokens, options);
      if (!probe.ok()) return probe.status();
      if (FindCold(*probe, keys)) return Grant(*probe, tokens, options, keys);
      block_tokens = probe->model->tree.block_tokens();
    }
    BlockKey key = keys.keys.empty() ? keys.parent : keys.keys.back();
    while (keys.begin + keys.keys.size() < keys.wanted) {
      const uint64_t at = keys.begin + keys.keys.size() - keys.start;
      key = ChildKey(key, tokens.subspan(at * block_tokens, block_tokens));
      keys.keys.push_back(key);
    }
  }
}

absl::StatusOr<Cache::Probe> Cache::MatchInMemory(SessionId session, ModelId model_id,
                                                  std::span<const uint32_t> tokens,
                                                  const LookupOptions& options) {
  Probe probe;
  absl::StatusOr<ModelState*> model = FindState(model_id);
  if (!model.ok()) return model.status();
  probe.model = *model;
  HiRadixTree& tree = probe.model->tree;
  HiRadixTree::Position from = tree.Start();
  if (!options.peek) {
    absl::StatusOr<Session*> found = FindSession(session);
    if (!found.ok()) return found.status();
    probe.session = *found;
  }
  if (options.lease != 0) {
    absl::StatusOr<Lease*> found = FindLease(session, options.lease);
    if (!found.ok()) return found.status();
    probe.lease = *found;
    if (absl::Status status = CheckExtend(*probe.lease, *probe.model); !status.ok()) return status;
    from = tree.Resolve(probe.lease->cursor);
  } else if (probe.session != nullptr) {
    if (absl::Status status = CheckLeaseCount(*probe.session); !status.ok()) return status;
  }
  probe.start = from.end;
  probe.asked = from.end + static_cast<uint32_t>(tokens.size() / tree.block_tokens());
  probe.at = tree.Match(from, tokens);
  const uint32_t matched = probe.at.end;
  for (const PathPart& part : tree.PathTo(probe.at, probe.start)) {
    for (uint32_t i = part.begin; i < part.end && !probe.lost_block; ++i) {
      if (Offered(part.node->blocks[i])) continue;
      probe.lost_block = true;
      probe.at.end = part.node->begin + i;
    }
  }
  if (probe.at.end != matched) probe.at = tree.Above(probe.at);
  return probe;
}

absl::Status Cache::CheckExtend(const Lease& lease, const ModelState& model) const {
  if (lease.model != &model) {
    return absl::InvalidArgumentError(absl::StrCat(
        "model_id: ", absl::Hex(model.model.id, absl::kZeroPad16), " given, the lease is of ",
        absl::Hex(lease.model->model.id, absl::kZeroPad16)));
  }
  if (!lease.reserved.empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("lease_id: the lease has ", lease.reserved.size(),
                     " reserved blocks past its end; Put or Truncate first"));
  }
  return absl::OkStatus();
}

// From which known key hashing can start for a match that ends at `probe.at`.
void Cache::StartKeys(const Probe& probe, ColdKeys& keys) {
  ModelState& model = *probe.model;
  keys.start = probe.start;
  TreeNode* node = probe.at.node;
  for (; node->parent != nullptr && node->begin + node->hashed >= probe.start;
       node = node->parent) {
    if (node->hashed == 0 || node->begin + node->hashed > probe.at.end) continue;
    keys.begin = node->begin + node->hashed;
    keys.parent = node->key;
    return;
  }
  // Nothing known within the request: its own first block is next. The walk above may have
  // gone past the node that `start` is in.
  node = probe.at.node;
  while (node->parent != nullptr && probe.start <= node->begin) node = node->parent;
  keys.begin = probe.start;
  keys.parent = KeyAt(model, node, probe.start);
}

// Asks the index for what follows the match. False when keys are missing: hash up to
// `keys.wanted` and ask again.
bool Cache::FindCold(Probe& probe, ColdKeys& keys) {
  const uint32_t end = probe.at.end;
  if (probe.lost_block || end >= probe.asked || s_->nvme.size() == 0) return true;
  Slot parent;
  if (end > 0) {
    const TreeBlock& last = probe.at.node->blocks[end - probe.at.node->begin - 1];
    if (!Durable(last)) return true;
    parent = last.In(Tier::kNvme);
  }
  if (keys.wanted == 0) {
    // The first key tells most misses.
    StartKeys(probe, keys);
    keys.wanted = end + 1;
    return false;
  }
  if (end < keys.begin) return true;  // evicted since; a shorter match
  while (end + probe.cold.size() < probe.asked) {
    const uint64_t at = end + probe.cold.size();
    if (at >= keys.begin + keys.keys.size()) {
      keys.wanted = probe.asked;
      return false;
    }
    parent = s_->nvme.Find(keys.keys[at - keys.begin], parent);
    if (!parent) return true;
    probe.cold.push_back(parent);
  }
  return true;
}

// Where the newly matched blocks are, without pinning them.
std::vector<SlotRun> Cache::RunsOf(const Probe& probe) const {
  std::vector<SlotRun> runs;
  const auto add = [&](Tier tier, uint32_t position, Slot slot) {
    if (runs.empty() || runs.back().tier != tier) runs.push_back({tier, position, {}});
    runs.back().slots.push_back(slot);
  };
  for (const PathPart& part : probe.model->tree.PathTo(probe.at, probe.start)) {
    for (uint32_t i = part.begin; i < part.end; ++i) {
      const TreeBlock& block = part.node->blocks[i];
      add(*BestTier(block), part.node->begin + i, block.In(*BestTier(block)));
    }
  }
  for (size_t i = 0; i < probe.cold.size(); ++i) {
    add(Tier::kNvme, probe.at.end + static_cast<uint32_t>(i), probe.cold[i]);
  }
  return runs;
}

// Makes blocks that only NVMe holds part of the tree; the caller pins them at once.
void Cache::AddCold(Probe& probe, std::span<const uint32_t> tokens, const ColdKeys& keys) {
  HiRadixTree& tree = probe.model->tree;
  const uint32_t from = probe.at.end;
  probe.at = tree.Append(
      probe.at, tokens.subspan(uint64_t{from - probe.start} * tree.block_tokens(),
                               probe.cold.size() * tree.block_tokens()));
  for (const PathPart& part : tree.PathTo(probe.at, from)) {
    for (uint32_t i = part.begin; i < part.end; ++i) {
      const uint32_t position = part.node->begin + i;
      tree.Attach(part.node, i, Tier::kNvme, probe.cold[position - from]);
      part.node->blocks[i].nvme_tag = keys.keys[position - keys.begin].Tag();
      if (part.node->written == i) part.node->written = i + 1;
    }
  }
}

LookupResult Cache::Grant(Probe& probe, std::span<const uint32_t> tokens,
                          const LookupOptions& options, const ColdKeys& keys) {
  LookupResult result;
  result.block_tokens = probe.model->tree.block_tokens();
  std::array<uint32_t, kTierCount> by_tier = {};
  if (options.peek || options.prefill_tokens_per_second > 0 || !probe.cold.empty()) {
    for (const SlotRun& run : RunsOf(probe)) {
      by_tier[larder::Index(run.tier)] += static_cast<uint32_t>(run.slots.size());
    }
    const uint32_t all = by_tier[0] + by_tier[1] + by_tier[2];
    const uint32_t keep = CutByBreakEven(*probe.model, by_tier, options.prefill_tokens_per_second,
                                         &result.restore);
    result.restore.cut_blocks = all - keep;
    const uint32_t end = probe.start + keep;
    probe.cold.resize(end > probe.at.end ? end - probe.at.end : 0);
    if (end < probe.at.end) probe.at = probe.model->tree.Above({probe.at.node, end});
  }
  result.matched_blocks = probe.at.end + static_cast<uint32_t>(probe.cold.size());
  if (options.peek) {
    result.runs = RunsOf(probe);
    return result;
  }
  if (!probe.cold.empty()) AddCold(probe, tokens, keys);
  Lease& lease = probe.lease != nullptr ? *probe.lease : NewLease(*probe.session, *probe.model);
  probe.model->tree.Bind(lease.cursor, probe.at);
  result.lease = lease.id;
  result.runs = PinBest(lease, probe.start, probe.at.end);
  TouchPath(*probe.model, probe.at);
  for (const SlotRun& run : result.runs) {
    s_->tiers[larder::Index(run.tier)].hits += run.slots.size();
  }
  s_->counters.lookups += 1;
  s_->counters.lookup_blocks += probe.asked - probe.start;
  s_->counters.miss_blocks += probe.asked - probe.at.end;
  return result;
}

// The path was used now. On NVMe a touch of its deepest block counts for those above it.
void Cache::TouchPath(ModelState& model, HiRadixTree::Position at) {
  s_->operation += 1;
  const TreeBlock* deepest = nullptr;
  for (const PathPart& part : model.tree.PathTo(at, 0)) {
    part.node->hits += 1;
    for (uint32_t i = part.begin; i < part.end; ++i) {
      TreeBlock& block = part.node->blocks[i];
      // Its conversation goes on: now it is worth writing.
      if (!WorthWriting(block)) model.tree.Enlist(HiRadixTree::kDirtyList, part.node);
      block.rank = policy_->Touched(block.rank, s_->operation);
      block.in_transit = false;
      if (block.In(Tier::kNvme)) deepest = &block;
    }
  }
  if (deepest != nullptr && Durable(*deepest)) s_->nvme.Touch(deepest->In(Tier::kNvme));
}

// How many leading blocks are worth restoring: of "what is in GPU", "and in HOST", "and on
// NVME", the one that saves most time over computing the rest.
uint32_t Cache::CutByBreakEven(const ModelState& model,
                               const std::array<uint32_t, kTierCount>& blocks,
                               double prefill_tokens_per_second, RestoreEstimate* estimate) const {
  const bool gpu = options_.tiers[larder::Index(Tier::kGpu)].bytes > 0;
  const double block_bytes = model.model.WholeBlockBytes();
  const auto seconds = [&](Tier from, Tier to, double count) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const Hop& hop = HopOf(from, to);
    return (static_cast<double>(hop.queued_bytes) + count * block_bytes) / hop.BytesPerSecond();
  };
  double best_saved = 0;
  double restore = 0;
  double best_restore = 0;
  uint32_t keep = blocks[0];
  uint32_t end = blocks[0];
  uint32_t above = 0;
  for (Tier tier : {Tier::kHost, Tier::kNvme}) {
    const uint32_t count = blocks[larder::Index(tier)];
    if (count == 0) continue;
    end += count;
    above += count;
    if (tier == Tier::kNvme) restore += seconds(Tier::kNvme, Tier::kHost, count);
    if (gpu) {
      restore += tier == Tier::kHost ? seconds(Tier::kHost, Tier::kGpu, count)
                                     : count * block_bytes / HopOf(Tier::kHost, Tier::kGpu).BytesPerSecond();
    }
    const double compute = prefill_tokens_per_second > 0
                               ? double{1.0} * above * model.model.spec.block_tokens /
                                     prefill_tokens_per_second
                               : restore + above;
    if (compute - restore > best_saved) {
      best_saved = compute - restore;
      best_restore = restore;
      keep = end;
    }
  }
  estimate->bytes = keep > blocks[0] + blocks[1]
                        ? static_cast<uint64_t>(blocks[2]) * model.model.WholeBlockBytes()
                        : 0;
  estimate->time = absl::Seconds(best_restore);
  return keep;
}

}  // namespace larder
