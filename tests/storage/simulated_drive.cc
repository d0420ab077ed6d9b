#include "tests/storage/simulated_drive.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <thread>
#include <utility>

#include "storage/errno_status.h"
#include "storage/io_transfer.h"
#include "storage/nvme_format.h"

namespace larder::testing {

// One thread that does one thing after the other.
class SimulatedIo final : public IoBackend {
 public:
  explicit SimulatedIo(SimulatedDrive& drive) : drive_(drive), thread_([this] { Run(); }) {}
  ~SimulatedIo() override {
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
    }
    thread_.join();
  }
  void Read(uint64_t offset, std::span<std::byte> to, DoneFn done) override {
    Queue({offset, to.data(), to.size(), false, std::move(done)});
  }
  void Write(uint64_t offset, std::span<const std::byte> from, DoneFn done) override {
    Queue({offset, const_cast<std::byte*>(from.data()), from.size(), true, std::move(done)});
  }
  absl::Status Sync() override { return drive_.SyncNow(); }

 private:
  void Queue(IoJob job) {
    absl::MutexLock lock(&mu_);
    queue_.push_back(std::move(job));
  }
  bool Ready() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stopping_ || !queue_.empty(); }
  void Run() {
    while (true) {
      IoJob job;
      {
        absl::MutexLock lock(&mu_);
        mu_.Await(absl::Condition(this, &SimulatedIo::Ready));
        if (queue_.empty()) return;
        job = std::move(queue_.front());
        queue_.pop_front();
      }
      IoTransfer transfer(std::move(job), /*direct=*/true);
      while (!transfer.Advance(
          drive_.Call(transfer.write(), transfer.offset(), transfer.Left()))) {
      }
      transfer.Finish("simulated slots");
    }
  }

  SimulatedDrive& drive_;
  absl::Mutex mu_;
  std::deque<IoJob> queue_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

class SimulatedRecords final : public NvmeRecords {
 public:
  explicit SimulatedRecords(SimulatedDrive& drive) : drive_(drive) {}

  absl::StatusOr<NvmeRecord> Get(Slot slot) const override {
    absl::MutexLock lock(&drive_.mu_);
    const auto found = drive_.seen_index_.find(slot);
    if (found == drive_.seen_index_.end()) return absl::NotFoundError("no record");
    const auto record = DecodeNvmeRecord(slot, found->second);
    if (!record) return absl::DataLossError("damaged record");
    return *record;
  }
  absl::Status Apply(std::span<const Change> changes, bool sync) override {
    SimulatedDrive::Batch batch;
    for (const Change& change : changes) {
      std::optional<std::string> value;
      if (change.record) {
        const auto bytes = EncodeNvmeRecord(change.slot, *change.record);
        value.emplace(bytes.data(), bytes.size());
      }
      batch.changes.emplace_back(change.slot, std::move(value));
    }
    return drive_.ApplyNow(std::move(batch), sync);
  }
  NvmeWritten Written() const override { return {}; }
  absl::Status Scan(const KeepFn& keep) override {
    SimulatedDrive::Batch deletes;
    absl::Status status = Visit([&](Slot slot, const std::optional<NvmeRecord>& record) {
      if (!record || !keep(slot, *record)) deletes.changes.emplace_back(slot, std::nullopt);
    });
    return status.ok() ? drive_.ApplyNow(std::move(deletes), /*sync=*/false) : status;
  }
  absl::Status Visit(const VisitFn& visit) const override {
    SimulatedDrive::Index copy;
    {
      absl::MutexLock lock(&drive_.mu_);
      copy = drive_.seen_index_;
    }
    for (const auto& [slot, value] : copy) visit(slot, DecodeNvmeRecord(slot, value));
    return absl::OkStatus();
  }
  absl::Status Probe() override {
    {
      absl::MutexLock lock(&drive_.mu_);
      if (drive_.index_errno == 0) drive_.index_refuses_ = false;
    }
    return drive_.ApplyNow({}, /*sync=*/true);
  }

 private:
  SimulatedDrive& drive_;
};

SimulatedDrive::SimulatedDrive(uint64_t bytes, uint64_t seed)
    : random_(seed),
      seen_(bytes),
      medium_(bytes),
      files_(seed, [this](bool change) { return FileError(change); }) {}

std::unique_ptr<IoBackend> SimulatedDrive::Io() { return std::make_unique<SimulatedIo>(*this); }
std::unique_ptr<NvmeRecords> SimulatedDrive::Records() {
  return std::make_unique<SimulatedRecords>(*this);
}

void SimulatedDrive::CutAfter(uint64_t events) {
  absl::MutexLock lock(&mu_);
  events_left_ = events;
}

bool SimulatedDrive::off() const {
  absl::MutexLock lock(&mu_);
  return off_;
}

// False: there is no power.
bool SimulatedDrive::Event() {
  if (events_left_ > 0 && --events_left_ == 0) off_ = true;
  return !off_;
}

void SimulatedDrive::Put(Index& index, const Batch& batch) {
  for (const auto& [slot, value] : batch.changes) {
    if (value) {
      index[slot] = *value;
    } else {
      index.erase(slot);
    }
  }
}

