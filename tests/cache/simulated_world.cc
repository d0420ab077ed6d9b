#include "tests/cache/simulated_world.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "storage/check.h"

namespace larder::testing {
namespace {

uint64_t Mix(uint64_t hash, uint64_t value) {
  return (hash ^ value) * 1099511628211ull + (hash >> 29);
}

}  // namespace

// --- SteppedMover ------------------------------------------------------------------------

absl::Status SteppedMover::Submit(const MoveJob& job) {
  if (Chance(faults.refuse)) return absl::ResourceExhaustedError("queue: full");
  jobs_.push_back(job);
  return absl::OkStatus();
}

void SteppedMover::Erase(Slot slot, uint32_t key_tag) {
  const auto found = nvme.find(slot);
  if (found != nvme.end() && found->second.record.key.Tag() == key_tag) nvme.erase(found);
}

bool SteppedMover::Step() {
  if (jobs_.empty()) return false;
  const size_t at = faults.reorder ? random_() % jobs_.size() : 0;
  const MoveJob job = jobs_[at];
  if (Chance(faults.fail)) {
    Complete(job.id, absl::InternalError("injected"));
  } else if (job.from.tier == Tier::kNvme && Chance(faults.flip)) {
    nvme.erase(job.from.slot);
    Complete(job.id, absl::DataLossError("injected"));
  } else {
    Complete(job.id, absl::OkStatus());
  }
  return true;
}

void SteppedMover::Complete(MoveId id, absl::Status status) {
  const auto found =
      std::find_if(jobs_.begin(), jobs_.end(), [id](const MoveJob& j) { return j.id == id; });
  LARDER_CHECK(found != jobs_.end());
  const MoveJob job = *found;
  jobs_.erase(found);
  if (status.ok() && job.from.tier == Tier::kNvme) {
    const auto stored = nvme.find(job.from.slot);
    if (stored == nvme.end() || stored->second.record.key != job.record.key ||
        stored->second.torn) {
      if (stored != nvme.end()) nvme.erase(stored);
      status = absl::DataLossError("not the block that was asked for");
    } else {
      LARDER_CHECK(stored->second.bytes == job.bytes);
      for (uint32_t rank = 0; rank < job.shards; ++rank) {
        memory[PlaceOf(job.to, rank)] =
            rank == 0 ? stored->second.content : stored->second.others[rank - 1];
      }
    }
  } else if (status.ok() && job.to.tier == Tier::kNvme) {
    WriteNvme(job);
  } else if (status.ok()) {
    for (uint32_t rank = 0; rank < job.shards; ++rank) {
      memory[PlaceOf(job.to, rank)] = memory.at(PlaceOf(job.from, rank));
    }
  }
  done_(id, status);
}

// A record whose bytes are written over is as good as torn.
void SteppedMover::WriteNvme(const MoveJob& job) {
  const uint64_t begin = job.to.slot.offset();
  const uint64_t end = begin + job.bytes;
  for (auto& [slot, stored] : nvme) {
    if (slot.offset() < end && begin < slot.offset() + stored.bytes) stored.torn = true;
  }
  NvmeSlot& stored = nvme[job.to.slot];
  stored = {job.bytes, job.record, memory.at(PlaceOf(job.from, 0)), Chance(faults.tear)};
  for (uint32_t rank = 1; rank < job.shards; ++rank) {
    stored.others.push_back(memory.at(PlaceOf(job.from, rank)));
  }
}

void SteppedMover::Crash() {
  jobs_.clear();
  memory.clear();
}

// --- World -------------------------------------------------------------------------------

World::World(const Sizes& s, uint64_t seed) : mover(seed), sizes(s) { Restart(); }

void World::Restart() {
  cache_.reset();
  mover.Crash();
  Cache::Options options;
  const uint64_t counts[] = {sizes.gpu, sizes.host, sizes.nvme};
  for (int t = 0; t < kTierCount; ++t) {
    options.tiers[t].bytes = counts[t] * kSlotGranule;
    options.tiers[t].slab_bytes = (sizes.slab > 0 ? sizes.slab : counts[t]) * kSlotGranule;
    options.tiers[t].free_bytes_low_water = t < 2 ? sizes.low_water * kSlotGranule : 0;
  }
  options.background_moves_max = sizes.background_moves;
  options.nvme_writes = sizes.nvme_writes;
  options.gpu_ranks = sizes.gpu_ranks;
  cache_ = std::make_unique<Cache>(options, clock, mover, MakeLruPolicy());
  mover.set_done([this](MoveId id, absl::Status status) { cache_->OnMoveDone(id, status); });
  for (const auto& [slot, stored] : mover.nvme) {
    cache_->RecoverBlock(slot, stored.bytes, stored.record);
  }
  cache_->RecoverDone();
}

bool World::Settle() {
  for (int i = 0; i < 100'000; ++i) {
    if (mover.Step()) {
      clock.Advance(absl::Microseconds(10));
      continue;
    }
    cache_->Clean();
    if (mover.idle()) return true;
  }
  return false;
}

uint64_t World::Content(ModelId model, const Tokens& prompt, uint32_t block) {
  uint64_t hash = Mix(1469598103934665603ull, model);
  for (uint64_t i = 0; i < (uint64_t{block} + 1) * kBlockTokens; ++i) hash = Mix(hash, prompt[i]);
  return hash;
}

void World::Fill(ModelId model, const std::vector<SlotRun>& runs, const Tokens& prompt) {
  const uint32_t shards = cache_->FindModel(model)->spec.shards;
  for (const SlotRun& run : runs) {
    for (uint32_t i = 0; i < run.slots.size(); ++i) {
      for (uint32_t rank = 0; rank < shards; ++rank) {
        mover.memory[SteppedMover::PlaceOf({run.tier, run.slots[i]}, rank)] =
            Content(model, prompt, run.position + i) + rank;
      }
    }
  }
}

std::string World::WrongBytes(ModelId model, const std::vector<SlotRun>& runs,
                              const Tokens& prompt) {
  const uint32_t shards = cache_->FindModel(model)->spec.shards;
  for (const SlotRun& run : runs) {
    if (run.tier == Tier::kNvme) continue;
    for (uint32_t i = 0; i < run.slots.size() * shards; ++i) {
      const SlotRef ref{run.tier, run.slots[i / shards]};
      const uint32_t position = run.position + i / shards;
      const uint32_t rank = i % shards;
      const auto found = mover.memory.find(SteppedMover::PlaceOf(ref, rank));
      if (found == mover.memory.end() ||
          found->second != Content(model, prompt, position) + rank) {
        return absl::StrCat("block ", position, " in ", std::string(TierName(run.tier)), " slot ",
                            ref.slot.number(), ", rank ", rank);
      }
    }
  }
  return "";
}

std::optional<PrefetchUpdate> World::PrefetchAll(SessionId session, LeaseId lease,
                                                 std::optional<Tier> tier) {
  absl::StatusOr<PrefetchId> id = cache_->Prefetch(session, lease, tier, [] {});
  if (!id.ok()) return std::nullopt;
  PrefetchUpdate all;
  while (true) {
    absl::StatusOr<PrefetchUpdate> update = cache_->PollPrefetch(*id);
    if (!update.ok()) return std::nullopt;
    for (SlotRun& run : update->runs) all.runs.push_back(std::move(run));
    all.ready_blocks = update->ready_blocks;
    all.promised_blocks = update->promised_blocks;
    all.unreadable_position = update->unreadable_position;
    all.done = update->done;
    if (update->done) return all;
    cache_->CheckInvariants();
    if (!mover.Step()) return std::nullopt;  // it waits for nothing
  }
}

absl::StatusOr<LeaseId> World::PutAll(SessionId session, ModelId model, const Tokens& prompt) {
  absl::StatusOr<LookupResult> found = cache_->Lookup(session, model, prompt, {});
  if (!found.ok()) return found.status();
  const std::optional<PrefetchUpdate> up = PrefetchAll(session, found->lease, std::nullopt);
  uint32_t end = found->matched_blocks;
  if (up->ready_blocks < end) {
    end = up->ready_blocks;
    if (auto state = cache_->Truncate(session, found->lease, end); !state.ok()) {
      return state.status();
    }
  }
  const uint32_t blocks = static_cast<uint32_t>(prompt.size() / kBlockTokens);
  if (end == blocks) return found->lease;
  auto runs = cache_->Reserve(session, found->lease, end, blocks - end, std::nullopt);
  if (!runs.ok()) {
    if (auto s = cache_->Release(session, found->lease, false); !s.ok()) return s;
    return runs.status();
  }
  Fill(model, *runs, prompt);
  auto state = cache_->Put(session, found->lease, end,
                           std::span(prompt).subspan(uint64_t{end} * kBlockTokens,
                                                     uint64_t{blocks - end} * kBlockTokens));
  if (!state.ok()) return state.status();
  return found->lease;
}

ModelSpec World::Spec(const std::string& name, uint32_t shards) {
  ModelSpec spec;
  spec.name = name;
  spec.layers = 1;
  spec.kv_heads = shards;
  spec.head_dim = 128;
  spec.dtype = DType::kF32;
  spec.block_tokens = kBlockTokens;
  spec.shards = shards;
  return spec;
}

Tokens Prompt(const std::string& name, uint32_t blocks) {
  uint64_t hash = 1469598103934665603ull;
  for (char c : name) hash = Mix(hash, static_cast<unsigned char>(c));
  Tokens tokens;
  for (uint32_t i = 0; i < blocks * World::kBlockTokens; ++i) {
    hash = Mix(hash, i);
    tokens.push_back(static_cast<uint32_t>(hash >> 20));
  }
  return tokens;
}

}  // namespace larder::testing
