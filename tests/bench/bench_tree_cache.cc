// tree_lookup_release_14k_us: the same prompts through Cache, with sessions, leases and pins.
#include <span>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "bench.h"
#include "server/cache/cache.h"
#include "server/cache/eviction_policy.h"
#include "storage/check.h"
#include "tree_workload.h"

namespace larder::bench {
namespace {

constexpr int kRuns = 15;

class WallClock final : public Clock {
 public:
  absl::Time Now() const override { return absl::Now(); }
};

// There is only a HOST tier, so nothing ever moves.
class NoMover final : public Mover {
 public:
  absl::Status Submit(const MoveJob&) override { return absl::UnavailableError("no other tier"); }
  void Raise(MoveId) override {}
  void Erase(Slot, uint32_t) override {}
};

ModelSpec SmallModel() {
  ModelSpec spec;
  spec.name = "bench";
  spec.layers = 1;
  spec.kv_heads = 1;
  spec.head_dim = 16;
  spec.block_tokens = 64;
  return spec;
}

absl::Status PutDocument(Cache& cache, SessionId session, ModelId model,
                         std::span<const uint32_t> tokens, uint32_t block_tokens) {
  const auto found = cache.Lookup(session, model, tokens, {});
  if (!found.ok()) return found.status();
  const uint32_t known = found->matched_blocks;
  const uint32_t all = static_cast<uint32_t>(tokens.size() / block_tokens);
  if (known < all) {
    const auto reserved = cache.Reserve(session, found->lease, known, all - known, Tier::kHost);
    if (!reserved.ok()) return reserved.status();
    const auto put =
        cache.Put(session, found->lease, known, tokens.subspan(uint64_t{known} * block_tokens));
    if (!put.ok()) return put.status();
  }
  return cache.Release(session, found->lease, false);
}

}  // namespace

absl::Status MeasureCacheLookup() {
  const Workload workload = MakeWorkload({});
  WallClock clock;
  NoMover mover;
  Cache::Options options;
  options.tiers[Index(Tier::kHost)] = {.bytes = uint64_t{120'000} * kSlotGranule,
                                       .slab_bytes = uint64_t{1000} * kSlotGranule,
                                       .free_bytes_low_water = 0};
  Cache cache(options, clock, mover, MakeLruPolicy());
  const auto model = cache.OpenModel(SmallModel());
  if (!model.ok()) return model.status();
  const auto session = cache.OpenSession("bench");
  if (!session.ok()) return session.status();
  for (const auto& document : workload.documents) {
    absl::Status status =
        PutDocument(cache, *session, model->id, document, workload.options.block_tokens);
    if (!status.ok()) return status;
  }
  std::vector<double> runs;
  std::vector<double> lookups;
  for (int run = 0; run < kRuns; ++run) {
    std::vector<double> calls;
    std::vector<double> lookup_calls;
    for (const auto& prompt : workload.prompts) {
      const double start = Now();
      const auto found = cache.Lookup(*session, model->id, prompt, {});
      const double middle = Now();
      LARDER_CHECK(found.ok() && found->matched_blocks == kPromptBlocks);
      LARDER_CHECK(cache.Release(*session, found->lease, false).ok());
      calls.push_back((Now() - start) * 1e6);
      lookup_calls.push_back((middle - start) * 1e6);
    }
    runs.push_back(Median(std::move(calls)));
    lookups.push_back(Median(std::move(lookup_calls)));
  }
  const double lookup = Median(lookups);
  Print({"tree_lookup_release_14k_us",
         Median(runs),
         "us",
         absl::StrFormat("Cache::Lookup alone: %.2f us", lookup),
         Median(runs) / lookup,
         {}},
        runs);
  return absl::OkStatus();
}

}  // namespace larder::bench
