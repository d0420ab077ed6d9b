// larder simulate: the cache's own code on a trace, without a daemon, bytes or time.
//
// Requests come one at a time and are instantaneous; each id of the trace is one block.
// Moves complete at once. A tier of C blocks gets room for C plus twice the longest request,
// and the cleaner keeps that much free: between requests it holds at most C blocks.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/commands.h"
#include "client/flags.h"
#include "client/json.h"
#include "client/output.h"
#include "client/trace.h"
#include "server/cache/cache.h"
#include "server/cache/eviction_policy.h"

namespace larder::cli {
namespace {

constexpr char kCommand[] = "simulate";
constexpr uint64_t kUnbounded = std::numeric_limits<uint64_t>::max();
constexpr uint64_t kTierBlocksMax = 100'000'000;

class StandingClock final : public Clock {
 public:
  absl::Time Now() const override { return absl::UnixEpoch(); }
};

// Completes every move with success, when told to.
class InstantMover final : public Mover {
 public:
  absl::Status Submit(const MoveJob& job) override {
    queue_.push_back(job.id);
    nvme_writes_ += job.to.tier == Tier::kNvme;
    return absl::OkStatus();
  }
  void Raise(MoveId) override {}
  void Erase(Slot, uint32_t) override {}

  uint64_t nvme_writes() const { return nvme_writes_; }
  void CompleteAll(Cache& cache) {
    while (!queue_.empty()) {
      const MoveId id = queue_.front();
      queue_.pop_front();
      cache.OnMoveDone(id, absl::OkStatus());
    }
  }

 private:
  std::deque<MoveId> queue_;
  uint64_t nvme_writes_ = 0;
};

struct SimulateFlags {
  std::string trace;
  std::string blocks[kTierCount] = {"0", "0", "0"};
  std::string policy = "lru";
  uint64_t limit = kUnbounded;
  bool finish = false;
};

struct Result {
  uint64_t requests = 0;
  uint64_t refs = 0;
  uint64_t hits = 0;
  uint64_t by_tier[kTierCount] = {};
  uint64_t evictions[kTierCount] = {};
  uint64_t nvme_writes = 0;
  uint64_t exhausted = 0;
  uint64_t signature = 1469598103934665603ull;  // FNV-1a-64 of each request's hits, LE u32

