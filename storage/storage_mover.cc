#include "storage/storage_mover.h"

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "storage/check.h"
#include "storage/move_queue.h"

namespace larder {
namespace {

// The pairs that are used. Copies first.
enum Pair { kGpuToHost, kHostToGpu, kHostToNvme, kNvmeToHost, kPairCount };

constexpr std::optional<Pair> PairOf(Tier from, Tier to) {
  if (from == Tier::kGpu && to == Tier::kHost) return kGpuToHost;
  if (from == Tier::kHost && to == Tier::kGpu) return kHostToGpu;
  if (from == Tier::kHost && to == Tier::kNvme) return kHostToNvme;
  if (from == Tier::kNvme && to == Tier::kHost) return kNvmeToHost;
  return std::nullopt;
}

absl::string_view Name(Tier tier) { return {TierName(tier).data(), TierName(tier).size()}; }

}  // namespace

class StorageMover::Impl {
 public:
  Impl(Options options, DoneFn done) : options_(std::move(options)), done_(std::move(done)) {
    for (const Arena* gpu : options_.gpus) {
      LARDER_CHECK(gpu->bytes() == TierBytes(Tier::kGpu), "GPU arenas differ in size");
    }
    if (options_.copier == nullptr) {
      own_copier_ = MakeThreadCopier(options_.copy_threads);
      options_.copier = own_copier_.get();
    }
  }
  ~Impl();

  absl::Status Submit(const MoveJob& job);
  void Raise(MoveId id);
  void Erase(Slot slot, uint32_t key_tag) {
    if (options_.nvme != nullptr) options_.nvme->Erase(slot, key_tag);
  }
  bool Drain(absl::Time deadline);

 private:
  struct Place {
    Pair pair;
    MoveQueue::Position position;
  };
  struct Copies {  // of one pair and class
    Pair pair;
    std::vector<MoveJob> jobs;
  };

  uint64_t TierBytes(Tier tier) const;
  absl::Status Check(const MoveJob& job, const SlotRef& end) const;
  absl::Status CheckBoth(const MoveJob& job) const;
  MoveJob PopLocked(Pair pair) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::optional<Pair> NextCopyPairLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::optional<Copies> NextCopies();
  void PumpCopies();
  void StartCopies(Copies copies);
  bool NextNvme(MoveJob& job);
  void PumpNvme();
  void StartNvme(const MoveJob& job);
  void FinishNvme(const MoveJob& job, absl::Status status);
  void Finish(MoveId id, absl::Status status);
  void Forget(size_t jobs);
  void AddPieces(const MoveJob& job, Copier::Batch& batch) const;

  Options options_;  // constant after construction
  const DoneFn done_;

  absl::Mutex mu_;
  absl::CondVar idle_;
  std::array<MoveQueue, kPairCount> queues_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<MoveId, Place> queued_ ABSL_GUARDED_BY(mu_);
  uint64_t next_order_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t unfinished_ ABSL_GUARDED_BY(mu_) = 0;         // accepted, DoneFn has not returned
  uint64_t nvme_write_bytes_ ABSL_GUARDED_BY(mu_) = 0;   // in flight
  int nvme_reads_ ABSL_GUARDED_BY(mu_) = 0;              // in flight
  std::array<int, 2> copies_ ABSL_GUARDED_BY(mu_) = {};  // batches with the copier, a pair
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;

  std::unique_ptr<Copier> own_copier_;  // last: its threads use all of the above
};

StorageMover::Impl::~Impl() {
  std::vector<MoveId> cancelled;
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    for (const auto& [id, place] : queued_) cancelled.push_back(id);
    queued_.clear();
    queues_ = {};
  }
  for (const MoveId id : cancelled) {
    Finish(id, absl::CancelledError("move: the mover stops before it started"));
  }
  options_.copier->Stop();  // or a device that hangs would be waited for for ever
  absl::MutexLock lock(&mu_);
  while (unfinished_ > 0) idle_.Wait(&mu_);
}

uint64_t StorageMover::Impl::TierBytes(Tier tier) const {
  if (tier == Tier::kNvme) return options_.nvme == nullptr ? 0 : options_.nvme->bytes();
  if (tier == Tier::kGpu) return options_.gpus.empty() ? 0 : options_.gpus[0]->bytes();
  return options_.host == nullptr ? 0 : options_.host->bytes();
}

absl::Status StorageMover::Impl::Check(const MoveJob& job, const SlotRef& end) const {
  const uint64_t bytes = TierBytes(end.tier);
  // Of one arena; the tier's others hold as much.
  const uint32_t length = end.tier == Tier::kGpu ? job.bytes / job.shards : job.bytes;
  if (end.slot && length > 0 && end.slot.offset() < bytes && length <= bytes - end.slot.offset()) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("move ", job.id, ": ", Name(end.tier), " slot ",
                                                 end.slot.number(), " with ", length,
                                                 " bytes is not in a tier of ", bytes, " bytes"));
}

