#include "storage/nvme_store.h"

#include <atomic>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "storage/check.h"
#include "storage/nvme_committer.h"
#include "storage/nvme_directory.h"
#include "storage/nvme_format.h"
#include "storage/nvme_records.h"

namespace larder {
namespace {

// Why a record is not that of the expected block, or "" when it is.
absl::string_view Mismatch(const NvmeRecord& record, uint64_t bytes, const BlockRecord& expected) {
  if (record.block.key != expected.key) return "another block's key";
  if (record.block.parent_key != expected.parent_key) return "another parent's key";
  if (record.block.model_id != expected.model_id) return "another model";
  if (record.block.depth != expected.depth) return "another depth";
  if (record.block_bytes != bytes || record.payload_bytes != bytes) return "another length";
  return "";
}

}  // namespace

class NvmeStore::Impl {
 public:
  Impl(Options options, std::unique_ptr<NvmeDirectory> directory,
       std::unique_ptr<NvmeRecords> records, OpenedIo io)
      : options_(std::move(options)),
        directory_(std::move(directory)),
        records_(std::move(records)),
        how_(std::move(io.how)),
        io_(std::move(io.io)),
        committer_(NvmeCommitter::Options{options_.sync_bytes, options_.sync_delay,
                                          options_.probe_interval, options_.stall_limit,
                                          options_.bytes, options_.on_writable},
                   *io_, *records_) {}

  ~Impl() {
    committer_.Hurry();
    absl::MutexLock lock(&mu_);
    while (in_flight_ > 0) idle_.Wait(&mu_);
  }

  uint64_t bytes() const { return options_.bytes; }
  uint64_t slab_bytes() const { return directory_->slab_bytes(); }
  const std::string& io() const { return how_; }
  absl::Status Scan(const KeepFn& keep);
  void Write(Slot slot, std::span<const std::byte> block, const BlockRecord& record, DoneFn done);
  void Read(Slot slot, std::span<std::byte> block, const BlockRecord& expected, DoneFn done);
  void Erase(Slot slot, uint32_t key_tag) { committer_.Erase(slot, key_tag); }
  Health health() const { return committer_.health(); }
  Stats stats() const;
  NvmeWritten written() const;

 private:
  absl::Status CheckPlace(Slot slot, uint64_t bytes) const;
  DoneFn Tracked(DoneFn done);
  void Verify(Slot slot, std::span<std::byte> block, const BlockRecord& expected,
              const DoneFn& done);
  void Corrupt(Slot slot, absl::string_view why, bool has_record, const DoneFn& done);

  const Options options_;
  const std::unique_ptr<NvmeDirectory> directory_;
  const std::unique_ptr<NvmeRecords> records_;
  const std::string how_;

  std::atomic<uint64_t> reads_{0};
  std::atomic<uint64_t> writes_{0};
  std::atomic<uint64_t> read_bytes_{0};
  std::atomic<uint64_t> written_bytes_{0};
  std::atomic<uint64_t> corrupt_{0};
  std::atomic<uint64_t> read_errors_{0};

  absl::Mutex mu_;
  absl::CondVar idle_;
  uint64_t in_flight_ ABSL_GUARDED_BY(mu_) = 0;  // accepted, done has not returned

  // Last, because their threads use all of the above and the committer the I/O.
  const std::unique_ptr<IoBackend> io_;
  NvmeCommitter committer_;
};

absl::Status NvmeStore::Impl::Scan(const KeepFn& keep) {
  return records_->Scan([&](Slot slot, const NvmeRecord& record) {
    return record.block_bytes == record.payload_bytes &&
           CheckPlace(slot, record.block_bytes).ok() &&
           keep(slot, record.block_bytes, record.block);
  });
}

absl::Status NvmeStore::Impl::CheckPlace(Slot slot, uint64_t bytes) const {
  if (slot && bytes > 0 && bytes <= UINT32_MAX && slot.offset() < options_.bytes &&
      bytes <= options_.bytes - slot.offset()) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("nvme: slot ", slot.number(), " with ", bytes,
                                                 " bytes is not in a file of ", options_.bytes));
}

// Counts an operation as in flight until its done has returned.
NvmeStore::DoneFn NvmeStore::Impl::Tracked(DoneFn done) {
  {
    absl::MutexLock lock(&mu_);
    ++in_flight_;
  }
  return [this, done = std::move(done)](absl::Status status) {
    done(std::move(status));
    absl::MutexLock lock(&mu_);
    if (--in_flight_ == 0) idle_.Signal();
  };
}

void NvmeStore::Impl::Write(Slot slot, std::span<const std::byte> block, const BlockRecord& record,
                            DoneFn done) {
  done = Tracked([this, bytes = block.size(), done = std::move(done)](absl::Status status) {
    ++writes_;
    if (status.ok()) written_bytes_ += bytes;
    done(std::move(status));
  });
  if (absl::Status status = CheckPlace(slot, block.size()); !status.ok()) {
    return committer_.Fail(std::move(status), std::move(done));
  }
  if (const Health now = health(); now.degraded) {
    return committer_.Fail(absl::UnavailableError(absl::StrCat("nvme: writes stopped: ", now.why)),
                           std::move(done));
  }
  const NvmeCommitter::SyncEpoch epoch = committer_.WriteStarts();
  io_->Write(slot.offset(), block,
             [this, slot, block, record, epoch, done = std::move(done)](absl::Status status) mutable {
               if (!status.ok()) return committer_.FailDevice(std::move(status), std::move(done));
               const auto bytes = static_cast<uint32_t>(block.size());
               // Hashed on an I/O thread; the block does not change meanwhile.
               committer_.Put(slot, {record, bytes, bytes, PayloadHash(block)}, epoch,
                              std::move(done));
             });
}

