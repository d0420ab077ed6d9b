#include "server/cache/cache.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "server/cache/cache_state.h"
#include "storage/check.h"

namespace larder {
namespace {

// What the estimate assumes of a hop before it has been measured, and how much that counts.
constexpr double kAssumedBytes = 64.0 * (1 << 20);
constexpr double kAssumedCopyRate = 10e9;
constexpr double kAssumedDriveRate = 1e9;

// Leases of an ended session that are dropped before others get the mutex.
constexpr int kLeasesAtOnce = 16;

}  // namespace

// --- Section -----------------------------------------------------------------------------

Cache::Section::Section(const Cache& cache) : cache_(const_cast<Cache&>(cache)) {
  cache_.mu_.Lock();
}

Cache::Section::~Section() {
  cache_.CleanLocked();
  State& s = *cache_.s_;
  std::vector<MoveJob> jobs = std::move(s.jobs);
  std::vector<MoveId> raises = std::move(s.raises);
  std::vector<std::pair<Slot, uint32_t>> erases = std::move(s.erases);
  std::vector<std::function<void()>> calls = std::move(s.calls);
  s.jobs.clear();
  s.raises.clear();
  s.erases.clear();
  s.calls.clear();
  cache_.mu_.Unlock();
  for (const auto& [slot, tag] : erases) cache_.mover_.Erase(slot, tag);
  for (const MoveJob& job : jobs) {
    absl::Status status = cache_.mover_.Submit(job);
    if (!status.ok()) cache_.OnMoveDone(job.id, std::move(status));
  }
  for (MoveId id : raises) cache_.mover_.Raise(id);
  for (const auto& call : calls) call();
}

// --- Construction ------------------------------------------------------------------------

Cache::Cache(const Options& options, const Clock& clock, Mover& mover,
             std::unique_ptr<EvictionPolicy> policy)
    : options_(options),
      clock_(clock),
      mover_(mover),
      policy_(std::move(policy)),
      s_(std::make_unique<State>(options)) {
  LARDER_CHECK(options.tiers[0].bytes > 0 || options.tiers[1].bytes > 0);
  LARDER_CHECK(options.tiers[2].bytes == 0 || options.tiers[1].bytes > 0);
  const std::pair<Tier, Tier> pairs[] = {{Tier::kGpu, Tier::kHost},
                                         {Tier::kHost, Tier::kGpu},
                                         {Tier::kHost, Tier::kNvme},
                                         {Tier::kNvme, Tier::kHost}};
  absl::MutexLock lock(&mu_);
  // A slot that is given back has no record, so that what was dropped stays dropped over a
  // restart.
  s_->nvme.set_on_drop([state = s_.get()](Slot slot, uint32_t tag) {
    state->erases.emplace_back(slot, tag);
  });
  for (int i = 0; i < 4; ++i) {
    Hop& hop = s_->hops[i];
    std::tie(hop.from, hop.to) = pairs[i];
    const bool drive = hop.from == Tier::kNvme || hop.to == Tier::kNvme;
    hop.sum_bytes = kAssumedBytes;
    hop.sum_seconds = kAssumedBytes / (drive ? kAssumedDriveRate : kAssumedCopyRate);
  }
}

Cache::~Cache() {
  absl::MutexLock lock(&mu_);
  for (auto& [id, lease] : s_->leases) lease->model->tree.Unbind(lease->cursor);
  for (auto& [id, move] : s_->moves) move->model->tree.Unbind(move->at);
}

// --- Models ------------------------------------------------------------------------------

absl::StatusOr<Tier> Cache::MemoryTier(std::optional<Tier> tier) const {
  if (!tier.has_value()) {
    return options_.tiers[0].bytes > 0 && !gpu_lost_ ? Tier::kGpu : Tier::kHost;
  }
  if (*tier == Tier::kNvme) {
    return absl::InvalidArgumentError("tier: NVME given, allowed are GPU and HOST");
  }
  if (options_.tiers[larder::Index(*tier)].bytes == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("tier: this daemon has no ", std::string(TierName(*tier)), " tier"));
  }
  if (*tier == Tier::kGpu && gpu_lost_) {
    return absl::UnavailableError("tier: GPU given, but its device is lost; HOST is left");
  }
  return *tier;
}

absl::StatusOr<Cache::ModelState*> Cache::FindState(ModelId model) const {
  const auto found = s_->model_by_id.find(model);
  if (found != s_->model_by_id.end()) return found->second;
  return absl::NotFoundError(absl::StrCat("model_id: ", absl::Hex(model, absl::kZeroPad16),
                                          " is not open; call OpenModel first"));
}

