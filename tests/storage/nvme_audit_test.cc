// What `larder nvme` stands on: everything that can be wrong in a directory is found, nothing
// else is, and looking changes nothing.

#include "storage/nvme_audit.h"

#include <filesystem>
#include <fstream>
#include <map>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "storage/nvme_records.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using namespace ::larder::testing;  // NOLINT: a test's own helpers

using Problem = NvmeAudit::Problem;
constexpr uint64_t kBytes = 1 << 20;

// A chain of blocks: each the child of the one before.
BlockRecord ChainRecord(uint64_t seed) {
  BlockRecord record = RecordOf(seed);
  record.parent_key = RecordOf(seed - 1).key;
  record.depth = static_cast<uint32_t>(seed - 1);
  record.model_id = 0xabc;
  return record;
}

class NvmeAuditTest : public ::testing::Test {
 protected:
  // `blocks` blocks of two pages each, in slots 1, 3, 5, ...
  void Store(uint32_t blocks) {
    auto store = OpenStore(StoreOptions(folder_.path(), kBytes));
    for (uint32_t i = 1; i <= blocks; ++i) {
      BlockMemory block(8192);
      Fill(block.span(), i);
      Waiter waiter;
      store->Write(Slot(2 * i - 1), block.span(), ChainRecord(i), waiter.done());
      ASSERT_TRUE(waiter.Wait().ok());
    }
  }
  void Put(Slot slot, const BlockRecord& block, uint32_t bytes) {
    auto records = NvmeRecords::Open(folder_.path() + "/index");
    ASSERT_TRUE(records.ok());
    const NvmeRecords::Change change{slot, NvmeRecord{block, bytes, bytes, PayloadHash({})}};
    ASSERT_TRUE((*records)->Apply({&change, 1}, true).ok());
  }
  void Flip(uint64_t offset) {
    std::fstream file(folder_.path() + "/slots", std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(static_cast<std::streamoff>(offset));
    const char byte = static_cast<char>(file.get() ^ 1);
    file.seekp(static_cast<std::streamoff>(offset));
    file.put(byte);
  }
  // Problems by slot.
  std::multimap<uint32_t, Problem> Check(int threads = 2) {
    auto audit = NvmeAudit::Open(folder_.path());
    EXPECT_TRUE(audit.ok()) << audit.status();
    auto findings = (*audit)->Check(threads, [](uint64_t done, uint64_t total) {
      EXPECT_LE(done, total);
    });
    EXPECT_TRUE(findings.ok()) << findings.status();
    std::multimap<uint32_t, Problem> found;
    for (const auto& finding : *findings) found.emplace(finding.slot.number(), finding.problem);
    return found;
  }

  TempDir folder_;
};

using Found = std::multimap<uint32_t, Problem>;

TEST_F(NvmeAuditTest, NothingWrongIsNothingFoundAndNothingTouched) {
  Store(20);
  const auto stamp = [this] {
    std::map<std::string, std::filesystem::file_time_type> times;
    for (const auto& e : std::filesystem::recursive_directory_iterator(folder_.path())) {
      if (e.path().filename() != "LOCK") times[e.path()] = e.last_write_time();
    }
    return times;
  };
  const auto before = stamp();
  EXPECT_EQ(Check(1), Found());
  EXPECT_EQ(Check(4), Found());
  uint32_t blocks = 0;
  const auto audit = NvmeAudit::Open(folder_.path());
  ASSERT_TRUE(audit.ok());
  ASSERT_TRUE((*audit)
                  ->ForEach([&](Slot slot, const NvmeRecord& record) {
                    EXPECT_EQ(slot, Slot(2 * blocks + 1));
                    EXPECT_EQ(record.block.depth, blocks);
                    EXPECT_NEAR(record.block.written_at_s, absl::ToUnixSeconds(absl::Now()), 600);
                    ++blocks;
                  })
                  .ok());
  EXPECT_EQ(blocks, 20u);
  EXPECT_EQ(stamp(), before);
}

TEST_F(NvmeAuditTest, FlippedPayloadBitIsAWrongChecksum) {
  Store(8);
  Flip(Slot(7).offset() + 8191);
  EXPECT_EQ(Check(), (Found{{7, Problem::kChecksum}}));
}

TEST_F(NvmeAuditTest, MissingAncestorOrphansAllBelow) {
  Store(6);
  auto audit = NvmeAudit::Open(folder_.path());
  ASSERT_TRUE(audit.ok());
  const Slot third(5);
  ASSERT_TRUE((*audit)->Erase({&third, 1}).ok());
  audit->reset();
  EXPECT_EQ(Check(), (Found{{7, Problem::kOrphan}, {9, Problem::kOrphan}, {11, Problem::kOrphan}}));
}

TEST_F(NvmeAuditTest, OverlapsDuplicatesAndPlacesOutsideAreFound) {
  Store(4);
  Put(Slot(4), ChainRecord(5), 4096);                     // the second page of slot 3
  Put(Slot(100), ChainRecord(2), 4096);                   // slot 3's block once more
  Put(Slot(kBytes / 4096), ChainRecord(6), 8192);         // over the end
  const Found found = Check();
  EXPECT_EQ(found.count(4), 2u) << "it overlaps, and its payload is another's";
  EXPECT_EQ(found.find(4)->second, Problem::kOverlap);
  EXPECT_EQ(found.find(100)->second, Problem::kDuplicate);
  EXPECT_EQ(found.find(256)->second, Problem::kOutside);
  EXPECT_EQ(found.count(3), 0u);
}

TEST_F(NvmeAuditTest, ShortFileIsSaidAndNotRead) {
  Store(4);
  std::filesystem::resize_file(folder_.path() + "/slots", Slot(5).offset() + 4096);
  EXPECT_EQ(Check(), (Found{{5, Problem::kOutside}, {7, Problem::kOutside}}));
}

TEST_F(NvmeAuditTest, WhatEraseTakesOutIsGoneForTheStoreToo) {
  Store(3);
  Flip(Slot(5).offset());
  {
    auto audit = NvmeAudit::Open(folder_.path());
    ASSERT_TRUE(audit.ok());
    const Slot bad(5);
    ASSERT_TRUE((*audit)->Erase({&bad, 1}).ok());
  }
  EXPECT_EQ(Check(), Found());
  auto store = OpenStore(StoreOptions(folder_.path(), kBytes));
  uint32_t count = 0;
  ASSERT_TRUE(store->Scan([&](Slot, uint32_t, const BlockRecord&) { return ++count, true; }).ok());
  EXPECT_EQ(count, 2u);
}

TEST_F(NvmeAuditTest, ARunningStoreKeepsItOut) {
  Store(1);
  auto store = OpenStore(StoreOptions(folder_.path(), kBytes));
  const auto audit = NvmeAudit::Open(folder_.path());
  EXPECT_TRUE(absl::IsFailedPrecondition(audit.status())) << audit.status();
}

}  // namespace
}  // namespace larder
