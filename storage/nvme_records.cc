#include "storage/nvme_records.h"

#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/file_system.h>
#include <rocksdb/iterator.h>
#include <rocksdb/options.h>
#include <rocksdb/table.h>
#include <rocksdb/write_batch.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <filesystem>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"

namespace larder {
namespace {

// No slot's keys, because those are 4 bytes.
constexpr char kProbeKey[] = "probe";
constexpr char kWrittenKey[] = "written";
// What a start may write before it serves: a memtable, a log, a manifest.
constexpr size_t kReopenBytes = 4 << 20;
// Deletes of a scan are applied so many at a time.
constexpr size_t kScanDeletesMax = 1024;

rocksdb::Options SmallOptions(rocksdb::Env* env) {
  rocksdb::BlockBasedTableOptions table;
  table.block_cache = rocksdb::NewLRUCache(8 << 20, /*num_shard_bits=*/2);
  table.cache_index_and_filter_blocks = true;
  rocksdb::Options options;
  if (env != nullptr) options.env = env;
  options.create_if_missing = true;
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  options.compression = rocksdb::kNoCompression;  // keys and hashes do not compress
  options.write_buffer_size = 2 << 20;
  options.max_write_buffer_number = 2;
  options.target_file_size_base = 8 << 20;
  options.max_bytes_for_level_base = 32 << 20;
  options.max_background_jobs = 2;
  options.max_open_files = 128;
  options.max_total_wal_size = 16 << 20;
  // A damaged entry of the log fails the opening, and Repair keeps all the others. The mode that
  // skips entries is not for us: on a damaged one that looks like a recycled log's it never ends.
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  // Probe brings it back after a failed write, and nobody beside it.
  options.max_bgerror_resume_count = 0;
  options.skip_stats_update_on_db_open = true;
  options.stats_dump_period_sec = 0;
  options.stats_persist_period_sec = 0;
  options.info_log_level = rocksdb::WARN_LEVEL;
  options.max_log_file_size = 1 << 20;
  options.keep_log_file_num = 2;
  return options;
}

// RocksDB's own log, for those who only look and so write no file.
class NoLog final : public rocksdb::Logger {
 public:
  using Logger::Logv;
  void Logv(const char*, va_list) override {}
};

// RocksDB's errors, converted once.
absl::Status FromRocks(absl::string_view what, const rocksdb::Status& status) {
  if (status.ok()) return absl::OkStatus();
  const std::string text = absl::StrCat("nvme index: ", what, ": ", status.ToString());
  if (status.IsCorruption()) return absl::DataLossError(text);
  if (status.IsNotFound()) return absl::NotFoundError(text);
  return absl::UnavailableError(text);
}

absl::Status NotOpen() {
  return absl::UnavailableError("nvme index: it could not be opened again after a failed write");
}

rocksdb::Slice SliceOf(const auto& array) { return {array.data(), array.size()}; }

class RocksRecords final : public NvmeRecords {
 public:
  RocksRecords(std::string path, rocksdb::Env* env)
      : path_(std::move(path)), options_(SmallOptions(env)) {}
  absl::Status Open();
  absl::Status OpenReadOnly();

  absl::StatusOr<NvmeRecord> Get(Slot slot) const override;
  absl::Status Apply(std::span<const Change> changes, bool sync) override;
  NvmeWritten Written() const override;
  absl::Status Scan(const KeepFn& keep) override;
  absl::Status Visit(const VisitFn& visit) const override;
  absl::Status Probe() override;

