// What people ask, and what tests check.
#include <algorithm>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "server/cache/block_key.h"
#include "server/cache/cache_state.h"
#include "storage/check.h"

namespace larder {
namespace {

// Of sessions, leases, nodes or blocks: what an inspection looks at before it gives the mutex
// to those who work.
constexpr uint64_t kAtOnce = 512;

}  // namespace

CacheStats Cache::Stats() const {
  absl::MutexLock lock(&mu_);
  CacheStats stats = s_->counters;
  for (Tier tier : kTiers) {
    const int t = larder::Index(tier);
    const State::TierState& state = s_->tiers[t];
    TierStats& out = stats.tiers[t];
    out.bytes_total = state.slots.bytes();
    out.hits = state.hits;
    out.evictions = tier == Tier::kNvme ? s_->nvme.evictions() : state.evictions;
    out.blocks = tier == Tier::kNvme ? s_->nvme.size() : 0;
    for (const auto& model : s_->models) {
      const uint64_t stride = state.slots.stride(model->pool[t]);
      if (tier != Tier::kNvme) {
        out.bytes_used += state.slots.taken(model->pool[t]) * stride;
        out.blocks += model->blocks[t];
      }
      out.bytes_pinned += (model->pinned[t] + model->held[t]) * stride;
    }
    if (tier != Tier::kNvme) continue;
    for (const auto& [id, pool] : s_->nvme_pools) {
      out.bytes_used += state.slots.taken(pool.pool) * state.slots.stride(pool.pool);
    }
  }
  for (const Hop& hop : s_->hops) {
    stats.hops.push_back({hop.from, hop.to, hop.in_flight, hop.done, hop.failed, hop.bytes,
                          hop.BytesPerSecond()});
  }
  stats.models = s_->models.size();
  for (const auto& [id, session] : s_->sessions) {
    session->lost ? ++stats.sessions_lost : ++stats.sessions;
  }
  stats.leases = s_->leases.size();
  stats.moves_in_flight = s_->moves.size();
  return stats;
}

std::vector<ModelStats> Cache::Models() const {
  absl::MutexLock lock(&mu_);
  std::vector<ModelStats> all;
  for (const auto& model : s_->models) {
    ModelStats stats;
    stats.model = model->model;
    stats.nodes = model->tree.nodes();
    stats.blocks = model->tree.blocks();
    for (int t = 0; t < kTierCount; ++t) {
      const SlotAllocator& slots = s_->tiers[t].slots;
      stats.bytes_used[t] = slots.taken(model->pool[t]) * slots.stride(model->pool[t]);
      const uint64_t slabs = slots.slab_count() / s_->models.size();
      stats.bytes_quota[t] =
          std::min(slots.bytes(), std::max<uint64_t>(1, slabs) * slots.slab_bytes());
    }
    all.push_back(std::move(stats));
  }
  return all;
}

std::vector<SessionInfo> Cache::Sessions(bool leases) const {
  std::vector<SessionInfo> all;
  SessionId next = 0;
  while (true) {
    absl::MutexLock lock(&mu_);
    const absl::Time now = clock_.Now();
    auto it = s_->sessions.lower_bound(next);
    for (uint64_t seen = 0; it != s_->sessions.end() && seen < kAtOnce; ++it) {
      const Session& session = *it->second;
      SessionInfo info;
      info.session = session.secret ? 0 : session.id;
      info.worker = session.worker;
      info.lost = session.lost;
      info.age = now - session.opened;
      info.lease_count = session.leases.size();
      for (const auto& [lease_id, lease] : session.leases) {
        if (!leases) break;
        info.leases.push_back({lease_id, lease->model->model.id, lease->end(),
                               static_cast<uint32_t>(lease->reserved.size()),
                               static_cast<uint32_t>(lease->duplicates.size()),
                               now - lease->opened});
      }
      seen += 1 + info.leases.size();
      all.push_back(std::move(info));
    }
    if (it == s_->sessions.end()) return all;
    next = it->first;
  }
}

absl::StatusOr<Explanation> Cache::Explain(ModelId id, std::span<const uint32_t> tokens) const {
  absl::MutexLock lock(&mu_);
  absl::StatusOr<ModelState*> found = FindState(id);
  if (!found.ok()) return found.status();
  ModelState& model = **found;
  HiRadixTree& tree = model.tree;
  Explanation out;
  out.asked_blocks = static_cast<uint32_t>(tokens.size() / tree.block_tokens());
  const HiRadixTree::Position at = tree.Match(tree.Start(), tokens);
  bool lost = false;
  for (const PathPart& part : tree.PathTo(at, 0)) {
    for (uint32_t i = part.begin; i < part.end && !lost; ++i) {
      const TreeBlock& block = part.node->blocks[i];
      const std::array<bool, kTierCount> in = {static_cast<bool>(block.slot[0]),
                                               static_cast<bool>(block.slot[1]), Durable(block)};
      if (!Offered(block)) {
        lost = true;
        break;
      }
      const uint32_t pins = std::max({block.pins[0], block.pins[1], block.pins[2]});
      const bool same = !out.segments.empty() && i > part.begin &&
                        out.segments.back().in_tier == in && out.segments.back().pins == pins;
      if (!same) out.segments.push_back({part.node->begin + i, 0, in, pins, part.node->hits, 0});
      ExplainSegment& segment = out.segments.back();
      segment.blocks += 1;
      segment.children = i + 1 < part.node->size()
                             ? 1
                             : static_cast<uint32_t>(part.node->children.size());
      out.matched_blocks = part.node->begin + i + 1;
    }
  }
  ExplainCold(model, at.node, at.end, tokens, &out);
  if (lost) {
    out.stopped_because = "the next block's copies were all lost; it must be computed again";
  } else if (out.matched_blocks == out.asked_blocks) {
    out.stopped_because = "everything asked for is cached";
  } else if (out.matched_blocks == 0 && tree.blocks() == 0 && s_->nvme.size() == 0) {
    out.stopped_because = "nothing of this model is cached";
  } else {
    out.stopped_because =
        absl::StrCat("no cached block continues with tokens ",
                     uint64_t{out.matched_blocks} * tree.block_tokens(), " to ",
                     uint64_t{out.matched_blocks + 1} * tree.block_tokens() - 1);
  }
  return out;
}

// What NVMe holds past the match in memory.
void Cache::ExplainCold(ModelState& model, TreeNode* node, uint32_t end,
                        std::span<const uint32_t> tokens, Explanation* out) const {
  const uint32_t block_tokens = model.tree.block_tokens();
  if (out->matched_blocks != end || end == out->asked_blocks || s_->nvme.size() == 0) return;
  Slot slot;
  if (end > 0) {
    const TreeBlock& last = node->blocks[end - node->begin - 1];
    if (!Durable(last)) return;
    slot = last.In(Tier::kNvme);
  }
  BlockKey key = KeyAt(model, node, end);
  uint32_t found = 0;
  while (end + found < out->asked_blocks) {
    key = ChildKey(key, tokens.subspan(uint64_t{end + found} * block_tokens, block_tokens));
    slot = s_->nvme.Find(key, slot);
    if (!slot) break;
    found += 1;
  }
  if (found == 0) return;
  out->segments.push_back({end, found, {false, false, true}, 0, 0, 0});
  out->matched_blocks += found;
}

std::vector<TopPrefix> Cache::TopPrefixes(ModelId id, uint32_t count) const {
  const auto before = [](const TopPrefix& a, const TopPrefix& b) {
    return std::pair(a.hits, a.blocks) > std::pair(b.hits, b.blocks);
  };
  std::vector<TopPrefix> top;  // a heap with the least of them in front
  std::vector<uint64_t> path;
  for (size_t at = 0;;) {
    absl::MutexLock lock(&mu_);
    for (uint64_t seen = 0; seen < kAtOnce; ++seen) {
      if (at == s_->models.size()) {
        std::sort_heap(top.begin(), top.end(), before);
        return top;
      }
      const ModelState& model = *s_->models[at];
      const bool wanted = id == 0 || model.model.id == id;
      const TreeNode* const node = wanted ? model.tree.Next(path) : nullptr;
      if (node == nullptr) {
        ++at;
        path.clear();
        continue;
      }
      TopPrefix prefix{model.model.id, node->end(), node->hits, {}};
      if (top.size() == count && (count == 0 || !before(prefix, top.front()))) continue;
      if (top.size() == count) {
        std::pop_heap(top.begin(), top.end(), before);
        top.pop_back();
      }
      const TreeNode* first = node;
      while (first->parent->parent != nullptr) first = first->parent;
      prefix.head.assign(first->tokens.begin(),
                         first->tokens.begin() + std::min<size_t>(16, first->tokens.size()));
      top.push_back(std::move(prefix));
      std::push_heap(top.begin(), top.end(), before);
    }
  }
}

std::pair<uint64_t, uint64_t> Cache::Evict(Tier tier, ModelId id, uint64_t blocks) {
  const int t = larder::Index(tier);
  uint64_t dropped = 0;
  uint64_t kept = 0;
  uint64_t left = 0;  // of the model that is being worked on; what comes later may stay
  bool begun = false;
  for (size_t at = 0;;) {
    Section section(*this);
    if (at == s_->models.size()) return {dropped, kept};
    ModelState& model = *s_->models[at];
    const auto held = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      return tier == Tier::kNvme ? s_->tiers[t].slots.taken(model.pool[t]) : model.blocks[t];
    };
    if (id != 0 && model.model.id != id) {
      ++at;
      continue;
    }
    if (!begun) left = std::min(blocks - dropped, held());
    begun = true;
    const uint64_t now = std::min(left, kAtOnce);
    uint64_t done = 0;
    while (done < now && held() > 0 &&
           (tier == Tier::kNvme ? s_->nvme.EvictOne(model.pool[t])
                                : MakeRoom(model, tier, /*drop_dirty=*/true))) {
      ++done;
    }
    dropped += done;
    left -= done;
    if (done == now && left > 0) continue;
    kept += held();
    begun = false;
    ++at;
  }
}

