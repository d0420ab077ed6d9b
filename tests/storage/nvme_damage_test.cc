// Damaged bytes on the drive: payloads, records, whole index files.

#include <rocksdb/db.h>

#include <bit>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>

#include "gtest/gtest.h"
#include "storage/nvme_format.h"
#include "storage/nvme_records.h"
#include "storage/nvme_store.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using namespace ::larder::testing;  // NOLINT: a test's own helpers

void FlipBit(const std::string& path, uint64_t offset, int bit) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(static_cast<std::streamoff>(offset));
  const char byte = static_cast<char>(file.get() ^ (1 << bit));
  file.seekp(static_cast<std::streamoff>(offset));
  file.put(byte);
  ASSERT_TRUE(file.good()) << path;
}

size_t CountRecords(NvmeStore& store) {
  size_t count = 0;
  EXPECT_TRUE(store.Scan([&](Slot, uint32_t, const BlockRecord&) { return ++count, true; }).ok());
  return count;
}

NvmeRecord Sample() { return {RecordOf(7), 8192, 8192, 0x0123456789abcdef}; }

TEST(NvmeFormat, RoundTrip) {
  const auto value = EncodeNvmeRecord(Slot(5), Sample());
  const auto record = DecodeNvmeRecord(Slot(5), {value.data(), value.size()});
  ASSERT_TRUE(record.has_value());
  EXPECT_EQ(record->block.key, Sample().block.key);
  EXPECT_EQ(record->block.parent_key, Sample().block.parent_key);
  EXPECT_EQ(record->block.model_id, Sample().block.model_id);
  EXPECT_EQ(record->block.depth, Sample().block.depth);
  EXPECT_EQ(record->block_bytes, 8192u);
  EXPECT_EQ(record->payload_bytes, 8192u);
  EXPECT_EQ(record->payload_hash, Sample().payload_hash);
  const auto key = EncodeNvmeKey(Slot(0x01020304));
  EXPECT_EQ(absl::string_view(key.data(), 4), absl::string_view("\1\2\3\4", 4));
  EXPECT_EQ(DecodeNvmeKey({key.data(), 4}), Slot(0x01020304));
  EXPECT_EQ(DecodeNvmeKey("probe"), std::nullopt);
  EXPECT_EQ(DecodeNvmeKey(absl::string_view("\0\0\0\0", 4)), std::nullopt);
}

TEST(NvmeFormat, AnyFlippedBitAnyOtherSlotAnyOtherLengthIsRefused) {
  const auto good = EncodeNvmeRecord(Slot(5), Sample());
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {
    auto bad = good;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << bit % 8));
    EXPECT_FALSE(DecodeNvmeRecord(Slot(5), {bad.data(), bad.size()}).has_value()) << bit;
  }
  EXPECT_FALSE(DecodeNvmeRecord(Slot(6), {good.data(), good.size()}).has_value());
  EXPECT_FALSE(DecodeNvmeRecord(Slot(5), {good.data(), good.size() - 1}).has_value());
  EXPECT_FALSE(DecodeNvmeRecord(Slot(5), "").has_value());
}

TEST(NvmeDamage, FlippedPayloadBitIsALossOnce) {
  TempDir folder;
  auto store = OpenStore(StoreOptions(folder.path(), 1 << 20));
  for (uint64_t at : {uint64_t{0}, uint64_t{4999}, uint64_t{9999}}) {
    ASSERT_TRUE(WriteBlock(*store, Slot(3), 10000, 1).ok());
    store.reset();
    FlipBit(folder.path() + "/slots", Slot(3).offset() + at, 3);
    store = OpenStore(StoreOptions(folder.path(), 1 << 20));
    EXPECT_TRUE(absl::IsDataLoss(ReadBlock(*store, Slot(3), 10000, 1)));
    EXPECT_EQ(CountRecords(*store), 0u) << "the record must be gone when done is called";
  }
}

// Writes a raw record, as a drive with a flipped bit or another version of the program would.
void PutRaw(const std::string& folder, Slot slot, const std::string& value) {
  rocksdb::DB* raw = nullptr;
  ASSERT_TRUE(rocksdb::DB::Open({}, folder + "/index", &raw).ok());
  const std::unique_ptr<rocksdb::DB> db(raw);
  const auto key = EncodeNvmeKey(slot);
  ASSERT_TRUE(db->Put({}, {key.data(), key.size()}, value).ok());
}