 private:
  rocksdb::Status TryOpen() ABSL_EXCLUSIVE_LOCKS_REQUIRED(db_mu_);
  absl::Status OpenOrRepair() ABSL_EXCLUSIVE_LOCKS_REQUIRED(db_mu_);
  absl::Status Repair(absl::string_view why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(db_mu_);
  absl::Status Reopen();
  absl::Status SyncParent() const;
  absl::Status TryFolder() const;
  void LoadWritten() ABSL_SHARED_LOCKS_REQUIRED(db_mu_);
  absl::Status Write(const rocksdb::WriteOptions& options, rocksdb::WriteBatch batch,
                     absl::string_view what) ABSL_SHARED_LOCKS_REQUIRED(db_mu_);
  absl::Status ScanFrom(Slot& next, const KeepFn& keep) ABSL_SHARED_LOCKS_REQUIRED(db_mu_);

  const std::string path_;
  const rocksdb::Options options_;

  // Whoever uses the database holds it shared; only who opens it anew waits for them.
  mutable absl::Mutex db_mu_;
  std::unique_ptr<rocksdb::DB> db_ ABSL_GUARDED_BY(db_mu_);  // null: could not be opened anew
  std::atomic<bool> refuses_{false};                         // since a write has failed

  mutable absl::Mutex mu_;
  NvmeWritten written_ ABSL_GUARDED_BY(mu_);
};

rocksdb::Status RocksRecords::TryOpen() {
  rocksdb::DB* db = nullptr;
  const rocksdb::Status status = rocksdb::DB::Open(options_, path_, &db);
  db_.reset(db);
  return status;
}

// Closes, repairs and opens again.
absl::Status RocksRecords::Repair(absl::string_view why) {
  spdlog::warn("nvme index {}: damaged, repairing it: {}", path_, std::string(why));
  db_.reset();
  rocksdb::Status status = rocksdb::RepairDB(path_, options_);
  if (status.ok()) status = TryOpen();
  if (status.ok()) return absl::OkStatus();
  spdlog::error("nvme index {}: beyond repair, beginning anew: {}", path_, status.ToString());
  db_.reset();
  status = rocksdb::DestroyDB(path_, options_);
  if (status.ok()) status = TryOpen();
  return FromRocks("opening it anew", status);
}

// RocksDB syncs what is in its folder, but not that there is such a folder.
absl::Status RocksRecords::SyncParent() const {
  const std::string parent = std::filesystem::path(path_).parent_path();
  std::unique_ptr<rocksdb::FSDirectory> folder;
  rocksdb::IOStatus status =
      options_.env->GetFileSystem()->NewDirectory(parent, {}, &folder, nullptr);
  if (status.ok()) status = folder->Fsync({}, nullptr);
  return FromRocks(absl::StrCat("syncing ", parent), status);
}

void RocksRecords::LoadWritten() {
  std::string text;
  const rocksdb::Status status = db_->Get({}, kWrittenKey, &text);
  if (status.IsNotFound()) return;
  if (const auto written = NvmeWritten::Decode(text); status.ok() && written) {
    const absl::MutexLock lock(&mu_);
    written_ = *written;
    return;
  }
  spdlog::warn("nvme index {}: how much was written in the last day is lost: {}", path_,
               status.ok() ? "damaged" : status.ToString());
}

absl::Status RocksRecords::OpenOrRepair() {
  rocksdb::Status opened = TryOpen();
  // The latter ones where a damaged name or number passes for a good one.
  const bool damaged = opened.IsCorruption() || opened.IsPathNotFound() ||
                       opened.IsInvalidArgument() || opened.IsNotSupported();
  absl::Status status =
      damaged ? Repair(opened.ToString()) : FromRocks("opening it", opened);
  return status.ok() ? SyncParent() : status;
}

absl::Status RocksRecords::Open() {
  const absl::MutexLock lock(&db_mu_);
  absl::Status status = OpenOrRepair();
  if (status.ok()) LoadWritten();
  return status;
}

absl::Status RocksRecords::OpenReadOnly() {
  const absl::MutexLock lock(&db_mu_);
  rocksdb::Options options = options_;
  options.create_if_missing = false;
  options.info_log = std::make_shared<NoLog>();
  rocksdb::DB* db = nullptr;
  const rocksdb::Status status = rocksdb::DB::OpenForReadOnly(options, path_, &db);
  db_.reset(db);
  return FromRocks("opening it to read", status);
}

absl::StatusOr<NvmeRecord> RocksRecords::Get(Slot slot) const {
  const absl::ReaderMutexLock lock(&db_mu_);
  if (db_ == nullptr) return NotOpen();
  const auto key = EncodeNvmeKey(slot);
  rocksdb::PinnableSlice value;
  const rocksdb::Status status =
      db_->Get(rocksdb::ReadOptions(), db_->DefaultColumnFamily(), SliceOf(key), &value);
  if (!status.ok()) return FromRocks(absl::StrCat("slot ", slot.number()), status);
  auto record = DecodeNvmeRecord(slot, {value.data(), value.size()});
  if (!record) {
    return absl::DataLossError(absl::StrCat("nvme index: slot ", slot.number(),
                                            ": the record is damaged or of another version"));
  }
  return *record;
}

NvmeWritten RocksRecords::Written() const {
  const absl::MutexLock lock(&mu_);
  return written_;
}

absl::Status RocksRecords::Apply(std::span<const Change> changes, bool sync) {
  const absl::Time now = absl::Now();
  const auto now_s = static_cast<uint64_t>(absl::ToUnixSeconds(now));
  uint64_t payload_bytes = 0;
  rocksdb::WriteBatch batch;
  for (const Change& change : changes) {
    const auto key = EncodeNvmeKey(change.slot);
    rocksdb::Status status;
    if (change.record) {
      NvmeRecord record = *change.record;
      record.block.written_at_s = now_s;
      payload_bytes += record.payload_bytes;
      status = batch.Put(SliceOf(key), SliceOf(EncodeNvmeRecord(change.slot, record)));
    } else {
      status = batch.Delete(SliceOf(key));
    }
    if (!status.ok()) return FromRocks("batch", status);
  }
  if (payload_bytes > 0) {
    const absl::MutexLock lock(&mu_);
    written_.Advance(now);
    written_.Add(payload_bytes);
    const rocksdb::Status status = batch.Put(kWrittenKey, SliceOf(written_.Encode()));
    if (!status.ok()) return FromRocks("batch", status);
  }
  rocksdb::WriteOptions options;
  options.sync = sync;
  const absl::ReaderMutexLock lock(&db_mu_);
  return Write(options, std::move(batch), "writing a group");
}

absl::Status RocksRecords::Write(const rocksdb::WriteOptions& options, rocksdb::WriteBatch batch,
                                 absl::string_view what) {
  if (refuses_) return absl::UnavailableError("nvme index: refuses writes since one has failed");
  const rocksdb::Status status = db_->Write(options, &batch);
  if (!status.ok()) refuses_ = true;
  return FromRocks(what, status);
}

// Goes on from `next`, which moves past each record that was told of.
absl::Status RocksRecords::ScanFrom(Slot& next, const KeepFn& keep) {
  rocksdb::ReadOptions options;
  options.fill_cache = false;
  const std::unique_ptr<rocksdb::Iterator> it(db_->NewIterator(options));
  rocksdb::WriteBatch deletes;
  const auto first = EncodeNvmeKey(next);
  for (it->Seek(SliceOf(first)); it->Valid(); it->Next()) {
    if (it->key() == kWrittenKey) continue;
    const absl::string_view key(it->key().data(), it->key().size());
    const auto slot = DecodeNvmeKey(key);
    const auto record =
        slot ? DecodeNvmeRecord(*slot, {it->value().data(), it->value().size()}) : std::nullopt;
    if (slot) next = Slot(slot->number() + 1);
    if (!record || !keep(*slot, *record)) {
      if (auto status = deletes.Delete(it->key()); !status.ok()) return FromRocks("scan", status);
    }
    if (static_cast<size_t>(deletes.Count()) < kScanDeletesMax) continue;
    absl::Status status = Write({}, std::exchange(deletes, rocksdb::WriteBatch()), "scan");
    if (!status.ok()) return status;
  }
  if (!it->status().ok()) return FromRocks("scan", it->status());
  return Write({}, std::move(deletes), "scan");
}

absl::Status RocksRecords::Scan(const KeepFn& keep) {
  const absl::MutexLock lock(&db_mu_);
  Slot next(1);
  absl::Status status = ScanFrom(next, keep);
  if (!absl::IsDataLoss(status)) return status;
  status = Repair(status.ToString());
  return status.ok() ? ScanFrom(next, keep) : status;
}

absl::Status RocksRecords::Visit(const VisitFn& visit) const {
  const absl::ReaderMutexLock lock(&db_mu_);
  if (db_ == nullptr) return NotOpen();
  rocksdb::ReadOptions options;
  options.fill_cache = false;
  const std::unique_ptr<rocksdb::Iterator> it(db_->NewIterator(options));
  for (it->SeekToFirst(); it->Valid(); it->Next()) {
    if (it->key() == kWrittenKey) continue;
    if (it->key() == kProbeKey) continue;  // a crash can leave it behind
    const auto slot = DecodeNvmeKey({it->key().data(), it->key().size()});
    visit(slot.value_or(Slot()),
          slot ? DecodeNvmeRecord(*slot, {it->value().data(), it->value().size()}) : std::nullopt);
  }
  return FromRocks("reading all records", it->status());
}

absl::Status RocksRecords::Probe() {
  if (refuses_) {
    if (absl::Status status = Reopen(); !status.ok()) return status;
  }
  rocksdb::WriteOptions options;
  options.sync = true;
  const absl::ReaderMutexLock lock(&db_mu_);
  for (const bool put : {true, false}) {
    rocksdb::WriteBatch batch;
    const rocksdb::Status status = put ? batch.Put(kProbeKey, "1") : batch.Delete(kProbeKey);
    if (!status.ok()) return FromRocks("batch", status);
    if (absl::Status s = Write(options, std::move(batch), "probe"); !s.ok()) return s;
  }
  return absl::OkStatus();
}

// RocksDB's Resume is no way back from every failed write: an EIO is final, and after an ENOSPC
// with nothing in its memtable it writes on in the log that failed, which aborts the process where
// it was built with assertions, as Debian's is.
absl::Status RocksRecords::Reopen() {
  // What is open can still be read, so first whether that can succeed.
  if (absl::Status status = TryFolder(); !status.ok()) return status;
  const absl::MutexLock lock(&db_mu_);
  db_.reset();
  absl::Status status = OpenOrRepair();
  if (status.ok()) refuses_ = false;
  return status;
}

// OK: what opening it writes can be written.
absl::Status RocksRecords::TryFolder() const {
  rocksdb::FileSystem& files = *options_.env->GetFileSystem();
  const std::string path = path_ + "/probe";  // no name of RocksDB's
  std::unique_ptr<rocksdb::FSWritableFile> file;
  rocksdb::IOStatus status = files.NewWritableFile(path, {}, &file, nullptr);
  if (status.ok()) status = file->Append(std::string(kReopenBytes, '\0'), {}, nullptr);
  if (status.ok()) status = file->Fsync({}, nullptr);
  if (status.ok()) status = file->Close({}, nullptr);
  const rocksdb::IOStatus deleted = files.DeleteFile(path, {}, nullptr);
  return FromRocks(absl::StrCat("writing ", path), status.ok() ? deleted : status);
}

}  // namespace

absl::StatusOr<std::unique_ptr<NvmeRecords>> NvmeRecords::Open(const std::string& path,
                                                               rocksdb::Env* env) {
  auto records = std::make_unique<RocksRecords>(path, env);
  if (absl::Status status = records->Open(); !status.ok()) return status;
  return records;
}

absl::StatusOr<std::unique_ptr<NvmeRecords>> NvmeRecords::OpenReadOnly(const std::string& path) {
  auto records = std::make_unique<RocksRecords>(path, /*env=*/nullptr);
  if (absl::Status status = records->OpenReadOnly(); !status.ok()) return status;
  return records;
}

}  // namespace larder