  void Add(const TraceRequest& request, const LookupResult& found) {
    requests += 1;
    refs += request.block_ids.size();
    hits += found.matched_blocks;
    for (const SlotRun& run : found.runs) by_tier[Index(run.tier)] += run.slots.size();
    for (int shift = 0; shift < 32; shift += 8) {
      signature = (signature ^ (found.matched_blocks >> shift & 0xff)) * 1099511628211ull;
    }
  }
};

// Up to `hit` blocks come up, the others are computed and put; as far as there is room.
absl::Status Serve(Cache& cache, InstantMover& mover, SessionId session, ModelId model,
                   const TraceRequest& request, bool finished, Result& result) {
  const std::span<const uint32_t> tokens(request.block_ids);
  absl::StatusOr<LookupResult> found = cache.Lookup(session, model, tokens, {});
  if (!found.ok()) return found.status();
  result.Add(request, *found);
  absl::StatusOr<PrefetchId> prefetch =
      cache.Prefetch(session, found->lease, std::nullopt, [] {});
  if (!prefetch.ok()) return prefetch.status();
  mover.CompleteAll(cache);
  absl::StatusOr<PrefetchUpdate> update = cache.PollPrefetch(*prefetch);
  if (!update.ok()) return update.status();
  const uint32_t ready = update->ready_blocks;
  if (ready < found->matched_blocks) {
    absl::StatusOr<LeaseState> state = cache.Truncate(session, found->lease, ready);
    if (!state.ok()) return state.status();
  }
  const uint32_t missing = static_cast<uint32_t>(tokens.size()) - ready;
  if (missing > 0) {
    auto reserved = cache.Reserve(session, found->lease, ready, missing, std::nullopt);
    if (absl::IsResourceExhausted(reserved.status())) {
      result.exhausted += 1;
    } else if (!reserved.ok()) {
      return reserved.status();
    } else {
      auto state = cache.Put(session, found->lease, ready, tokens.subspan(ready));
      if (!state.ok()) return state.status();
    }
  }
  if (absl::Status status = cache.Release(session, found->lease, finished); !status.ok()) {
    return status;
  }
  mover.CompleteAll(cache);
  return absl::OkStatus();
}

// Which requests are the last of their conversation: none after them goes through the last
// whole block. That the last id of a trace may be part of a block makes it the last but one.
std::vector<bool> LastOfConversations(const std::vector<TraceRequest>& requests) {
  const auto last_block = [](const TraceRequest& request) {
    return request.block_ids[request.block_ids.size() > 1 ? request.block_ids.size() - 2 : 0];
  };
  absl::flat_hash_map<uint32_t, size_t> last_use;
  for (size_t i = 0; i < requests.size(); ++i) {
    for (const uint32_t id : requests[i].block_ids) last_use[id] = i;
  }
  std::vector<bool> last;
  for (size_t i = 0; i < requests.size(); ++i) {
    last.push_back(!requests[i].block_ids.empty() && last_use[last_block(requests[i])] == i);
  }
  return last;
}

absl::StatusOr<Result> Simulate(const std::vector<TraceRequest>& requests,
                                const uint64_t (&blocks)[kTierCount],
                                bool finish, std::unique_ptr<EvictionPolicy> policy) {
  uint64_t refs = 0;
  uint64_t longest = 0;
  for (const TraceRequest& request : requests) {
    refs += request.block_ids.size();
    longest = std::max<uint64_t>(longest, request.block_ids.size());
  }
  Cache::Options options;
  for (Tier tier : kTiers) {
    const int t = Index(tier);
    if (blocks[t] == 0) continue;
    const uint64_t room = tier == Tier::kNvme ? 0 : 2 * longest;
    const uint64_t slots = std::min(blocks[t], refs + 1) + room;
    options.tiers[t] = {slots * kSlotGranule, slots * kSlotGranule, room * kSlotGranule};
  }
  // One copy down at a time: each is complete before the next victim is chosen, so that the
  // order is exactly the policy's.
  options.background_moves_max = 1;
  StandingClock clock;
  InstantMover mover;
  Cache cache(options, clock, mover, std::move(policy));
  ModelSpec spec;
  spec.name = "simulate";
  spec.layers = spec.kv_heads = spec.head_dim = spec.block_tokens = 1;
  absl::StatusOr<Model> model = cache.OpenModel(spec);
  if (!model.ok()) return model.status();
  absl::StatusOr<SessionId> session = cache.OpenSession(kCommand);
  if (!session.ok()) return session.status();
  Result result;
  Progress progress(kCommand, requests.size());
  const std::vector<bool> last = LastOfConversations(requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    absl::Status status = Serve(cache, mover, *session, model->id, requests[i],
                                finish && last[i], result);
    if (!status.ok()) return status;
    progress.Update(result.requests);
  }
  const CacheStats stats = cache.Stats();
  for (int t = 0; t < kTierCount; ++t) result.evictions[t] = stats.tiers[t].evictions;
  result.nvme_writes = mover.nvme_writes();
  return result;
}

void Print(const Invocation& invocation, const Result& result) {
  if (invocation.json) {
    nlohmann::ordered_json out;
    out["requests"] = result.requests;
    out["block_refs"] = result.refs;
    out["block_hits"] = result.hits;
    out["hits_by_tier"] = {{"gpu", result.by_tier[0]},
                           {"host", result.by_tier[1]},
                           {"nvme", result.by_tier[2]}};
    out["signature"] = absl::StrFormat("%016x", result.signature);
    out["evictions_by_tier"] = {{"gpu", result.evictions[0]},
                                {"host", result.evictions[1]},
                                {"nvme", result.evictions[2]}};
    out["nvme_blocks_written"] = result.nvme_writes;
    out["requests_too_large"] = result.exhausted;
    std::puts(out.dump().c_str());
    return;
  }
  Table table({"blocks", ">count", ">of asked"});
  const auto row = [&](const char* name, uint64_t count) {
    table.AddRow({name, FormatCount(count), FormatPercent(count, result.refs)});
  };
  row("asked for", result.refs);
  row("hit in GPU", result.by_tier[0]);
  row("hit in HOST", result.by_tier[1]);
  row("hit in NVME", result.by_tier[2]);
  row("computed", result.refs - result.hits);
  row("written to NVME", result.nvme_writes);
  std::printf("%s\n%s requests, signature %s\n", table.Render().c_str(),
              FormatCount(result.requests).c_str(),
              absl::StrFormat("%016x", result.signature).c_str());
  if (result.exhausted > 0) {
    std::printf("%s requests did not fit and were not cached\n",
                FormatCount(result.exhausted).c_str());
  }
}

absl::StatusOr<uint64_t> ParseBlocks(const char* key, const std::string& text) {
  if (text == "unbounded") return kUnbounded;
  absl::StatusOr<uint64_t> count = ParseNumber(text, 0, kTierBlocksMax);
  if (count.ok()) return count;
  return absl::InvalidArgumentError(absl::StrCat(key, ": \"", text, "\" given, allowed are 0 to ",
                                                 kTierBlocksMax, ", and \"unbounded\""));
}

int RunSimulate(const Invocation& invocation, const SimulateFlags& flags) {
  constexpr const char* kKeys[] = {"--gpu-blocks", "--host-blocks", "--nvme-blocks"};
  uint64_t blocks[kTierCount];
  for (int t = 0; t < kTierCount; ++t) {
    absl::StatusOr<uint64_t> count = ParseBlocks(kKeys[t], flags.blocks[t]);
    if (!count.ok()) return Fail(invocation, kCommand, count.status());
    blocks[t] = *count;
  }
  if (blocks[0] == 0 && blocks[1] == 0) {
    return Fail(invocation, kCommand,
                absl::InvalidArgumentError("--gpu-blocks, --host-blocks: both are 0; give a size"));
  }
  if (blocks[2] != 0 && blocks[1] == 0) {
    return Fail(invocation, kCommand,
                absl::InvalidArgumentError(
                    "--host-blocks: 0 given, but blocks reach NVMe only through host memory"));
  }
  absl::StatusOr<std::unique_ptr<EvictionPolicy>> policy = MakePolicy(flags.policy);
  if (!policy.ok()) {
    return Fail(invocation, kCommand,
                absl::InvalidArgumentError(absl::StrCat("--", policy.status().message())));
  }
  absl::StatusOr<std::vector<TraceRequest>> requests = ReadTrace(flags.trace, {0, flags.limit});
  if (!requests.ok()) {
    return Fail(invocation, kCommand,
                absl::InvalidArgumentError(absl::StrCat("--trace: ", requests.status().message())));
  }
  absl::StatusOr<Result> result = Simulate(*requests, blocks, flags.finish, *std::move(policy));
  if (!result.ok()) return Fail(invocation, kCommand, result.status());
  Print(invocation, *result);
  return kOk;
}

}  // namespace

void RegisterSimulate(CLI::App& app, Invocation& invocation) {
  CLI::App* simulate = app.add_subcommand(
      kCommand, "What a trace would hit, by the cache's own code, without a daemon");
  auto flags = std::make_shared<SimulateFlags>();
  simulate->add_option("--trace", flags->trace, "JSON lines with hash_ids; an id is a block")
      ->type_name("FILE")
      ->required();
  const char* help = "Blocks the tier holds; 0: no such tier; or \"unbounded\" (default 0)";
  simulate->add_option("--gpu-blocks", flags->blocks[0], help)->type_name("N");
  simulate->add_option("--host-blocks", flags->blocks[1], help)->type_name("N");
  simulate->add_option("--nvme-blocks", flags->blocks[2], help)->type_name("N");
  simulate->add_option("--policy", flags->policy, "Eviction policy: lru (default lru)")
      ->type_name("NAME");
  simulate->add_flag("--finish", flags->finish,
                     "Workers say when a conversation is over, as the trace knows");
  AddNumber(*simulate, "--limit", flags->limit, 1, kUnbounded,
            "At most so many requests (default all)");
  simulate->callback([&invocation, flags] {
    invocation.run = [&invocation, flags] { return RunSimulate(invocation, *flags); };
  });
}

}  // namespace larder::cli
