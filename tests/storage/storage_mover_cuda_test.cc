// StorageMover over CUDA arenas on the fake driver: bytes, batches, and a device that is lost.

#include <atomic>
#include <map>
#include <random>

#include "absl/strings/match.h"
#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"
#include "storage/arena_cuda.h"
#include "storage/copier_cuda.h"
#include "storage/storage_mover.h"
#include "tests/storage/cuda_testing.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using namespace ::larder::testing;  // NOLINT: a test's own helpers

constexpr uint64_t kTierBytes = 16 << 20;
constexpr uint32_t kBlockBytes = 192 << 10;
constexpr uint32_t kSlots = kBlockBytes / kSlotGranule;

class StorageMoverCudaTest : public ::testing::Test {
 protected:
  StorageMoverCudaTest() {
    FakeCudaReset();
    FakeCudaSet("devices=2");
    host_ = *Arena::Create({"host", kTierBytes, false, 0});
    for (const char* which : {"0", "1"}) {
      devices_.push_back(OpenDevice(which));
      gpus_.push_back(*CudaArena::Create(devices_.back(), kTierBytes, 0));
    }
    registration_ = std::make_unique<CudaRegistration>(devices_[0], *host_);
    Start({});
  }
  // In the place of what runs.
  void Start(CudaCopier::Options options) {
    mover_.reset();
    options.devices = devices_;
    options.on_lost = [this](const absl::Status& why) {
      EXPECT_TRUE(absl::IsUnavailable(why));
      ++lost_;
    };
    copier_ = *CudaCopier::Start(std::move(options));
    StorageMover::Options moves;
    moves.gpus = {gpus_[0].get(), gpus_[1].get()};
    moves.host = host_.get();
    moves.copier = copier_.get();
    mover_ = std::make_unique<StorageMover>(moves, [this](MoveId id, absl::Status status) {
      absl::MutexLock lock(&mu_);
      order_.push_back(id);
      EXPECT_TRUE(done_.emplace(id, std::move(status)).second) << "done twice";
      changed_.SignalAll();
    });
  }
  ~StorageMoverCudaTest() override {
    mover_.reset();
    copier_.reset();
    registration_.reset();
    gpus_.clear();
    devices_.clear();
    const FakeCudaCounts counts = FakeCudaCount();
    if (!abandoned_) {
      EXPECT_EQ(counts.contexts + counts.allocations + counts.registrations + counts.streams +
                    counts.events,
                0);
    }
    FakeCudaReset();
  }
  absl::Status Wait(MoveId id) {
    absl::MutexLock lock(&mu_);
    while (!done_.contains(id)) changed_.Wait(&mu_);
    return done_[id];
  }
  static Slot At(uint32_t block) { return Slot(1 + block * kSlots); }
  static MoveJob Up(MoveId id, uint32_t from, uint32_t to,
                    MoveClass move_class = MoveClass::kWaiting) {
    return {.id = id,
            .from = {Tier::kHost, At(from)},
            .to = {Tier::kGpu, At(to)},
            .bytes = kBlockBytes,
            .move_class = move_class,
            .record = {}};
  }
  static MoveJob Down(MoveId id, uint32_t from, uint32_t to,
                      MoveClass move_class = MoveClass::kBackground) {
    return {.id = id,
            .from = {Tier::kGpu, At(from)},
            .to = {Tier::kHost, At(to)},
            .bytes = kBlockBytes,
            .move_class = move_class,
            .record = {}};
  }
  std::span<std::byte> Host(uint32_t block) { return {host_->At(At(block)), kBlockBytes}; }

  std::vector<std::shared_ptr<CudaDevice>> devices_;
  std::vector<std::unique_ptr<CudaArena>> gpus_;
  std::unique_ptr<Arena> host_;
  std::unique_ptr<CudaRegistration> registration_;
  std::atomic<int> lost_ = 0;
  bool abandoned_ = false;
  absl::Mutex mu_;
  absl::CondVar changed_;
  std::vector<MoveId> order_ ABSL_GUARDED_BY(mu_);
  std::map<MoveId, absl::Status> done_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<CudaCopier> copier_;
  std::unique_ptr<StorageMover> mover_;
};

TEST_F(StorageMoverCudaTest, BlocksGoDownAndUpAgain) {
  constexpr uint32_t kBlocks = 20;
  FakeCudaSet("hold=1");
  for (uint32_t i = 0; i < kBlocks; ++i) {
    Fill(Host(i), i);
    ASSERT_TRUE(mover_->Submit(Up(i, i, i)).ok());
  }
  FakeCudaSet("hold=0");
  for (uint32_t i = 0; i < kBlocks; ++i) ASSERT_TRUE(Wait(i).ok());
  // Those that were taken one by one, then all others, which are neighbours, at once.
  EXPECT_LE(FakeCudaCount().copies, copier_->limits().batches_each_way + 1);
  for (uint32_t i = 0; i < kBlocks; ++i) {
    ASSERT_TRUE(mover_->Submit(Down(100 + i, i, kBlocks + (kBlocks - 1 - i))).ok());
  }
  for (uint32_t i = 0; i < kBlocks; ++i) {
    ASSERT_TRUE(Wait(100 + i).ok());
    EXPECT_TRUE(IsFilled(Host(kBlocks + (kBlocks - 1 - i)), i)) << i;
  }
  EXPECT_EQ(FakeCudaCount().pageable_copies, 0);
}

