// NvmeStore on a healthy device: round trips, restarts, guards, slot reuse, erasing.

#include "storage/nvme_store.h"

#include <fstream>
#include <map>
#include <optional>
#include <random>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "storage/nvme_format.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using namespace ::larder::testing;  // NOLINT: a test's own helpers

std::map<uint32_t, uint32_t> ScanAll(NvmeStore& store) {
  std::map<uint32_t, uint32_t> found;  // slot -> bytes
  EXPECT_TRUE(store
                  .Scan([&](Slot slot, uint32_t bytes, const BlockRecord&) {
                    found[slot.number()] = bytes;
                    return true;
                  })
                  .ok());
  return found;
}

TEST(NvmeStore, RoundTripAtOddSizes) {
  TempDir folder;
  auto store = OpenStore(StoreOptions(folder.path()));
  uint64_t seed = 1;
  for (uint64_t bytes : {1, 4095, 4096, 4097, 196608, 1124352, 2 << 20}) {
    for (uint64_t misalign : {0, 8}) {
      const Slot slot = Slot::AtOffset(4096 * (seed % 100));
      ASSERT_TRUE(WriteBlock(*store, slot, bytes, seed, misalign).ok());
      EXPECT_TRUE(ReadBlock(*store, slot, bytes, seed, misalign).ok());
      ++seed;
    }
  }
  const auto stats = store->stats();
  EXPECT_EQ(stats.writes, 14u);
  EXPECT_EQ(stats.reads, 14u);
  EXPECT_EQ(stats.written_bytes, stats.read_bytes);
  EXPECT_EQ(stats.corrupt, 0u);
}

TEST(NvmeStore, KeepsRecordsOverARestart) {
  TempDir folder;
  {
    auto store = OpenStore(StoreOptions(folder.path()));
    for (uint32_t i = 0; i < 50; ++i) {
      ASSERT_TRUE(WriteBlock(*store, Slot(1 + 2 * i), 5000, i).ok());
    }
  }
  auto store = OpenStore(StoreOptions(folder.path()));
  uint32_t next = 0;
  ASSERT_TRUE(store
                  ->Scan([&](Slot slot, uint32_t bytes, const BlockRecord& record) {
                    EXPECT_EQ(slot, Slot(1 + 2 * next));  // in slot order
                    EXPECT_EQ(bytes, 5000u);
                    const BlockRecord right = RecordOf(next);
                    EXPECT_EQ(record.key, right.key);
                    EXPECT_EQ(record.parent_key, right.parent_key);
                    EXPECT_EQ(record.model_id, right.model_id);
                    EXPECT_EQ(record.depth, right.depth);
                    ++next;
                    return next % 2 == 0;
                  })
                  .ok());
  EXPECT_EQ(next, 50u);
  EXPECT_EQ(ScanAll(*store).size(), 25u);  // the others were rejected
  EXPECT_TRUE(ReadBlock(*store, Slot(3), 5000, 1).ok());
  EXPECT_TRUE(absl::IsDataLoss(ReadBlock(*store, Slot(1), 5000, 0)));
}

TEST(NvmeStore, ShrunkFileDropsWhatNoLongerFits) {
  TempDir folder;
  {
    auto store = OpenStore(StoreOptions(folder.path(), 8 << 20));
    ASSERT_TRUE(WriteBlock(*store, Slot(1), 4096, 1).ok());
    ASSERT_TRUE(WriteBlock(*store, Slot::AtOffset((8 << 20) - 8192), 8192, 2).ok());
    ASSERT_TRUE(WriteBlock(*store, Slot::AtOffset((4 << 20) - 4096), 8192, 3).ok());
  }
  {
    auto store = OpenStore(StoreOptions(folder.path(), 4 << 20));
    EXPECT_EQ(ScanAll(*store), (std::map<uint32_t, uint32_t>{{1, 4096}}));
  }
  auto store = OpenStore(StoreOptions(folder.path(), 16 << 20));
  EXPECT_EQ(ScanAll(*store), (std::map<uint32_t, uint32_t>{{1, 4096}}));
  EXPECT_TRUE(ReadBlock(*store, Slot(1), 4096, 1).ok());
  EXPECT_TRUE(WriteBlock(*store, Slot::AtOffset(12 << 20), 8192, 4).ok());
}