TEST(NvmeDamage, FlippedRecordBitIsALossOnce) {
  TempDir folder;
  { ASSERT_TRUE(WriteBlock(*OpenStore(StoreOptions(folder.path())), Slot(3), 8192, 1).ok()); }
  BlockMemory block(8192);
  Fill(block.span(), 1);
  const auto good = EncodeNvmeRecord(Slot(3), {RecordOf(1), 8192, 8192, PayloadHash(block.span())});
  for (size_t byte : {0, 5, 9, 17, 25, 40, 70, 100}) {
    std::string bad(good.data(), good.size());
    bad[byte] = static_cast<char>(bad[byte] ^ 0x10);
    PutRaw(folder.path(), Slot(3), bad);
    auto store = OpenStore(StoreOptions(folder.path()));
    EXPECT_TRUE(absl::IsDataLoss(ReadBlock(*store, Slot(3), 8192, 1))) << byte;
    EXPECT_EQ(CountRecords(*store), 0u);
  }
  PutRaw(folder.path(), Slot(3), std::string(good.data(), good.size()));
  EXPECT_TRUE(ReadBlock(*OpenStore(StoreOptions(folder.path())), Slot(3), 8192, 1).ok());
}

TEST(NvmeDamage, ScanDropsRecordsOfUnknownVersion) {
  TempDir folder;
  { ASSERT_TRUE(WriteBlock(*OpenStore(StoreOptions(folder.path())), Slot(3), 8192, 1).ok()); }
  const auto good = EncodeNvmeRecord(Slot(3), Sample());
  std::string newer(good.data(), good.size());
  newer[0] = 2;
  PutRaw(folder.path(), Slot(20), newer);
  PutRaw(folder.path(), Slot(21), "something else");
  {
    auto store = OpenStore(StoreOptions(folder.path()));
    EXPECT_EQ(CountRecords(*store), 1u);
  }
  auto records = NvmeRecords::Open(folder.path() + "/index");
  ASSERT_TRUE(records.ok());
  EXPECT_TRUE(absl::IsNotFound((*records)->Get(Slot(20)).status()));
  EXPECT_TRUE(absl::IsNotFound((*records)->Get(Slot(21)).status()));
  EXPECT_TRUE((*records)->Get(Slot(3)).ok());
}

// Blocks `from` to `to` - 1, in few groups.
void WriteMany(const std::string& folder, uint32_t from, uint32_t to) {
  auto store = OpenStore(StoreOptions(folder, 4 << 20));
  std::vector<BlockMemory> blocks;
  std::vector<Waiter> waiters(to - from);
  for (uint32_t i = from; i < to; ++i) {
    blocks.emplace_back(4096);
    Fill(blocks.back().span(), i);
    store->Write(Slot(1 + i), blocks.back().span(), RecordOf(i), waiters[i - from].done());
  }
  for (Waiter& waiter : waiters) ASSERT_TRUE(waiter.Wait().ok());
}

// Whatever part of the index is hit: it opens, every read is right or a miss, writes work.
TEST(NvmeDamage, DamagedIndexFilesCostBlocksNotTheTier) {
  for (const std::string kind : {".sst", ".log", "MANIFEST", "CURRENT", "OPTIONS"}) {
    for (double where : {0.1, 0.5, 0.95}) {
      SCOPED_TRACE(kind + " at " + std::to_string(where));
      TempDir folder;
      WriteMany(folder.path(), 0, 60);
      WriteMany(folder.path(), 60, 90);  // opening makes a table of the first log
      int hit = 0;
      for (const auto& entry : std::filesystem::directory_iterator(folder.path() + "/index")) {
        const std::string name = entry.path().filename();
        if (name.find(kind) == std::string::npos || entry.file_size() == 0) continue;
        FlipBit(entry.path(), static_cast<uint64_t>(static_cast<double>(entry.file_size()) * where),
                2);
        ++hit;
      }
      EXPECT_GT(hit, 0);
      auto store = OpenStore(StoreOptions(folder.path(), 4 << 20));
      const size_t kept = CountRecords(*store);
      EXPECT_TRUE(kind != "OPTIONS" || kept == 90);
      size_t read = 0;
      for (uint32_t i = 0; i < 90; ++i) {
        const absl::Status status = ReadBlock(*store, Slot(1 + i), 4096, i);
        EXPECT_TRUE(status.ok() || absl::IsDataLoss(status)) << status;
        read += status.ok();
      }
      EXPECT_LE(read, kept);
      EXPECT_TRUE(WriteBlock(*store, Slot(200), 4096, 1000).ok());
      EXPECT_TRUE(ReadBlock(*store, Slot(200), 4096, 1000).ok());
    }
  }
}