// What pread and pwrite return, or the kernel's ring.
int64_t SimulatedDrive::Call(bool write, uint64_t offset, std::span<const iovec> parts) {
  absl::MutexLock lock(&mu_);
  if (off_) return -ENODEV;
  const bool power = !write || Event();
  const int error = power ? (write ? write_errno : read_errno).load() : ENODEV;
  const uint64_t dice = random_() % 16;
  if (error == 0 && dice < 2) return dice == 0 ? -EINTR : -EAGAIN;
  uint64_t bytes = 0;
  for (const iovec& part : parts) bytes += part.iov_len;
  // One that fails has done some of its work.
  if (error != 0 || dice < 5) bytes = (1 + random_() % (bytes / kSector)) * kSector;
  if (write) {
    Write(offset, bytes, parts);
  } else if (error == 0) {
    Read(offset, bytes, parts);
  }
  return error == 0 ? static_cast<int64_t>(bytes) : -error;
}

void SimulatedDrive::Read(uint64_t offset, uint64_t bytes, std::span<const iovec> parts) {
  for (const iovec& part : parts) {
    const uint64_t n = std::min<uint64_t>(bytes, part.iov_len);
    std::memcpy(part.iov_base, seen_.data() + offset, n);
    offset += n;
    bytes -= n;
  }
}

void SimulatedDrive::Write(uint64_t offset, uint64_t bytes, std::span<const iovec> parts) {
  const uint64_t end = offset + bytes;
  for (uint64_t at = offset; const iovec& part : parts) {
    const uint64_t n = std::min<uint64_t>(end - at, part.iov_len);
    std::memcpy(seen_.data() + at, part.iov_base, n);
    at += n;
  }
  for (uint64_t at = offset; at < end; at += kSector) {
    Sector& sector = cached_[at];
    std::memcpy(sector.bytes.data(), seen_.data() + at, kSector);
    sector.dropped = false;
  }
}

void SimulatedDrive::Settle(uint64_t at, const Sector& sector) {
  std::memcpy(medium_.data() + at, sector.bytes.data(), kSector);
}

absl::Status SimulatedDrive::SyncNow() {
  absl::MutexLock lock(&mu_);
  const bool was_off = off_;
  // Once: the next one says that all is well.
  const int error = Event() ? sync_errno.exchange(0) : ENODEV;
  if (error != 0) {
    for (auto& [at, sector] : cached_) sector.dropped = sector.dropped || !was_off;
    return ErrnoStatus("simulated sync", error);
  }
  for (const auto& [at, sector] : cached_) {
    if (!sector.dropped) Settle(at, sector);
  }
  std::erase_if(cached_, [](const auto& each) { return !each.second.dropped; });
  return absl::OkStatus();
}

absl::Status SimulatedDrive::ApplyNow(Batch batch, bool sync) {
  absl::MutexLock lock(&mu_);
  if (off_ || index_refuses_) return absl::UnavailableError("simulated index: refuses");
  const bool power = Event();
  const int error = power ? index_errno.load() : ENODEV;
  if (error != 0) {
    // It may be in the log all the same.
    if (random_() % 2 == 0) cached_batches_.push_back(std::move(batch));
    index_refuses_ = true;
    return ErrnoStatus("simulated index", error);
  }
  Put(seen_index_, batch);
  cached_batches_.push_back(std::move(batch));
  if (!sync) return absl::OkStatus();
  for (const Batch& each : cached_batches_) Put(medium_index_, each);
  cached_batches_.clear();
  return absl::OkStatus();
}

// 0, or what an operation on the index's files fails with.
int SimulatedDrive::FileError(bool change) {
  absl::MutexLock lock(&mu_);
  if (off_ || (change && !Event())) return ENODEV;
  return change ? index_errno.load() : 0;
}

void SimulatedDrive::PowerOn() {
  files_.PowerCut();
  absl::MutexLock lock(&mu_);
  uint64_t page = ~uint64_t{0};
  uint64_t odds = 0;  // of a page: none of it, any of it, all of it
  for (const auto& [at, sector] : cached_) {
    if (at / kSlotGranule != page) odds = random_() % 3;
    page = at / kSlotGranule;
    if (odds == 2 || (odds == 1 && random_() % 2 == 0)) Settle(at, sector);
  }
  cached_.clear();
  const uint64_t kept = random_() % (cached_batches_.size() + 1);
  for (uint64_t i = 0; i < kept; ++i) Put(medium_index_, cached_batches_[i]);
  cached_batches_.clear();
  seen_ = medium_;
  seen_index_ = medium_index_;
  index_refuses_ = off_ = false;
  events_left_ = 0;
  read_errno = write_errno = sync_errno = index_errno = 0;
}

void SimulatedDrive::FlipPayloadBit(uint64_t offset, int bit) {
  absl::MutexLock lock(&mu_);
  for (auto* image : {&seen_, &medium_}) (*image)[offset] ^= std::byte{1} << bit;
}

void SimulatedDrive::FlipRecordBit(Slot slot, uint64_t bit) {
  absl::MutexLock lock(&mu_);
  for (Index* index : {&seen_index_, &medium_index_}) {
    const auto found = index->find(slot);
    if (found == index->end()) continue;
    char& byte = found->second[bit / 8 % found->second.size()];
    byte = static_cast<char>(byte ^ (1 << bit % 8));
  }
}

}  // namespace larder::testing
