// NvmeStore on a device that fails: acknowledgement order, degraded and back, torn writes.

#include <cerrno>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "storage/nvme_records.h"
#include "storage/nvme_store.h"
#include "tests/storage/nvme_testing.h"
#include "tests/storage/simulated_files.h"

namespace larder {
namespace {

using namespace ::larder::testing;  // NOLINT: a test's own helpers

// Changes of health, in order.
class HealthLog {
 public:
  std::function<void(bool)> Listener() {
    return [this](bool writable) {
      absl::MutexLock lock(&mu_);
      changes_.push_back(writable);
      changed_.SignalAll();
    };
  }
  void WaitForChanges(size_t count) {
    absl::MutexLock lock(&mu_);
    while (changes_.size() < count) changed_.Wait(&mu_);
  }
  std::vector<bool> changes() {
    absl::MutexLock lock(&mu_);
    return changes_;
  }

 private:
  absl::Mutex mu_;
  absl::CondVar changed_;
  std::vector<bool> changes_ ABSL_GUARDED_BY(mu_);
};

class NvmeFaults : public ::testing::Test {
 protected:
  void Open() {
    auto options = StoreOptions(folder_.path(), 4 << 20);
    options.wrap_io = WrapWith(&faults_);
    options.on_writable = health_.Listener();
    options.stall_limit = stall_limit_;
    store_ = OpenStore(options);
  }
  size_t RecordsAfterRestart() {
    store_.reset();
    auto store = OpenStore(StoreOptions(folder_.path(), 4 << 20));
    size_t count = 0;
    EXPECT_TRUE(
        store->Scan([&](Slot, uint32_t, const BlockRecord&) { return ++count, true; }).ok());
    return count;
  }

  TempDir folder_;
  absl::Duration stall_limit_ = absl::Hours(1);
  Faults faults_;
  HealthLog health_;
  std::unique_ptr<NvmeStore> store_;
};

TEST_F(NvmeFaults, DoneComesAfterPayloadAndSync) {
  Open();
  faults_.sync_gate.Close();
  BlockMemory block(8192);
  Fill(block.span(), 1);
  Waiter waiter;
  store_->Write(Slot(1), block.span(), RecordOf(1), waiter.done());
  while (faults_.syncs == 0) std::this_thread::yield();
  EXPECT_FALSE(waiter.finished());
  // No record yet either: the block cannot be read.
  EXPECT_TRUE(absl::IsDataLoss(ReadBlock(*store_, Slot(1), 8192, 1)));
  faults_.sync_gate.Open();
  EXPECT_TRUE(waiter.Wait().ok());
  EXPECT_TRUE(ReadBlock(*store_, Slot(1), 8192, 1).ok());
}

TEST_F(NvmeFaults, FailedSyncLeavesNoRecord) {
  Open();
  faults_.sync_errno = EIO;
  const absl::Status status = WriteBlock(*store_, Slot(1), 8192, 1);
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "errno 5")) << status;
  faults_.sync_errno = 0;
  EXPECT_EQ(RecordsAfterRestart(), 0u);
}

// The kernel reports a failed write-back once and calls the pages clean: the next sync succeeds
// without them.
TEST_F(NvmeFaults, AFailedSyncFailsEveryWriteThatBeganBeforeIt) {
  Open();
  faults_.sync_gate.Close();
  faults_.sync_errno = EIO;
  BlockMemory first(8192);
  BlockMemory second(8192);
  Waiter beside;
  absl::Notification failed;
  store_->Write(Slot(1), first.span(), RecordOf(1), [&](absl::Status status) {
    EXPECT_TRUE(absl::IsUnavailable(status)) << status;
    faults_.sync_errno = 0;
    failed.Notify();
  });
  while (faults_.syncs == 0) std::this_thread::yield();
  store_->Write(Slot(9), second.span(), RecordOf(2), beside.done());
  while (faults_.writes < 2) std::this_thread::yield();
  faults_.sync_gate.Open();
  failed.WaitForNotification();
  EXPECT_TRUE(absl::IsUnavailable(beside.Wait()));
  EXPECT_EQ(RecordsAfterRestart(), 0u);
}

class NvmeDegrades : public NvmeFaults,
                     public ::testing::WithParamInterface<std::pair<int, bool>> {};