TEST(NvmeStore, ChecksEveryPartOfTheIdentity) {
  TempDir folder;
  auto store = OpenStore(StoreOptions(folder.path()));
  const auto read_as = [&](BlockRecord expected, uint64_t bytes) {
    EXPECT_TRUE(WriteBlock(*store, Slot(5), 8192, 1).ok());
    BlockMemory block(bytes);
    Waiter waiter;
    store->Read(Slot(5), block.span(), expected, waiter.done());
    return waiter.Wait();
  };
  const BlockRecord right = RecordOf(1);
  EXPECT_TRUE(read_as(right, 8192).ok());
  BlockRecord key = right, parent = right, model = right, depth = right;
  key.key.bytes[16] ^= 1;
  parent.parent_key.bytes[31] ^= 1;
  model.model_id ^= uint64_t{1} << 63;
  depth.depth += 1;
  for (const BlockRecord& wrong : {key, parent, model, depth}) {
    EXPECT_TRUE(absl::IsDataLoss(read_as(wrong, 8192)));
    EXPECT_TRUE(absl::IsDataLoss(ReadBlock(*store, Slot(5), 8192, 1))) << "the record must be gone";
  }
  EXPECT_TRUE(absl::IsDataLoss(read_as(right, 8191)));
  EXPECT_EQ(store->stats().corrupt, 9u);
}

TEST(NvmeStore, ChecksPlaces) {
  TempDir folder;
  auto store = OpenStore(StoreOptions(folder.path(), 1 << 20));
  EXPECT_TRUE(absl::IsInvalidArgument(WriteBlock(*store, Slot(), 4096, 1)));
  EXPECT_TRUE(absl::IsInvalidArgument(WriteBlock(*store, Slot(257), 4096, 1)));
  EXPECT_TRUE(absl::IsInvalidArgument(WriteBlock(*store, Slot(256), 4097, 1)));
  EXPECT_TRUE(WriteBlock(*store, Slot(256), 4096, 1).ok());
  EXPECT_TRUE(absl::IsInvalidArgument(ReadBlock(*store, Slot(257), 1, 1)));
}

TEST(NvmeStore, ReusedSlotForgetsTheOldBlock) {
  TempDir folder;
  auto store = OpenStore(StoreOptions(folder.path()));
  ASSERT_TRUE(WriteBlock(*store, Slot(9), 8192, 1).ok());
  ASSERT_TRUE(WriteBlock(*store, Slot(9), 4096, 2).ok());
  EXPECT_TRUE(ReadBlock(*store, Slot(9), 4096, 2).ok());
  EXPECT_TRUE(absl::IsDataLoss(ReadBlock(*store, Slot(9), 8192, 1)));
}

TEST(NvmeStore, EraseIsOfOneKeyAndInOrder) {
  TempDir folder;
  auto store = OpenStore(StoreOptions(folder.path()));
  ASSERT_TRUE(WriteBlock(*store, Slot(9), 4096, 1).ok());
  store->Erase(Slot(9), RecordOf(2).key.Tag());  // not that block: nothing
  ASSERT_TRUE(WriteBlock(*store, Slot(10), 4096, 3).ok());
  EXPECT_TRUE(ReadBlock(*store, Slot(9), 4096, 1).ok());
  store->Erase(Slot(9), RecordOf(1).key.Tag());  // before the next write
  store->Erase(Slot(9), RecordOf(2).key.Tag());
  ASSERT_TRUE(WriteBlock(*store, Slot(9), 4096, 2).ok());
  EXPECT_TRUE(ReadBlock(*store, Slot(9), 4096, 2).ok());
  store->Erase(Slot(9), RecordOf(1).key.Tag());  // late, of a block long gone
  store->Erase(Slot(10), RecordOf(3).key.Tag());
  store.reset();
  store = OpenStore(StoreOptions(folder.path()));
  EXPECT_EQ(ScanAll(*store), (std::map<uint32_t, uint32_t>{{9, 4096}}));
}