// Every slot has one owner, and every pin a holder.
void Cache::CheckInvariants() const {
  absl::MutexLock lock(&mu_);
  std::array<absl::flat_hash_set<Slot>, kTierCount> owned;
  const auto own = [&](Tier tier, Slot slot) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    LARDER_CHECK(s_->tiers[larder::Index(tier)].slots.IsTaken(slot));
    LARDER_CHECK(owned[larder::Index(tier)].insert(slot).second, "a slot has two owners");
  };
  absl::flat_hash_map<std::pair<const TreeNode*, uint32_t>, std::array<uint32_t, 3>> pins;
  uint64_t reserved = 0;
  for (const auto& [id, lease] : s_->leases) {
    reserved += lease->reserved.size();
    for (Slot slot : lease->reserved) own(lease->reserved_tier, slot);
    const HiRadixTree& tree = lease->model->tree;
    for (const PathPart& part : tree.PathTo(tree.Resolve(lease->cursor), 0)) {
      for (uint32_t i = part.begin; i < part.end; ++i) {
        const uint32_t at = part.node->begin + i;
        auto& count = pins[{part.node, i}];
        count[0] += at < lease->gpu_end;
        for (const Lease::PinnedRange& range : lease->pins) {
          count[larder::Index(range.tier)] += at >= range.begin && at < range.end;
        }
      }
    }
  }
  LARDER_CHECK(reserved == s_->counters.reserved_blocks);
  absl::flat_hash_set<const SlotRef*> duplicates;
  for (const auto& [id, lease] : s_->leases) {
    for (const Lease::Duplicate& duplicate : lease->duplicates) {
      if (duplicates.insert(duplicate.slot.get()).second) {
        own(duplicate.slot->tier, duplicate.slot->slot);
      }
    }
  }
  absl::flat_hash_set<SlotRef> sources;
  absl::flat_hash_set<MoveId> followers;
  for (const auto& [id, move] : s_->moves) sources.insert(move->to);
  for (const auto& [id, move] : s_->moves) {
    if (move->to.tier != Tier::kNvme) own(move->to.tier, move->to.slot);
    for (MoveId follower : move->followers) followers.insert(follower);
    if (move->phase == Move::Phase::kBlocked) {
      // Somebody brings the copy it starts from.
      LARDER_CHECK(sources.contains(move->from), "a second hop without a first");
      continue;
    }
    const HiRadixTree::Position at = move->model->tree.Resolve(move->at);
    pins[{at.node, at.end - 1 - at.node->begin}][larder::Index(move->from.tier)] += 1;
    LARDER_CHECK(move->from.tier == Tier::kNvme ||
                 at.node->blocks[at.end - 1 - at.node->begin].In(move->from.tier) ==
                     move->from.slot);
  }
  for (const auto& [id, move] : s_->moves) {
    LARDER_CHECK((move->phase == Move::Phase::kArrived) == followers.contains(id));
  }
  for (const auto& model : s_->models) {
    model->tree.CheckInvariants();
    std::array<uint64_t, kTierCount> blocks{};
    std::array<uint64_t, kTierCount> pinned{};
    model->tree.ForEachNode([&](TreeNode* node) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      for (uint32_t i = 0; i < node->size(); ++i) {
        const TreeBlock& block = node->blocks[i];
        const auto expected = pins.find({node, i});
        for (Tier tier : kTiers) {
          const int t = larder::Index(tier);
          LARDER_CHECK(block.pins[t] == (expected == pins.end() ? 0 : expected->second[t]));
          blocks[t] += tier != Tier::kNvme && block.In(tier);
          pinned[t] += block.pins[t] > 0;
          if (tier == Tier::kNvme || !block.In(tier)) continue;
          own(tier, block.In(tier));
          const State::TierState& state = s_->tiers[larder::Index(tier)];
          const SlotAllocator::Place at = state.slots.Locate(block.In(tier));
          LARDER_CHECK(state.owners.In(at.slab)[at.index] == node, "a slot's owner is wrong");
        }
      }
    });
    LARDER_CHECK(blocks == model->blocks && pinned == model->pinned);
  }
  s_->nvme.CheckInvariants();
  for (Tier tier : {Tier::kGpu, Tier::kHost}) {
    uint64_t taken = 0;
    for (const auto& model : s_->models) {
      taken += s_->tiers[larder::Index(tier)].slots.taken(model->pool[larder::Index(tier)]);
    }
    LARDER_CHECK(taken == owned[larder::Index(tier)].size(), "a slot has no owner");
  }
}

}  // namespace larder