TEST_P(NvmeDegrades, WritesStopReadsGoOnAndItRecovers) {
  const auto [error, in_sync] = GetParam();
  Open();
  ASSERT_TRUE(WriteBlock(*store_, Slot(1), 8192, 1).ok());
  (in_sync ? faults_.sync_errno : faults_.write_errno) = error;
  EXPECT_TRUE(absl::IsUnavailable(WriteBlock(*store_, Slot(9), 8192, 2)));
  health_.WaitForChanges(1);
  EXPECT_TRUE(store_->health().degraded);
  EXPECT_TRUE(absl::StrContains(store_->health().why, absl::StrCat("errno ", error)));
  const uint64_t errors = store_->stats().errors;
  EXPECT_GE(errors, 1u);

  const absl::Status stopped = WriteBlock(*store_, Slot(17), 8192, 3);
  EXPECT_TRUE(absl::IsUnavailable(stopped)) << stopped;
  EXPECT_TRUE(absl::StrContains(stopped.message(), "writes stopped")) << stopped;
  EXPECT_TRUE(ReadBlock(*store_, Slot(1), 8192, 1).ok());
  // A probe that fails changes nothing.
  while (store_->stats().errors == errors) std::this_thread::yield();
  EXPECT_EQ(health_.changes(), std::vector<bool>{false});

  faults_.sync_errno = 0;
  faults_.write_errno = 0;
  health_.WaitForChanges(2);
  EXPECT_FALSE(store_->health().degraded);
  EXPECT_TRUE(WriteBlock(*store_, Slot(9), 8192, 2).ok());
  EXPECT_TRUE(ReadBlock(*store_, Slot(9), 8192, 2).ok());
  EXPECT_EQ(health_.changes(), (std::vector<bool>{false, true}));
  EXPECT_EQ(RecordsAfterRestart(), 2u);
}
INSTANTIATE_TEST_SUITE_P(Errors, NvmeDegrades,
                         ::testing::Values(std::pair(ENOSPC, false), std::pair(EIO, false),
                                           std::pair(ENOSPC, true), std::pair(EIO, true),
                                           std::pair(EROFS, false), std::pair(EDQUOT, true)));

TEST_F(NvmeFaults, StalledWritesStopFurtherOnesAndReadsGoOn) {
  stall_limit_ = absl::Milliseconds(20);
  Open();
  ASSERT_TRUE(WriteBlock(*store_, Slot(1), 8192, 1).ok());
  for (Gate* gate : {&faults_.write_gate, &faults_.sync_gate}) {
    gate->Close();
    BlockMemory block(8192);
    Waiter stuck;
    store_->Write(Slot(9), block.span(), RecordOf(2), stuck.done());
    while (!store_->health().degraded) std::this_thread::yield();
    EXPECT_TRUE(absl::StrContains(store_->health().why, "1 writes under way"));
    EXPECT_TRUE(ReadBlock(*store_, Slot(1), 8192, 1).ok());
    if (gate == &faults_.write_gate) {
      EXPECT_TRUE(absl::IsUnavailable(WriteBlock(*store_, Slot(17), 8192, 3)));
      health_.WaitForChanges(1);
    }
    gate->Open();
    EXPECT_TRUE(stuck.Wait().ok());
    while (store_->health().degraded) std::this_thread::yield();
  }
  health_.WaitForChanges(2);
  EXPECT_TRUE(WriteBlock(*store_, Slot(17), 8192, 3).ok());
}

TEST_F(NvmeFaults, AHangingIndexStopsWritesAndReadsGoOn) {
  Gate gate;
  SimulatedFiles files(/*seed=*/1, [&gate](bool change) {
    if (change) gate.Pass();
    return 0;
  });
  auto options = StoreOptions(folder_.path(), 4 << 20);
  options.on_writable = health_.Listener();
  options.stall_limit = absl::Milliseconds(20);
  options.open_records = [&files] { return NvmeRecords::Open("/index", files.env()); };
  store_ = OpenStore(options);
  ASSERT_TRUE(WriteBlock(*store_, Slot(1), 8192, 1).ok());
  gate.Close();
  BlockMemory block(8192);
  Fill(block.span(), 2);
  Waiter stuck;
  store_->Write(Slot(9), block.span(), RecordOf(2), stuck.done());
  while (!store_->health().degraded) std::this_thread::yield();
  EXPECT_TRUE(ReadBlock(*store_, Slot(1), 8192, 1).ok());
  EXPECT_FALSE(stuck.finished());
  gate.Open();
  EXPECT_TRUE(stuck.Wait().ok());
  while (store_->health().degraded) std::this_thread::yield();
  EXPECT_TRUE(ReadBlock(*store_, Slot(9), 8192, 2).ok());
  store_.reset();
}

