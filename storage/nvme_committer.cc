#include "storage/nvme_committer.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"

namespace larder {
namespace {

// Does not jump when somebody sets the wall clock.
absl::Time MonotonicNow() {
  return absl::UnixEpoch() + absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
}

}  // namespace

NvmeCommitter::NvmeCommitter(Options options, IoBackend& io, NvmeRecords& records)
    : options_(std::move(options)), probe_page_(kSlotGranule), io_(io), records_(records) {
  thread_ = std::thread([this] { Run(); });
}

NvmeCommitter::~NvmeCommitter() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
  }
  changed_.Signal();
  thread_.join();
}

NvmeCommitter::SyncEpoch NvmeCommitter::WriteStarts() {
  absl::MutexLock lock(&mu_);
  if (writes_out_++ == 0) progress_at_ = MonotonicNow();
  // The thread sleeps without an end while there is nothing to watch.
  if (writes_out_ == 1) changed_.Signal();
  return syncs_failed_;
}

void NvmeCommitter::WritesEndLocked(uint64_t count) {
  writes_out_ -= count;
  progress_at_ = MonotonicNow();
}

void NvmeCommitter::Put(Slot slot, const NvmeRecord& record, SyncEpoch epoch, DoneFn done) {
  absl::MutexLock lock(&mu_);
  progress_at_ = MonotonicNow();
  QueueLocked({Kind::kPut, slot, record, epoch, absl::OkStatus(), std::move(done)});
}

void NvmeCommitter::Erase(Slot slot, uint32_t key_tag) {
  Queue({Kind::kErase, slot, {}, key_tag, absl::OkStatus(), nullptr});
}

void NvmeCommitter::Forget(Slot slot, absl::Status status, DoneFn done) {
  Queue({Kind::kForget, slot, {}, 0, std::move(status), std::move(done)});
}

void NvmeCommitter::Fail(absl::Status status, DoneFn done) {
  Queue({Kind::kFail, Slot(), {}, 0, std::move(status), std::move(done)});
}

void NvmeCommitter::FailDevice(absl::Status status, DoneFn done) {
  absl::MutexLock lock(&mu_);
  Degrade(status);
  WritesEndLocked(1);
  QueueLocked({Kind::kFail, Slot(), {}, 0, std::move(status), std::move(done)});
}

void NvmeCommitter::Hurry() {
  absl::MutexLock lock(&mu_);
  hurry_ = true;
  changed_.Signal();
}

NvmeStore::Health NvmeCommitter::health() const {
  absl::MutexLock lock(&mu_);
  return HealthLocked();
}

// Computed, so that it is true also while the thread itself hangs in a sync.
NvmeStore::Health NvmeCommitter::HealthLocked() const {
  if (health_.degraded || writes_out_ == 0) return health_;
  const absl::Duration stalled = MonotonicNow() - progress_at_;
  if (stalled < options_.stall_limit) return health_;
  return {true, absl::StrCat(writes_out_, " writes under way, none done for ",
                             absl::FormatDuration(stalled))};
}

uint64_t NvmeCommitter::syncs() const {
  absl::MutexLock lock(&mu_);
  return syncs_;
}

uint64_t NvmeCommitter::errors() const {
  absl::MutexLock lock(&mu_);
  return errors_;
}

void NvmeCommitter::Queue(Pending pending) {
  absl::MutexLock lock(&mu_);
  QueueLocked(std::move(pending));
}

void NvmeCommitter::QueueLocked(Pending pending) {
  if (queue_.empty()) queue_since_ = MonotonicNow();
  if (pending.kind == Kind::kPut) queue_bytes_ += pending.record.payload_bytes;
  queue_.push_back(std::move(pending));
  // The thread sleeps until there is something, or until a group is full.
  if (queue_.size() == 1 || queue_bytes_ >= options_.sync_bytes) changed_.Signal();
}

void NvmeCommitter::Degrade(const absl::Status& why) {
  ++errors_;
  if (health_.degraded) return;
  health_ = {true, std::string(why.message())};
  probe_at_ = MonotonicNow() + options_.probe_interval;
  changed_.Signal();
}

void NvmeCommitter::Run() {
  Group group;
  while (NextGroup(group)) {
    AnnounceHealth();
    Commit(group);
    group.clear();
    AnnounceHealth();
    StartProbe();
  }
}