TEST_F(StorageMoverCudaTest, PartsGoToTheRanks) {
  Fill(Host(3), 5);
  MoveJob up = Up(1, 3, 7);
  up.shards = 2;
  ASSERT_TRUE(mover_->Submit(up).ok());
  ASSERT_TRUE(Wait(1).ok());
  for (size_t rank = 0; rank < 2; ++rank) {
    const auto part =
        ReadDevice(devices_[rank], gpus_[rank]->pointer() + At(7).offset(), kBlockBytes / 2);
    EXPECT_EQ(std::memcmp(part.data(), Host(3).data() + rank * kBlockBytes / 2, part.size()), 0);
  }
  MoveJob down = Down(2, 7, 9);
  down.shards = 2;
  ASSERT_TRUE(mover_->Submit(down).ok());
  ASSERT_TRUE(Wait(2).ok());
  EXPECT_TRUE(IsFilled(Host(9), 5));
}

// What somebody waits for comes before all background jobs but those with the copier.
TEST_F(StorageMoverCudaTest, AWaitingJobIsBehindFewOthers) {
  FakeCudaSet("hold=1");
  constexpr MoveId kJobs = 80;
  for (MoveId i = 0; i < kJobs; ++i) {
    ASSERT_TRUE(mover_->Submit(Up(i, i, (i * 7) % 80, MoveClass::kBackground)).ok());
  }
  ASSERT_TRUE(mover_->Submit(Up(1000, 81, 81, MoveClass::kWaiting)).ok());
  FakeCudaSet("hold=0");
  ASSERT_TRUE(Wait(1000).ok());
  for (MoveId i = 0; i < kJobs; ++i) ASSERT_TRUE(Wait(i).ok());
  absl::MutexLock lock(&mu_);
  const auto at = std::find(order_.begin(), order_.end(), 1000) - order_.begin();
  const Copier::Limits limits = copier_->limits();
  // The first batches had one job each: when they were taken, nothing else was queued.
  EXPECT_LE(at, limits.batches_each_way * static_cast<int>(limits.batch_bytes / kBlockBytes + 1));
}

TEST_F(StorageMoverCudaTest, ALostDeviceFailsEverythingCleanly) {
  FakeCudaSet("hold=1");
  for (MoveId i = 0; i < 60; ++i) {
    ASSERT_TRUE(mover_->Submit(i % 2 == 0 ? Up(i, i, i) : Down(i, i, i)).ok());
  }
  FakeCudaSet("copy=719 hold=0");
  for (MoveId i = 0; i < 60; ++i) EXPECT_TRUE(absl::IsUnavailable(Wait(i))) << i;
  EXPECT_EQ(lost_, 1);
  const absl::Status refused = mover_->Submit(Up(100, 1, 1));
  EXPECT_TRUE(absl::IsUnavailable(refused));
  EXPECT_TRUE(absl::StrContains(refused.message(), "Fake 0")) << refused;
  EXPECT_EQ(copier_->health(), absl::UnavailableError(copier_->health().message()));
  abandoned_ = true;  // its context is broken: what it held cannot be given back
}

TEST_F(StorageMoverCudaTest, TheEndCancelsWhatHasNotStarted) {
  FakeCudaSet("hold=1");
  for (MoveId i = 0; i < 60; ++i) ASSERT_TRUE(mover_->Submit(Up(i, i, i)).ok());
  while (FakeCudaCount().asked == 0) std::this_thread::yield();  // the first has started
  std::thread end([this] { mover_.reset(); });
  EXPECT_TRUE(absl::IsCancelled(Wait(59)));
  FakeCudaSet("hold=0");
  end.join();
  EXPECT_TRUE(Wait(0).ok());
}

// A copy to host that is with a device that hangs has no end of its own.
TEST_F(StorageMoverCudaTest, AHangDoesNotHoldUpTheEnd) {
  CudaCopier::Options options;
  options.stall_limit = absl::Milliseconds(20);
  Start(std::move(options));
  FakeCudaSet("hold=1");
  ASSERT_TRUE(mover_->Submit(Down(1, 0, 0)).ok());
  ASSERT_TRUE(mover_->Submit(Up(2, 1, 1)).ok());
  EXPECT_TRUE(absl::IsUnavailable(Wait(2)));
  mover_.reset();
  EXPECT_TRUE(absl::IsUnavailable(Wait(1)));
  EXPECT_EQ(lost_, 1);
  abandoned_ = true;
}

TEST_F(StorageMoverCudaTest, HostMemoryThatIsNotRegisteredWorksToo) {
  registration_.reset();
  Fill(Host(0), 3);
  ASSERT_TRUE(mover_->Submit(Up(1, 0, 0)).ok());
  ASSERT_TRUE(Wait(1).ok());
  ASSERT_TRUE(mover_->Submit(Down(2, 0, 1)).ok());
  ASSERT_TRUE(Wait(2).ok());
  EXPECT_TRUE(IsFilled(Host(1), 3));
  EXPECT_GE(FakeCudaCount().pageable_copies, 2);
}

}  // namespace
}  // namespace larder
