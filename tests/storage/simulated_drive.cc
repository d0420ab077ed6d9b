#include "tests/storage/simulated_drive.h"

#include <cerrno>
#include <cstring>
#include <deque>
#include <functional>
#include <thread>
#include <utility>

#include "storage/errno_status.h"
#include "storage/nvme_format.h"

namespace larder::testing {

namespace {

constexpr uint64_t kSector = 512;

uint64_t Padded(uint64_t bytes) { return (bytes + kSlotGranule - 1) / kSlotGranule * kSlotGranule; }

}  // namespace

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
    Queue([=, this] { done(drive_.ReadNow(offset, to)); });
  }
  void Write(uint64_t offset, std::span<const std::byte> from, DoneFn done) override {
    Queue([=, this] { done(drive_.WriteNow(offset, from)); });
  }
  absl::Status Sync() override { return drive_.SyncNow(); }

 private:
  void Queue(std::function<void()> work) {
    absl::MutexLock lock(&mu_);
    queue_.push_back(std::move(work));
  }
  bool Ready() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stopping_ || !queue_.empty(); }
  void Run() {
    while (true) {
      std::function<void()> work;
      {
        absl::MutexLock lock(&mu_);
        mu_.Await(absl::Condition(this, &SimulatedIo::Ready));
        if (queue_.empty()) return;
        work = std::move(queue_.front());
        queue_.pop_front();
      }
      work();
    }
  }

  SimulatedDrive& drive_;
  absl::Mutex mu_;
  std::deque<std::function<void()>> queue_ ABSL_GUARDED_BY(mu_);
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
    : random_(seed), seen_(bytes), medium_(bytes) {}

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

void SimulatedDrive::Put(std::vector<std::byte>& image, const Write& write, uint64_t from,
                         uint64_t bytes) {
  std::memcpy(image.data() + write.offset + from, write.bytes.data() + from, bytes);
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

absl::Status SimulatedDrive::WriteNow(uint64_t offset, std::span<const std::byte> from) {
  absl::MutexLock lock(&mu_);
  if (off_) return ErrnoStatus("simulated write", ENODEV);
  const bool power = Event();
  Write write{offset, std::vector<std::byte>(Padded(from.size()))};
  std::memcpy(write.bytes.data(), from.data(), from.size());
  const int error = power ? write_errno.load() : ENODEV;
  // One that fails has done some of its work.
  if (error != 0) write.bytes.resize(random_() % (write.bytes.size() / kSector + 1) * kSector);
  Put(seen_, write, 0, write.bytes.size());
  // Of two writes to one place the later one is what remains.
  std::erase_if(cached_, [&](const Write& old) { return old.offset == offset; });
  cached_.push_back(std::move(write));
  return error == 0 ? absl::OkStatus() : ErrnoStatus("simulated write", error);
}

absl::Status SimulatedDrive::ReadNow(uint64_t offset, std::span<std::byte> to) {
  absl::MutexLock lock(&mu_);
  const int error = off_ ? ENODEV : read_errno.load();
  if (error != 0) return ErrnoStatus("simulated read", error);
  std::memcpy(to.data(), seen_.data() + offset, to.size());
  return absl::OkStatus();
}

absl::Status SimulatedDrive::SyncNow() {
  absl::MutexLock lock(&mu_);
  const bool was_off = off_;
  // Once: the next one says that all is well.
  const int error = Event() ? sync_errno.exchange(0) : ENODEV;
  if (error != 0) {
    for (Write& write : cached_) write.dropped = write.dropped || !was_off;
    return ErrnoStatus("simulated sync", error);
  }
  for (const Write& write : cached_) {
    if (!write.dropped) Put(medium_, write, 0, write.bytes.size());
  }
  std::erase_if(cached_, [](const Write& write) { return !write.dropped; });
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

void SimulatedDrive::PowerOn() {
  absl::MutexLock lock(&mu_);
  for (const Write& write : cached_) {
    const uint64_t odds = random_() % 3;  // none of it, any of it, all of it
    for (uint64_t at = 0; at < write.bytes.size(); at += kSector) {
      if (odds == 2 || (odds == 1 && random_() % 2 == 0)) Put(medium_, write, at, kSector);
    }
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
