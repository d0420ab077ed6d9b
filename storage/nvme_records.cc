#include "storage/nvme_records.h"

#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/iterator.h>
#include <rocksdb/options.h>
#include <rocksdb/table.h>
#include <rocksdb/write_batch.h>
#include <spdlog/spdlog.h>

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace larder {
namespace {

// No slot's key, because those are 4 bytes.
constexpr char kProbeKey[] = "probe";
// Deletes of a scan are applied so many at a time.
constexpr size_t kScanDeletesMax = 1024;

rocksdb::Options SmallOptions() {
  rocksdb::BlockBasedTableOptions table;
  table.block_cache = rocksdb::NewLRUCache(8 << 20, /*num_shard_bits=*/2);
  table.cache_index_and_filter_blocks = true;
  rocksdb::Options options;
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
  // Every record stands for itself and is checked when used, so that one damaged entry of
  // the log costs no other.
  options.wal_recovery_mode = rocksdb::WALRecoveryMode::kSkipAnyCorruptedRecords;
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

rocksdb::Slice SliceOf(const auto& array) { return {array.data(), array.size()}; }

class RocksRecords final : public NvmeRecords {
 public:
  explicit RocksRecords(std::string path) : path_(std::move(path)) {}
  absl::Status OpenOrRepair();
  absl::Status OpenReadOnly();

  absl::StatusOr<NvmeRecord> Get(Slot slot) const override;
  absl::Status Apply(std::span<const Change> changes, bool sync) override;
  absl::Status Scan(const KeepFn& keep) override;
  absl::Status Visit(const VisitFn& visit) const override;
  absl::Status Probe() override;

 private:
  rocksdb::Status TryOpen();
  absl::Status Repair(absl::string_view why);
  absl::Status ScanFrom(Slot& next, const KeepFn& keep);

  const std::string path_;
  const rocksdb::Options options_ = SmallOptions();
  std::unique_ptr<rocksdb::DB> db_;
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

absl::Status RocksRecords::OpenOrRepair() {
  const rocksdb::Status status = TryOpen();
  // The latter ones where a damaged name or number passes for a good one.
  const bool damaged = status.IsCorruption() || status.IsPathNotFound() ||
                       status.IsInvalidArgument() || status.IsNotSupported();
  if (damaged) return Repair(status.ToString());
  return FromRocks("opening it", status);
}

absl::Status RocksRecords::OpenReadOnly() {
  rocksdb::Options options = options_;
  options.create_if_missing = false;
  options.info_log = std::make_shared<NoLog>();
  rocksdb::DB* db = nullptr;
  const rocksdb::Status status = rocksdb::DB::OpenForReadOnly(options, path_, &db);
  db_.reset(db);
  return FromRocks("opening it to read", status);
}

absl::StatusOr<NvmeRecord> RocksRecords::Get(Slot slot) const {
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

absl::Status RocksRecords::Apply(std::span<const Change> changes, bool sync) {
  const auto now_s = static_cast<uint64_t>(absl::ToUnixSeconds(absl::Now()));
  rocksdb::WriteBatch batch;
  for (const Change& change : changes) {
    const auto key = EncodeNvmeKey(change.slot);
    rocksdb::Status status;
    if (change.record) {
      NvmeRecord record = *change.record;
      record.block.written_at_s = now_s;
      status = batch.Put(SliceOf(key), SliceOf(EncodeNvmeRecord(change.slot, record)));
    } else {
      status = batch.Delete(SliceOf(key));
    }
    if (!status.ok()) return FromRocks("batch", status);
  }
  rocksdb::WriteOptions options;
  options.sync = sync;
  return FromRocks("writing a group", db_->Write(options, &batch));
}

// Goes on from `next`, which moves past each record that was told of.
absl::Status RocksRecords::ScanFrom(Slot& next, const KeepFn& keep) {
  rocksdb::ReadOptions options;
  options.fill_cache = false;
  const std::unique_ptr<rocksdb::Iterator> it(db_->NewIterator(options));
  rocksdb::WriteBatch deletes;
  const auto first = EncodeNvmeKey(next);
  for (it->Seek(SliceOf(first)); it->Valid(); it->Next()) {
    const absl::string_view key(it->key().data(), it->key().size());
    const auto slot = DecodeNvmeKey(key);
    const auto record =
        slot ? DecodeNvmeRecord(*slot, {it->value().data(), it->value().size()}) : std::nullopt;
    if (slot) next = Slot(slot->number() + 1);
    if (!record || !keep(*slot, *record)) {
      if (auto status = deletes.Delete(it->key()); !status.ok()) return FromRocks("scan", status);
    }
    if (static_cast<size_t>(deletes.Count()) < kScanDeletesMax) continue;
    if (auto s = db_->Write({}, &deletes); !s.ok()) return FromRocks("scan", s);
    deletes.Clear();
  }
  if (!it->status().ok()) return FromRocks("scan", it->status());
  return FromRocks("scan", db_->Write({}, &deletes));
}

absl::Status RocksRecords::Scan(const KeepFn& keep) {
  Slot next(1);
  absl::Status status = ScanFrom(next, keep);
  if (!absl::IsDataLoss(status)) return status;
  status = Repair(status.ToString());
  return status.ok() ? ScanFrom(next, keep) : status;
}

absl::Status RocksRecords::Visit(const VisitFn& visit) const {
  rocksdb::ReadOptions options;
  options.fill_cache = false;
  const std::unique_ptr<rocksdb::Iterator> it(db_->NewIterator(options));
  for (it->SeekToFirst(); it->Valid(); it->Next()) {
    if (it->key() == kProbeKey) continue;  // a crash can leave it behind
    const auto slot = DecodeNvmeKey({it->key().data(), it->key().size()});
    visit(slot.value_or(Slot()),
          slot ? DecodeNvmeRecord(*slot, {it->value().data(), it->value().size()}) : std::nullopt);
  }
  return FromRocks("reading all records", it->status());
}

absl::Status RocksRecords::Probe() {
  // Ends the state in which RocksDB refuses writes after a failed one.
  if (auto status = db_->Resume(); !status.ok()) return FromRocks("resuming", status);
  rocksdb::WriteOptions options;
  options.sync = true;
  if (auto s = db_->Put(options, kProbeKey, "1"); !s.ok()) return FromRocks("probe", s);
  return FromRocks("probe", db_->Delete(options, kProbeKey));
}

}  // namespace

absl::StatusOr<std::unique_ptr<NvmeRecords>> NvmeRecords::Open(const std::string& path) {
  auto records = std::make_unique<RocksRecords>(path);
  if (absl::Status status = records->OpenOrRepair(); !status.ok()) return status;
  return records;
}

absl::StatusOr<std::unique_ptr<NvmeRecords>> NvmeRecords::OpenReadOnly(const std::string& path) {
  auto records = std::make_unique<RocksRecords>(path);
  if (absl::Status status = records->OpenReadOnly(); !status.ok()) return status;
  return records;
}

}  // namespace larder