absl::Status StorageMover::Impl::CheckBoth(const MoveJob& job) const {
  if (!PairOf(job.from.tier, job.to.tier)) {
    return absl::InvalidArgumentError(absl::StrCat("move ", job.id, ": ", Name(job.from.tier),
                                                   " -> ", Name(job.to.tier),
                                                   " is not a pair that is used"));
  }
  if (job.shards == 0 || job.bytes % job.shards != 0) {
    return absl::InvalidArgumentError(absl::StrCat("move ", job.id, ": ", job.bytes,
                                                   " bytes are not ", job.shards, " equal parts"));
  }
  const bool gpu = job.from.tier == Tier::kGpu || job.to.tier == Tier::kGpu;
  if (gpu && job.shards > options_.gpus.size()) {
    return absl::InvalidArgumentError(absl::StrCat("move ", job.id, ": ", job.shards,
                                                   " shards, but the GPU tier has ",
                                                   options_.gpus.size(), " ranks"));
  }
  absl::Status status = Check(job, job.from);
  return status.ok() ? Check(job, job.to) : status;
}

absl::Status StorageMover::Impl::Submit(const MoveJob& job) {
  if (absl::Status status = CheckBoth(job); !status.ok()) return status;
  const Pair pair = *PairOf(job.from.tier, job.to.tier);
  if (pair == kHostToNvme) {
    if (const auto health = options_.nvme->health(); health.degraded) {
      return absl::UnavailableError(
          absl::StrCat("move ", job.id, ": NVME takes no writes: ", health.why));
    }
  }
  const bool copy = pair <= kHostToGpu;
  if (absl::Status health = options_.copier->health(); copy && !health.ok()) {
    return absl::UnavailableError(
        absl::StrCat("move ", job.id, ": GPU is lost: ", health.message()));
  }
  {
    absl::MutexLock lock(&mu_);
    if (stopping_) return absl::UnavailableError("move: the mover stops");
    if (queued_.contains(job.id)) {
      return absl::AlreadyExistsError(absl::StrCat("move ", job.id, " is queued already"));
    }
    MoveQueue& queue = queues_[pair];
    if (queue.size(job.move_class) >= options_.queue_max) {
      return absl::ResourceExhaustedError(
          absl::StrCat("move ", job.id, ": the queue ", Name(job.from.tier), " -> ",
                       Name(job.to.tier), " is full with ", options_.queue_max));
    }
    queued_.emplace(job.id, Place{pair, queue.Push(job, next_order_++)});
    ++unfinished_;
  }
  copy ? PumpCopies() : PumpNvme();
  return absl::OkStatus();
}

void StorageMover::Impl::Raise(MoveId id) {
  absl::MutexLock lock(&mu_);
  const auto it = queued_.find(id);
  if (it == queued_.end()) return;
  queues_[it->second.pair].Raise(it->second.position, next_order_++);
}

MoveJob StorageMover::Impl::PopLocked(Pair pair) {
  MoveJob job = queues_[pair].Pop();
  queued_.erase(job.id);
  return job;
}

// Of the pairs for which the copier takes a batch now, the one with the oldest waiting job, else
// with the oldest background job.
std::optional<Pair> StorageMover::Impl::NextCopyPairLocked() const {
  const Copier::Limits limits = options_.copier->limits();
  std::optional<Pair> next;
  if (copies_[kGpuToHost] + copies_[kHostToGpu] >= limits.batches) return next;
  for (const Pair pair : {kGpuToHost, kHostToGpu}) {
    if (queues_[pair].empty() || copies_[pair] >= limits.batches_each_way) continue;
    const auto rank = [this](Pair p) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      const MoveQueue::Entry& front = queues_[p].Front();
      return std::pair(front.job.move_class, front.order);
    };
    if (!next || rank(pair) < rank(*next)) next = pair;
  }
  return next;
}

std::optional<StorageMover::Impl::Copies> StorageMover::Impl::NextCopies() {
  absl::MutexLock lock(&mu_);
  const std::optional<Pair> pair = NextCopyPairLocked();
  if (!pair) return std::nullopt;
  MoveQueue& queue = queues_[*pair];
  Copies copies{*pair, {PopLocked(*pair)}};
  const MoveClass move_class = copies.jobs[0].move_class;
  uint64_t bytes = copies.jobs[0].bytes;
  const uint64_t bytes_max = options_.copier->limits().batch_bytes;
  while (!queue.empty() && queue.Front().job.move_class == move_class &&
         bytes + queue.Front().job.bytes <= bytes_max) {
    copies.jobs.push_back(PopLocked(*pair));
    bytes += copies.jobs.back().bytes;
  }
  ++copies_[*pair];
  return copies;
}