TEST(NvmeStore, DestructorCompletesWhatWasQueued) {
  TempDir folder;
  std::vector<BlockMemory> blocks;
  std::vector<Waiter> waiters(40);
  {
    auto options = StoreOptions(folder.path());
    options.sync_delay = absl::Hours(1);
    auto store = OpenStore(options);
    for (uint32_t i = 0; i < 40; ++i) {
      blocks.emplace_back(70000);
      Fill(blocks[i].span(), i);
      store->Write(Slot(1 + 18 * i), blocks[i].span(), RecordOf(i), waiters[i].done());
    }
  }
  for (Waiter& waiter : waiters) {
    ASSERT_TRUE(waiter.finished());
    EXPECT_TRUE(waiter.Wait().ok());
  }
  auto store = OpenStore(StoreOptions(folder.path()));
  for (uint32_t i = 0; i < 40; ++i) EXPECT_TRUE(ReadBlock(*store, Slot(1 + 18 * i), 70000, i).ok());
}

TEST(NvmeStore, GroupIsClosedByItsBytes) {
  TempDir folder;
  auto options = StoreOptions(folder.path());
  options.sync_delay = absl::Hours(1);
  options.sync_bytes = 64 << 10;
  auto store = OpenStore(options);
  std::vector<BlockMemory> blocks;
  std::vector<Waiter> waiters(4);
  for (uint32_t i = 0; i < 4; ++i) {
    blocks.emplace_back(16 << 10);
    store->Write(Slot(1 + 4 * i), blocks[i].span(), RecordOf(i), waiters[i].done());
  }
  for (Waiter& waiter : waiters) EXPECT_TRUE(waiter.Wait().ok());
  EXPECT_EQ(store->stats().syncs, 1u);
}

TEST(NvmeStore, SecondDaemonIsRefused) {
  TempDir folder;
  auto store = OpenStore(StoreOptions(folder.path()));
  auto second = NvmeStore::Open(StoreOptions(folder.path()));
  ASSERT_TRUE(absl::IsFailedPrecondition(second.status())) << second.status();
  EXPECT_TRUE(absl::StrContains(second.status().message(), absl::StrCat(::getpid())));
  EXPECT_TRUE(absl::StrContains(second.status().message(), folder.path()));
  store.reset();
  EXPECT_TRUE(NvmeStore::Open(StoreOptions(folder.path())).ok());
}

TEST(NvmeStore, UnknownFormatIsRefusedAndUntouched) {
  TempDir folder;
  { ASSERT_TRUE(WriteBlock(*OpenStore(StoreOptions(folder.path())), Slot(1), 4096, 1).ok()); }
  std::ofstream(folder.path() + "/FORMAT") << "larder nvme format 999\n";
  auto store = NvmeStore::Open(StoreOptions(folder.path()));
  ASSERT_TRUE(absl::IsFailedPrecondition(store.status())) << store.status();
  EXPECT_TRUE(absl::StrContains(store.status().message(), "999"));
  EXPECT_TRUE(absl::StrContains(store.status().message(), "empty the directory"));
  std::ofstream(folder.path() + "/FORMAT") << kNvmeFormatText;
  EXPECT_TRUE(ReadBlock(*OpenStore(StoreOptions(folder.path())), Slot(1), 4096, 1).ok());
}

TEST(NvmeStore, FolderOfSomebodyElseIsRefused) {
  TempDir folder;
  std::ofstream(folder.path() + "/slots") << "precious";
  auto store = NvmeStore::Open(StoreOptions(folder.path()));
  EXPECT_TRUE(absl::IsFailedPrecondition(store.status())) << store.status();
  EXPECT_EQ(std::filesystem::file_size(folder.path() + "/slots"), 8u);
}