// Waits for a group or for the time to probe (then the group is empty). False: stopping and
// all is done.
bool NvmeCommitter::NextGroup(Group& group) {
  absl::MutexLock lock(&mu_);
  while (true) {
    absl::Time wake = absl::InfiniteFuture();
    if (queue_.empty()) {
      if (stopping_ && !probing_) return false;
      if (HealthLocked().degraded != announced_degraded_) return true;
      if (health_.degraded && !probing_ && !stopping_) wake = probe_at_;
      if (writes_out_ > 0 && !announced_degraded_) wake = progress_at_ + options_.stall_limit;
    } else {
      wake = queue_since_ + options_.sync_delay;
      if (hurry_ || stopping_ || queue_bytes_ >= options_.sync_bytes) break;
    }
    const absl::Duration wait = wake - MonotonicNow();
    if (wait <= absl::ZeroDuration()) break;
    changed_.WaitWithTimeout(&mu_, wait);
  }
  group.swap(queue_);
  queue_bytes_ = 0;
  return true;
}

absl::Status NvmeCommitter::Sync() {
  absl::Status status = io_.Sync();
  if (!status.ok()) ++syncs_failed_;
  return status;
}

bool NvmeCommitter::MayPut(const Pending& pending) const { return pending.tag == syncs_failed_; }

// What the group does to the index. An erase looks at what the group has done so far, then
// at the index.
std::vector<NvmeRecords::Change> NvmeCommitter::ChangesOf(const Group& group, bool with_puts) {
  std::vector<NvmeRecords::Change> changes;
  absl::flat_hash_map<Slot, std::optional<uint32_t>> now;  // the tag of its record's key
  const auto is_still = [&](Slot slot, uint64_t tag) {
    if (const auto it = now.find(slot); it != now.end()) return it->second == tag;
    const auto record = records_.Get(slot);
    return record.ok() && record->block.key.Tag() == tag;
  };
  for (const Pending& pending : group) {
    if (pending.kind == Kind::kPut && with_puts && MayPut(pending)) {
      changes.push_back({pending.slot, pending.record});
      now[pending.slot] = pending.record.block.key.Tag();
    } else if (pending.kind == Kind::kForget ||
               (pending.kind == Kind::kErase && is_still(pending.slot, pending.tag))) {
      changes.push_back({pending.slot, std::nullopt});
      now[pending.slot] = std::nullopt;
    }
  }
  return changes;
}

void NvmeCommitter::Commit(Group& group) {
  const auto puts = static_cast<uint64_t>(std::count_if(
      group.begin(), group.end(), [](const Pending& p) { return p.kind == Kind::kPut; }));
  absl::Status status = puts > 0 ? Sync() : absl::OkStatus();
  // A payload that may not be durable gets no record; deletes want none.
  const auto changes = ChangesOf(group, /*with_puts=*/status.ok());
  if (!changes.empty()) {
    const absl::Status applied = records_.Apply(changes, /*sync=*/puts > 0 && status.ok());
    if (status.ok()) status = applied;
  }
  {
    absl::MutexLock lock(&mu_);
    if (puts > 0) {
      ++syncs_;
      WritesEndLocked(puts);
    }
    if (!status.ok()) Degrade(status);
  }
  // Before any probe of the group can fail a sync.
  for (Pending& pending : group) {
    if (pending.kind != Kind::kPut) continue;
    pending.status = status.ok() && !MayPut(pending)
                         ? absl::UnavailableError("nvme: a sync failed beside this write")
                         : status;
  }
  for (Pending& pending : group) {
    if (pending.kind == Kind::kProbe) {
      FinishProbe(pending.status);
    } else if (pending.done) {
      pending.done(pending.status);
    }
  }
}

// Writes a page of its own, by way of the queue: as a block would be.
void NvmeCommitter::StartProbe() {
  {
    absl::MutexLock lock(&mu_);
    if (!health_.degraded || probing_ || stopping_ || MonotonicNow() < probe_at_) return;
    probing_ = true;
  }
  io_.Write(options_.probe_offset, probe_page_, [this](absl::Status status) {
    Queue({Kind::kProbe, Slot(), {}, 0, status, nullptr});
  });
}

void NvmeCommitter::FinishProbe(absl::Status status) {
  if (status.ok()) status = Sync();
  if (status.ok()) status = records_.Probe();
  absl::MutexLock lock(&mu_);
  probing_ = false;
  probe_at_ = MonotonicNow() + options_.probe_interval;
  if (status.ok()) {
    health_ = {};
  } else {
    ++errors_;
    health_.why = std::string(status.message());
  }
}

void NvmeCommitter::AnnounceHealth() {
  const NvmeStore::Health now = health();
  if (now.degraded == announced_degraded_) return;
  announced_degraded_ = now.degraded;
  if (now.degraded) {
    spdlog::error("nvme: writes stopped: {}", now.why);
  } else {
    spdlog::info("nvme: writes go on again");
  }
  if (options_.on_writable) options_.on_writable(!now.degraded);
}

}  // namespace larder