void NvmeStore::Impl::Read(Slot slot, std::span<std::byte> block, const BlockRecord& expected,
                           DoneFn done) {
  done = Tracked(std::move(done));
  if (absl::Status status = CheckPlace(slot, block.size()); !status.ok()) {
    ++reads_;
    return committer_.Fail(std::move(status), std::move(done));
  }
  // The payload first and the record after it: one hop to an I/O thread instead of two, and
  // the same answer, because the slot does not change meanwhile.
  io_->Read(slot.offset(), block, [this, slot, block, expected, done](absl::Status status) {
    ++reads_;
    if (status.ok()) return Verify(slot, block, expected, done);
    ++read_errors_;
    done(std::move(status));
  });
}

void NvmeStore::Impl::Verify(Slot slot, std::span<std::byte> block, const BlockRecord& expected,
                             const DoneFn& done) {
  const auto record = records_->Get(slot);
  if (absl::IsNotFound(record.status())) return Corrupt(slot, "no record", false, done);
  if (absl::IsDataLoss(record.status())) {
    return Corrupt(slot, record.status().message(), true, done);
  }
  if (!record.ok()) {
    ++read_errors_;
    return done(record.status());
  }
  absl::string_view why = Mismatch(*record, block.size(), expected);
  if (why.empty() && PayloadHash(block) != record->payload_hash) why = "a wrong checksum";
  if (!why.empty()) return Corrupt(slot, why, true, done);
  read_bytes_ += block.size();
  done(absl::OkStatus());
}

void NvmeStore::Impl::Corrupt(Slot slot, absl::string_view why, bool has_record,
                              const DoneFn& done) {
  ++corrupt_;
  absl::Status status =
      absl::DataLossError(absl::StrCat("nvme: slot ", slot.number(), " has ", why));
  if (has_record) return committer_.Forget(slot, std::move(status), done);
  done(std::move(status));
}

NvmeStore::Stats NvmeStore::Impl::stats() const {
  Stats stats;
  stats.reads = reads_;
  stats.writes = writes_;
  stats.read_bytes = read_bytes_;
  stats.written_bytes = written_bytes_;
  stats.corrupt = corrupt_;
  stats.errors = read_errors_ + committer_.errors();
  stats.syncs = committer_.syncs();
  return stats;
}

NvmeWritten NvmeStore::Impl::written() const {
  NvmeWritten written = records_->Written();
  written.Advance(absl::Now());
  return written;
}

NvmeStore::NvmeStore(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
NvmeStore::~NvmeStore() = default;

absl::StatusOr<std::unique_ptr<NvmeStore>> NvmeStore::Open(Options options) {
  auto directory = NvmeDirectory::Open(
      {options.directory, options.bytes, options.slab_bytes, options.direct_io});
  if (!directory.ok()) return directory.status();
  auto records = options.open_records ? options.open_records()
                                      : NvmeRecords::Open((*directory)->index_path());
  if (!records.ok()) return records.status();
  OpenedIo io = OpenIo((*directory)->TakeSlots(), {.direct = (*directory)->direct(),
                                                   .threads = options.io_threads,
                                                   .name = (*directory)->slots_path(),
                                                   .memory = options.memory,
                                                   .best = options.io});
  if (options.wrap_io) io.io = options.wrap_io(std::move(io.io));
  return std::unique_ptr<NvmeStore>(new NvmeStore(std::make_unique<Impl>(
      std::move(options), *std::move(directory), *std::move(records), std::move(io))));
}

uint64_t NvmeStore::bytes() const { return impl_->bytes(); }
uint64_t NvmeStore::slab_bytes() const { return impl_->slab_bytes(); }
const std::string& NvmeStore::io() const { return impl_->io(); }
absl::Status NvmeStore::Scan(const KeepFn& keep) { return impl_->Scan(keep); }
void NvmeStore::Write(Slot slot, std::span<const std::byte> block, const BlockRecord& record,
                      DoneFn done) {
  impl_->Write(slot, block, record, std::move(done));
}
void NvmeStore::Read(Slot slot, std::span<std::byte> block, const BlockRecord& expected,
                     DoneFn done) {
  impl_->Read(slot, block, expected, std::move(done));
}
void NvmeStore::Erase(Slot slot, uint32_t key_tag) { impl_->Erase(slot, key_tag); }
NvmeStore::Health NvmeStore::health() const { return impl_->health(); }
NvmeStore::Stats NvmeStore::stats() const { return impl_->stats(); }
NvmeWritten NvmeStore::written() const { return impl_->written(); }

}  // namespace larder