std::string LogOf(const std::string& folder) {
  for (const auto& entry : std::filesystem::directory_iterator(folder + "/index")) {
    if (entry.path().extension() == ".log" && entry.file_size() > 0) return entry.path();
  }
  return "";
}

// One bit makes an entry of the log one of a recycled log's. In one of RocksDB's modes of recovery
// such a log is read for ever.
TEST(NvmeDamage, ALogEntryThatLooksRecycledEndsTheLog) {
  TempDir folder;
  WriteMany(folder.path(), 0, 20);
  constexpr uint64_t kTypeAt = 6;  // after checksum and length
  FlipBit(LogOf(folder.path()), kTypeAt, 2);
  auto store = OpenStore(StoreOptions(folder.path(), 4 << 20));
  EXPECT_EQ(CountRecords(*store), 0u);
  EXPECT_TRUE(WriteBlock(*store, Slot(1), 4096, 1000).ok());
  EXPECT_TRUE(ReadBlock(*store, Slot(1), 4096, 1000).ok());
}

// Any bits of any file: a counted miss, or a refusal that names FORMAT; never a wrong byte.
TEST(NvmeDamage, FlippedBitsAnywhereAreMissesOrAClearRefusal) {
  constexpr uint32_t kBlocks = 40;
  // Told at once, since RocksDB may end the process over what it reads.
  const char* const given = std::getenv("LARDER_DAMAGE_SEED");
  const uint32_t seed =
      given != nullptr ? std::strtoul(given, nullptr, 10) : std::random_device()();
  std::fprintf(stderr, "LARDER_DAMAGE_SEED=%u\n", seed);
  std::mt19937 random(seed);
  TempDir whole(MemoryFolder());
  WriteMany(whole.path(), 0, kBlocks / 2);
  WriteMany(whole.path(), kBlocks / 2, kBlocks);
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(whole.path())) {
    if (!entry.is_regular_file() || entry.file_size() == 0) continue;
    files.push_back(std::filesystem::relative(entry.path(), whole.path()));
  }
  int misses = 0;
  for (int round = 0; round < 60; ++round) {
    TempDir folder(MemoryFolder());
    std::filesystem::copy(whole.path(), folder.path(),
                          std::filesystem::copy_options::recursive);
    const std::string file = files[random() % files.size()];
    SCOPED_TRACE("in " + file);
    const std::string path = folder.path() + "/" + file;
    // Blocks begin the slot file, the rest of it is empty.
    const uint64_t end = file == "slots" ? kBlocks * 4096 : std::filesystem::file_size(path);
    for (int flips = 1 + static_cast<int>(random() % 3); flips > 0; --flips) {
      const uint64_t at = random() % end;
      const int bit = static_cast<int>(random() % 8);
      std::fprintf(stderr, "round %d: bit %d of byte %" PRIu64 " of %s (%" PRIu64 " bytes)\n",
                   round, bit, at, file.c_str(), end);
      FlipBit(path, at, bit);
    }
    auto opened = NvmeStore::Open(StoreOptions(folder.path(), 4 << 20));
    if (!opened.ok()) {
      EXPECT_EQ(file, "FORMAT");
      EXPECT_TRUE(absl::IsFailedPrecondition(opened.status())) << opened.status();
      continue;
    }
    NvmeStore& store = **opened;
    CountRecords(store);
    uint64_t lost = 0;
    for (uint32_t i = 0; i < kBlocks; ++i) {
      const absl::Status status = ReadBlock(store, Slot(1 + i), 4096, i);
      EXPECT_TRUE(status.ok() || absl::IsDataLoss(status)) << status;
      lost += !status.ok();
    }
    EXPECT_EQ(store.stats().corrupt, lost);
    misses += lost > 0;
    EXPECT_TRUE(WriteBlock(store, Slot(200), 4096, 1000).ok());
    EXPECT_TRUE(ReadBlock(store, Slot(200), 4096, 1000).ok());
  }
  EXPECT_GT(misses, 0);
}

}  // namespace
}  // namespace larder