TEST(NvmeStore, BadOptionsAreNamed) {
  TempDir folder;
  for (uint64_t bytes : {0, 4097}) {
    auto store = NvmeStore::Open(StoreOptions(folder.path(), bytes));
    EXPECT_TRUE(absl::IsInvalidArgument(store.status())) << store.status();
  }
  auto nowhere = NvmeStore::Open(StoreOptions(folder.path() + "/a/b"));
  EXPECT_TRUE(absl::IsUnavailable(nowhere.status())) << nowhere.status();
  auto huge = NvmeStore::Open(StoreOptions(folder.path(), uint64_t{1} << 43));
  ASSERT_TRUE(absl::IsResourceExhausted(huge.status())) << huge.status();
  EXPECT_TRUE(absl::StrContains(huge.status().message(), absl::StrCat((uint64_t{1} << 43) + 4096)));
  EXPECT_EQ(std::filesystem::file_size(folder.path() + "/slots"), 0u) << "nothing was allocated";
}

// Random operations against a map; slots of 16 KiB, restarts included.
class NvmeModel : public ::testing::TestWithParam<uint32_t> {};

TEST_P(NvmeModel, AgreesWithAMap) {
  SCOPED_TRACE(absl::StrCat("seed ", GetParam()));
  std::mt19937 random(GetParam());
  TempDir folder;
  auto store = OpenStore(StoreOptions(folder.path(), 1 << 20));
  struct Block {
    uint64_t seed, bytes;
  };
  std::map<uint32_t, Block> model;
  uint64_t next_seed = 1;
  for (int step = 0; step < 150; ++step) {
    const Slot slot(1 + 4 * (random() % 12));
    const auto it = model.find(slot.number());
    switch (random() % 8) {
      case 0:
      case 1:
      case 2: {
        const Block block{next_seed++, 1 + random() % 16384};
        ASSERT_TRUE(WriteBlock(*store, slot, block.bytes, block.seed, random() % 2).ok());
        model[slot.number()] = block;
        break;
      }
      case 3:
        store->Erase(slot, RecordOf(it == model.end() ? 0 : it->second.seed).key.Tag());
        model.erase(slot.number());
        break;
      case 4:
        store->Erase(slot, RecordOf(next_seed).key.Tag());
        break;
      case 5:
        if (random() % 4 != 0) break;
        store.reset();
        store = OpenStore(StoreOptions(folder.path(), 1 << 20));
        {
          std::map<uint32_t, uint32_t> right;
          for (const auto& [number, block] : model) right[number] = block.bytes;
          ASSERT_EQ(ScanAll(*store), right);
        }
        break;
      default:
        if (it == model.end()) break;
        ASSERT_TRUE(ReadBlock(*store, slot, it->second.bytes, it->second.seed).ok());
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Seeds, NvmeModel, ::testing::Range(1u, 5u));

// Overwritten and erased blocks count too; a scan, which drops what is no record, keeps it.
TEST(NvmeStore, RemembersOverRestartsHowMuchWasWritten) {
  TempDir folder;
  auto store = OpenStore(StoreOptions(folder.path(), 1 << 20));
  EXPECT_EQ(store->written().total_bytes(), 0u);
  ASSERT_TRUE(WriteBlock(*store, Slot(1), 8192, 1).ok());
  ASSERT_TRUE(WriteBlock(*store, Slot(1), 8192, 2).ok());
  ASSERT_TRUE(WriteBlock(*store, Slot(9), 5000, 3).ok());
  EXPECT_FALSE(WriteBlock(*store, Slot(9), 2 << 20, 4).ok());
  store->Erase(Slot(9), RecordOf(3).key.Tag());
  for (int restart = 0; restart < 3; ++restart) {
    store.reset();
    store = OpenStore(StoreOptions(folder.path(), 1 << 20));
    ASSERT_TRUE(store->Scan([](Slot, uint32_t, const BlockRecord&) { return true; }).ok());
    EXPECT_EQ(store->written().total_bytes(), 2 * 8192u + 5000u);
    // An hour may have ended meanwhile.
    EXPECT_EQ(store->written().bytes(0) + store->written().bytes(1), 2 * 8192u + 5000u);
  }
}

}  // namespace
}  // namespace larder