// A full disk right after a start, when RocksDB has nothing in its memtable, and an error that it
// calls final: neither ends the process, and the index comes back by itself.
TEST_F(NvmeFaults, AnIndexThatCouldNotWriteComesBackWithWhatItHad) {
  for (const int error : {ENOSPC, EIO}) {
    SCOPED_TRACE(error);
    std::atomic<int> fails_with = 0;
    SimulatedFiles files(/*seed=*/1, [&](bool change) { return change ? fails_with.load() : 0; });
    auto options = StoreOptions(folder_.path(), 4 << 20);
    options.open_records = [&files] { return NvmeRecords::Open("/index", files.env()); };
    store_ = OpenStore(options);
    ASSERT_TRUE(WriteBlock(*store_, Slot(1), 8192, 1).ok());
    store_.reset();
    store_ = OpenStore(options);
    fails_with = error;
    EXPECT_TRUE(absl::IsUnavailable(WriteBlock(*store_, Slot(9), 8192, 2)));
    const uint64_t errors = store_->stats().errors;
    while (store_->stats().errors < errors + 2) std::this_thread::yield();  // probes
    EXPECT_TRUE(ReadBlock(*store_, Slot(1), 8192, 1).ok());
    fails_with = 0;
    while (store_->health().degraded) std::this_thread::yield();
    EXPECT_TRUE(WriteBlock(*store_, Slot(9), 8192, 2).ok());
    store_.reset();
    store_ = OpenStore(options);
    EXPECT_TRUE(ReadBlock(*store_, Slot(1), 8192, 1).ok());
    EXPECT_TRUE(ReadBlock(*store_, Slot(9), 8192, 2).ok());
    store_.reset();
  }
}

// What waits for the hanging read is ended by its own deadline, in server/rpc.
TEST_F(NvmeFaults, AHangingReadHoldsUpNothingElse) {
  Open();
  ASSERT_TRUE(WriteBlock(*store_, Slot(1), 8192, 1).ok());
  ASSERT_TRUE(WriteBlock(*store_, Slot(9), 8192, 2).ok());
  faults_.read_gate.Close();
  BlockMemory block(8192);
  Waiter stuck;
  store_->Read(Slot(1), block.span(), RecordOf(1), stuck.done());
  EXPECT_TRUE(WriteBlock(*store_, Slot(17), 8192, 3).ok());
  EXPECT_FALSE(store_->health().degraded);
  EXPECT_FALSE(stuck.finished());
  faults_.read_gate.Open();
  EXPECT_TRUE(stuck.Wait().ok());
  EXPECT_TRUE(IsFilled(block.span(), 1));
}

TEST_F(NvmeFaults, ClosesWhileDegraded) {
  Open();
  faults_.write_errno = EIO;
  EXPECT_FALSE(WriteBlock(*store_, Slot(1), 8192, 1).ok());
  health_.WaitForChanges(1);
  store_.reset();
}

TEST_F(NvmeFaults, ReadErrorKeepsTheRecord) {
  Open();
  ASSERT_TRUE(WriteBlock(*store_, Slot(1), 8192, 1).ok());
  faults_.read_errno = EIO;
  const absl::Status status = ReadBlock(*store_, Slot(1), 8192, 1);
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "errno 5")) << status;
  faults_.read_errno = 0;
  EXPECT_TRUE(ReadBlock(*store_, Slot(1), 8192, 1).ok());
  EXPECT_FALSE(store_->health().degraded);
  EXPECT_EQ(store_->stats().errors, 1u);
}

TEST_F(NvmeFaults, TornWriteIsFoundByTheChecksum) {
  Open();
  ASSERT_TRUE(WriteBlock(*store_, Slot(1), 8192, 1).ok());
  faults_.lose_writes = true;
  ASSERT_TRUE(WriteBlock(*store_, Slot(1), 8192, 2).ok());
  faults_.lose_writes = false;
  EXPECT_TRUE(absl::IsDataLoss(ReadBlock(*store_, Slot(1), 8192, 2)));
  EXPECT_EQ(store_->stats().corrupt, 1u);
  EXPECT_EQ(RecordsAfterRestart(), 0u);
}

}  // namespace
}  // namespace larder