void StorageMover::Impl::PumpCopies() {
  while (std::optional<Copies> copies = NextCopies()) StartCopies(*std::move(copies));
}

// The parts of a block between the slot of each rank and the one slot of HOST.
void StorageMover::Impl::AddPieces(const MoveJob& job, Copier::Batch& batch) const {
  const bool up = job.to.tier == Tier::kGpu;
  const uint32_t part_bytes = job.bytes / job.shards;
  std::byte* host = options_.host->At(up ? job.from.slot : job.to.slot);
  for (uint32_t rank = 0; rank < job.shards; ++rank, host += part_bytes) {
    std::byte* const gpu = options_.gpus[rank]->At(up ? job.to.slot : job.from.slot);
    batch.push_back({rank, gpu, host, part_bytes});
  }
}

void StorageMover::Impl::StartCopies(Copies copies) {
  const Pair pair = copies.pair;
  Copier::Batch batch;
  for (const MoveJob& job : copies.jobs) AddPieces(job, batch);
  auto done = [this, pair, jobs = std::move(copies.jobs)](const absl::Status& status) {
    // Whoever waited first: what is handed over meanwhile may still be ahead of what comes next. A
    // device has another batch to go on with.
    for (const MoveJob& job : jobs) done_(job.id, status);
    {
      absl::MutexLock lock(&mu_);
      --copies_[pair];
    }
    PumpCopies();
    Forget(jobs.size());
  };
  options_.copier->Copy(pair == kHostToGpu ? Copier::Direction::kToGpu : Copier::Direction::kToHost,
                        std::move(batch), std::move(done));
}

// A job that may be handed to NvmeStore now. Reads first.
bool StorageMover::Impl::NextNvme(MoveJob& job) {
  absl::MutexLock lock(&mu_);
  if (!queues_[kNvmeToHost].empty() && nvme_reads_ < options_.nvme_reads_max) {
    job = PopLocked(kNvmeToHost);
    ++nvme_reads_;
    return true;
  }
  MoveQueue& writes = queues_[kHostToNvme];
  if (writes.empty()) return false;
  // One write may always be under way, however large.
  const uint64_t bytes = writes.Front().job.bytes;
  if (nvme_write_bytes_ > 0 && nvme_write_bytes_ + bytes > options_.nvme_write_bytes_max) {
    return false;
  }
  job = PopLocked(kHostToNvme);
  nvme_write_bytes_ += bytes;
  return true;
}

void StorageMover::Impl::PumpNvme() {
  MoveJob job;
  while (NextNvme(job)) StartNvme(job);
}

void StorageMover::Impl::StartNvme(const MoveJob& job) {
  const auto done = [this, job](absl::Status status) { FinishNvme(job, std::move(status)); };
  if (job.to.tier == Tier::kNvme) {
    options_.nvme->Write(job.to.slot, {options_.host->At(job.from.slot), job.bytes}, job.record,
                         done);
  } else {
    options_.nvme->Read(job.from.slot, {options_.host->At(job.to.slot), job.bytes}, job.record,
                        done);
  }
}

void StorageMover::Impl::FinishNvme(const MoveJob& job, absl::Status status) {
  {
    absl::MutexLock lock(&mu_);
    if (job.to.tier == Tier::kNvme) {
      nvme_write_bytes_ -= job.bytes;
    } else {
      --nvme_reads_;
    }
  }
  // The device first, then whoever waited: the next job starts while DoneFn runs.
  PumpNvme();
  Finish(job.id, std::move(status));
}

void StorageMover::Impl::Finish(MoveId id, absl::Status status) {
  done_(id, std::move(status));
  Forget(1);
}

// The last that is done with the mover, which may be gone when it returns.
void StorageMover::Impl::Forget(size_t jobs) {
  absl::MutexLock lock(&mu_);
  unfinished_ -= jobs;
  if (unfinished_ == 0) idle_.SignalAll();
}

bool StorageMover::Impl::Drain(absl::Time deadline) {
  absl::MutexLock lock(&mu_);
  while (unfinished_ > 0) {
    if (idle_.WaitWithDeadline(&mu_, deadline)) return unfinished_ == 0;
  }
  return true;
}

StorageMover::StorageMover(Options options, DoneFn done)
    : impl_(std::make_unique<Impl>(std::move(options), std::move(done))) {}
StorageMover::~StorageMover() = default;
absl::Status StorageMover::Submit(const MoveJob& job) { return impl_->Submit(job); }
void StorageMover::Raise(MoveId id) { impl_->Raise(id); }
void StorageMover::Erase(Slot nvme_slot, uint32_t key_tag) { impl_->Erase(nvme_slot, key_tag); }
bool StorageMover::Drain(absl::Time deadline) { return impl_->Drain(deadline); }

}  // namespace larder
