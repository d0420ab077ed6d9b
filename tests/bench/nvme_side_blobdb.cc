#include <rocksdb/db.h>
#include <rocksdb/options.h>
#include <rocksdb/write_batch.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "in_threads.h"
#include "nvme_side.h"

namespace larder::bench {
namespace {

constexpr int kReaders = 16;  // of 8, 16 and 32 the fastest
constexpr uint64_t kBatchBytes = 16 << 20;  // as a group of the store's

absl::Status FromRocks(const rocksdb::Status& status) {
  if (status.ok()) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("BlobDB: ", status.ToString()));
}

class BlobSide final : public NvmeSide {
 public:
  explicit BlobSide(const Blocks& blocks) : blocks_(blocks) {}

  absl::Status Open(const std::string& path) {
    rocksdb::Options options;
    options.create_if_missing = true;
    options.enable_blob_files = true;
    options.blob_file_size = 256 << 20;
    options.enable_blob_garbage_collection = true;
    options.write_buffer_size = 64 << 20;
    options.max_write_buffer_number = 4;
    options.compression = rocksdb::kNoCompression;
    options.use_direct_reads = true;
    options.use_direct_io_for_flush_and_compaction = true;
    rocksdb::DB* db = nullptr;
    const rocksdb::Status status = rocksdb::DB::Open(options, path, &db);
    db_.reset(db);
    return FromRocks(status);
  }

  absl::Status Write(std::span<const uint32_t> blocks) override {
    rocksdb::WriteOptions no_log;
    no_log.disableWAL = true;
    rocksdb::WriteBatch batch;
    for (const uint32_t block : blocks) {
      const std::span<const std::byte> bytes = blocks_.From(block);
      rocksdb::Status status =
          batch.Put(Key(block), {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
      if (status.ok() && batch.GetDataSize() >= kBatchBytes) {
        status = db_->Write(no_log, &batch);
        batch.Clear();
      }
      if (!status.ok()) return FromRocks(status);
    }
    absl::Status status = FromRocks(db_->Write(no_log, &batch));
    if (status.ok()) status = FromRocks(db_->Flush({}));
    return status;
  }

  absl::Status Read(std::span<const uint32_t> blocks) override {
    return InThreads(kReaders, blocks, [&](uint32_t block) {
      const std::span<std::byte> to = blocks_.To(block);
      rocksdb::PinnableSlice value;
      const rocksdb::Status status = db_->Get({}, db_->DefaultColumnFamily(), Key(block), &value);
      if (!status.ok()) return FromRocks(status);
      if (value.size() != to.size()) return absl::DataLossError("BlobDB: another length");
      std::memcpy(to.data(), value.data(), to.size());
      return absl::OkStatus();
    });
  }

 private:
  static std::string Key(uint32_t block) {
    const uint32_t big_endian = __builtin_bswap32(block);
    return {reinterpret_cast<const char*>(&big_endian), sizeof(big_endian)};
  }

  const Blocks& blocks_;
  std::unique_ptr<rocksdb::DB> db_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<NvmeSide>> MakeBlobSide(const std::string& path,
                                                       const Blocks& blocks) {
  auto side = std::make_unique<BlobSide>(blocks);
  if (absl::Status status = side->Open(path); !status.ok()) return status;
  return side;
}

}  // namespace larder::bench
