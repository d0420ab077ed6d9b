// A million blocks: how soon a daemon has them again after a restart, and what they cost in memory.
//
// 2,000 prefixes of 512 blocks of 4 KiB. Recovery is all that larderd does for it at start: the
// directory is opened, its records are scanned, and the cache adopts their blocks.
#include <malloc.h>

#include <cstring>
#include <memory>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "bench.h"
#include "bench_nvme.h"
#include "child.h"
#include "server/cache/cache.h"
#include "server/cache/eviction_policy.h"
#include "storage/check.h"
#include "storage/nvme_index.h"
#include "storage/nvme_records.h"
#include "storage/nvme_store.h"

namespace larder::bench {
namespace {

constexpr uint32_t kRecords = 1'000'000;
constexpr uint32_t kPrefixBlocks = 512;
constexpr uint64_t kTierBytes = kRecords * kSlotGranule;
constexpr uint64_t kSlabBytes = uint64_t{64} << 20;
constexpr int kRuns = 3;

class WallClock final : public Clock {
 public:
  absl::Time Now() const override { return absl::Now(); }
};

// Recovery moves nothing.
class NoMover final : public Mover {
 public:
  absl::Status Submit(const MoveJob&) override { return absl::UnavailableError("no other tier"); }
  void Raise(MoveId) override {}
  void Erase(Slot, uint32_t) override {}
};

// Spread over all bits, as a SHA-256 is.
BlockKey KeyOf(uint32_t block) {
  BlockKey key;
  uint64_t x = block + 1;
  for (size_t at = 0; at < key.bytes.size(); at += sizeof(x)) {
    x = (x ^ x >> 31) * 0x9e3779b97f4a7c15;
    std::memcpy(key.bytes.data() + at, &x, sizeof(x));
  }
  return key;
}

NvmeRecord RecordOf(uint32_t block) {
  NvmeRecord record;
  record.block.key = KeyOf(block);
  record.block.depth = block % kPrefixBlocks;
  if (record.block.depth > 0) record.block.parent_key = KeyOf(block - 1);
  record.block.model_id = 1;
  record.block_bytes = kSlotGranule;
  record.payload_bytes = kSlotGranule;
  return record;
}

absl::Status WriteRecords(const std::string& path) {
  auto records = NvmeRecords::Open(path);
  if (!records.ok()) return records.status();
  std::vector<NvmeRecords::Change> group;
  for (uint32_t block = 0; block < kRecords; ++block) {
    group.push_back({Slot(block + 1), RecordOf(block)});
    if (group.size() < 10'000) continue;
    if (absl::Status status = (*records)->Apply(group, /*sync=*/false); !status.ok()) return status;
    group.clear();
  }
  return (*records)->Apply(group, /*sync=*/true);
}

absl::Status Recover(const NvmeStore::Options& options) {
  const WallClock clock;
  NoMover mover;
  Cache::Options cache_options;
  cache_options.tiers[Index(Tier::kHost)] = {.bytes = kSlabBytes, .slab_bytes = kSlabBytes};
  cache_options.tiers[Index(Tier::kNvme)] = {.bytes = kTierBytes, .slab_bytes = kSlabBytes};
  Cache cache(cache_options, clock, mover, MakeLruPolicy());
  auto store = NvmeStore::Open(options);
  if (!store.ok()) return store.status();
  uint64_t kept = 0;
  absl::Status status = (*store)->Scan([&](Slot slot, uint32_t bytes, const BlockRecord& record) {
    return kept += 1, cache.RecoverBlock(slot, bytes, record);
  });
  LARDER_CHECK(cache.RecoverDone() == 0 && kept == kRecords);
  return status;
}

void MeasureMemory() {
  const auto allocated = [] {
    const struct mallinfo2 info = ::mallinfo2();
    return static_cast<double>(info.uordblks + info.hblkhd);
  };
  const double before = allocated();
  SlotAllocator slots(kTierBytes, kSlabBytes);
  const SlotAllocator::Pool pool = slots.AddPool(kSlotGranule);
  NvmeIndex index(slots);
  Slot parent;
  for (uint32_t block = 0; block < kRecords; ++block) {
    parent = index.Claim(pool, KeyOf(block), block % kPrefixBlocks == 0 ? Slot() : parent);
    index.Commit(parent);
    index.SetInMemory(parent, false);
  }
  const double bytes = (allocated() - before) / kRecords;
  Print({"nvme_bytes_per_slot",
         bytes,
         "bytes",
         absl::StrFormat("the record on the drive, %d bytes", kNvmeRecordBytes),
         bytes / kNvmeRecordBytes,
         {Goal::kAtMost, 32, ""}},
        {bytes});
}

}  // namespace

absl::Status MeasureIndex(const std::string& parent) {
  const TemporaryFolder folder(parent);
  NvmeStore::Options options;
  options.directory = folder.path() + "/store";
  options.bytes = kTierBytes;
  // Makes the directory.
  if (auto store = NvmeStore::Open(options); !store.ok()) return store.status();
  if (absl::Status status = WriteRecords(options.directory + "/index"); !status.ok()) return status;
  std::vector<double> runs, scans;
  for (int run = 0; run < kRuns; ++run) {
    absl::Status status;
    runs.push_back(Timed([&] { status = Recover(options); }));
    auto records = NvmeRecords::Open(options.directory + "/index");
    if (status.ok()) status = records.status();
    if (!status.ok()) return status;
    scans.push_back(
        Timed([&] { status = (*records)->Scan([](Slot, const NvmeRecord&) { return true; }); }));
    if (!status.ok()) return status;
  }
  Print({"nvme_recover_1m_s",
         Median(runs),
         "s",
         absl::StrFormat("RocksDB's iteration over the records: %.2f s", Median(scans)),
         Median(runs) / Median(scans),
         {Goal::kAtMost, 5, ""}},
        runs);
  MeasureMemory();
  return absl::OkStatus();
}

}  // namespace larder::bench