absl::StatusOr<Model> Cache::FindModel(ModelId id) const {
  absl::MutexLock lock(&mu_);
  absl::StatusOr<ModelState*> found = FindState(id);
  if (!found.ok()) return found.status();
  return (*found)->model;
}

// Whether every tier there is has slots for the model's blocks.
absl::Status Cache::CheckFits(const Model& model) const {
  if (options_.tiers[larder::Index(Tier::kGpu)].bytes > 0 &&
      model.spec.shards > options_.gpu_ranks) {
    return absl::InvalidArgumentError(
        absl::StrCat("spec.shards: ", model.spec.shards, " given, allowed are 1 to ",
                     options_.gpu_ranks, ", the ranks of this daemon's GPU tier"));
  }
  for (Tier tier : kTiers) {
    const TierOptions& t = options_.tiers[larder::Index(tier)];
    const uint32_t bytes = model.SlotBytes(tier);
    if (t.bytes == 0 || bytes <= std::min(t.bytes, t.slab_bytes)) continue;
    return absl::ResourceExhaustedError(absl::StrCat(
        "spec: a block of ", bytes, " bytes, but tier ", std::string(TierName(tier)),
        " takes at most ", std::min(t.bytes, t.slab_bytes), " (a slab)"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Model> Cache::OpenModel(const ModelSpec& spec) {
  absl::StatusOr<Model> model = MakeModel(spec);
  if (!model.ok()) return model.status();
  Section section(*this);
  const auto found = s_->model_by_id.find(model->id);
  if (found != s_->model_by_id.end()) {
    if (found->second->model.fingerprint == model->fingerprint) return found->second->model;
    return absl::AlreadyExistsError(
        absl::StrCat("model_id: another model has the id ", absl::Hex(model->id, absl::kZeroPad16)));
  }
  if (s_->models.size() >= options_.models_max) {
    s_->counters.exhausted += 1;
    return absl::ResourceExhaustedError(absl::StrCat("models: ", s_->models.size(),
                                                     " are open, at most ", options_.models_max));
  }
  if (absl::Status fits = CheckFits(*model); !fits.ok()) return fits;
  auto state =
      std::make_unique<ModelState>(*model, s_->tiers[0].owners, s_->tiers[1].owners);
  const auto known = s_->nvme_pools.find(model->id);
  for (Tier tier : {Tier::kGpu, Tier::kHost}) {
    state->pool[larder::Index(tier)] =
        s_->tiers[larder::Index(tier)].slots.AddPool(model->SlotBytes(tier));
  }
  if (known == s_->nvme_pools.end()) {
    const SlotAllocator::Pool pool = s_->tiers[2].slots.AddPool(model->WholeBlockBytes());
    s_->nvme_pools[model->id] = {pool, model->WholeBlockBytes()};
    state->pool[2] = pool;
  } else {
    state->pool[2] = known->second.pool;
  }
  s_->model_by_id[model->id] = state.get();
  s_->models.push_back(std::move(state));
  return *model;
}

// --- Sessions ----------------------------------------------------------------------------

absl::StatusOr<Cache::Session*> Cache::FindSession(SessionId id, bool may_be_lost) const {
  const auto found = s_->sessions.find(id);
  if (found == s_->sessions.end()) {
    return absl::NotFoundError(absl::StrCat("session_id: ", absl::Hex(id, absl::kZeroPad16),
                                            " is not a session of this daemon; Attach again"));
  }
  if (found->second->lost && !may_be_lost) {
    return absl::FailedPreconditionError(absl::StrCat("session_id: the stream of ",
                                                      absl::Hex(id, absl::kZeroPad16),
                                                      " has ended; Attach again"));
  }
  return found->second.get();
}

absl::StatusOr<Cache::Lease*> Cache::FindLease(SessionId session, LeaseId lease) const {
  absl::StatusOr<Session*> owner = FindSession(session);
  if (!owner.ok()) return owner.status();
  const auto found = s_->leases.find(lease);
  if (found == s_->leases.end()) {
    return absl::NotFoundError(
        absl::StrCat("lease_id: no lease ", absl::Hex(lease, absl::kZeroPad16)));
  }
  if (found->second->session != *owner) {
    return absl::PermissionDeniedError(absl::StrCat(
        "lease_id: ", absl::Hex(lease, absl::kZeroPad16), " belongs to another session"));
  }
  return found->second.get();
}

absl::StatusOr<SessionId> Cache::OpenSession(std::string worker, SessionId secret) {
  Section section(*this);
  if (s_->sessions.size() >= options_.sessions_max) {
    s_->counters.exhausted += 1;
    return absl::ResourceExhaustedError(absl::StrCat("sessions: ", s_->sessions.size(),
                                                     " are open, at most ",
                                                     options_.sessions_max));
  }
  if (s_->sessions.contains(secret)) {
    return absl::AlreadyExistsError("session_id: another session has this one");
  }
  auto session = std::make_unique<Session>();
  session->id = secret != 0 ? secret : s_->next_id++;
  session->secret = secret != 0;
  session->worker = std::move(worker);
  session->opened = clock_.Now();
  const SessionId id = session->id;
  s_->sessions[id] = std::move(session);
  return id;
}

void Cache::LoseSession(SessionId id) {
  Section section(*this);
  absl::StatusOr<Session*> session = FindSession(id, /*may_be_lost=*/true);
  if (!session.ok()) return;
  (*session)->lost = true;
  if ((*session)->leases.empty()) s_->sessions.erase(id);
}

void Cache::EndSession(SessionId id) {
  while (true) {
    Section section(*this);
    absl::StatusOr<Session*> found = FindSession(id, /*may_be_lost=*/true);
    if (!found.ok()) return;
    Session& session = **found;
    session.lost = true;  // nothing is added any more
    for (int i = 0; i < kLeasesAtOnce && !session.leases.empty(); ++i) {
      DropLease(*session.leases.begin()->second, /*session_over=*/false);
    }
    if (!session.leases.empty()) continue;
    s_->sessions.erase(id);
    return;
  }
}

// --- Recovery ----------------------------------------------------------------------------

bool Cache::RecoverBlock(Slot slot, uint32_t bytes, const BlockRecord& record) {
  absl::MutexLock lock(&mu_);
  const TierOptions& tier = options_.tiers[larder::Index(Tier::kNvme)];
  if (!slot || bytes == 0 || bytes > tier.slab_bytes || slot.offset() + bytes > tier.bytes) {
    return false;
  }
  s_->recovered.push_back({slot, bytes, record});
  return true;
}

uint64_t Cache::RecoverDone() {
  Section section(*this);
  std::vector<State::Recovered> found = std::move(s_->recovered);
  s_->recovered.clear();
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
    return std::tie(a.record.depth, a.slot) < std::tie(b.record.depth, b.slot);
  });
  absl::flat_hash_map<BlockKey, Slot> slots;
  uint64_t orphans = 0;
  for (const State::Recovered& block : found) {
    const auto parent = slots.find(block.record.parent_key);
    const bool whole_path = block.record.depth == 0 || parent != slots.end();
    auto [pool, added] = s_->nvme_pools.try_emplace(block.record.model_id);
    if (added) pool->second = {s_->tiers[2].slots.AddPool(block.bytes), block.bytes};
    if (!whole_path || slots.contains(block.record.key) || pool->second.block_bytes != block.bytes ||
        !s_->tiers[2].slots.Adopt(pool->second.pool, block.slot)) {
      orphans += 1;
      s_->erases.emplace_back(block.slot, block.record.key.Tag());
      continue;
    }
    s_->nvme.Recover(block.slot, block.record.key,
                     block.record.depth == 0 ? Slot() : parent->second);
    slots[block.record.key] = block.slot;
  }
  // What was written last was wanted last, as far as anything durable says.
  std::erase_if(found, [&](const auto& b) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !s_->nvme.Is(b.slot, b.record.key.Tag());
  });
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
    return a.record.written_at_s < b.record.written_at_s;
  });
  for (const State::Recovered& block : found) s_->nvme.Touch(block.slot);
  s_->counters.orphans_collected += orphans;
  return orphans;
}

void Cache::RecoverWritten(const NvmeWritten& written) {
  const absl::MutexLock lock(&mu_);
  s_->nvme_writes.Recover(written, clock_.Now());
}

void Cache::SetNvmeWritable(bool writable) {
  Section section(*this);
  s_->nvme_writable = writable;
  if (!writable) FailFlushes(NvmeTakesNoWrites());
  for (Hop& hop : s_->hops) hop.refused = false;
}

void Cache::LoseGpu() {
  Section section(*this);  // its cleaner begins to drop the copies
  gpu_lost_ = true;
}

}  // namespace larder
