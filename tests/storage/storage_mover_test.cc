// StorageMover: bytes, classes, limits, and one completion for every job.

#include "storage/storage_mover.h"

#include <map>
#include <random>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "storage/copy.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using namespace ::larder::testing;  // NOLINT: a test's own helpers

constexpr uint64_t kTierBytes = 4 << 20;

// Completions, in order.
class DoneLog {
 public:
  Mover::DoneFn Listener() {
    return [this](MoveId id, absl::Status status) {
      if (on_done_) on_done_(id);
      absl::MutexLock lock(&mu_);
      order_.push_back(id);
      ++counts_[id];
      statuses_[id] = status;
      changed_.SignalAll();
    };
  }
  absl::Status Wait(MoveId id) {
    absl::MutexLock lock(&mu_);
    while (counts_[id] == 0) changed_.Wait(&mu_);
    return statuses_[id];
  }
  std::vector<MoveId> order() {
    absl::MutexLock lock(&mu_);
    return order_;
  }
  int Count(MoveId id) {
    absl::MutexLock lock(&mu_);
    return counts_[id];
  }
  void OnDone(std::function<void(MoveId)> f) { on_done_ = std::move(f); }  // before use

 private:
  std::function<void(MoveId)> on_done_;
  absl::Mutex mu_;
  absl::CondVar changed_;
  std::vector<MoveId> order_ ABSL_GUARDED_BY(mu_);
  std::map<MoveId, int> counts_ ABSL_GUARDED_BY(mu_);
  std::map<MoveId, absl::Status> statuses_ ABSL_GUARDED_BY(mu_);
};

class StorageMoverTest : public ::testing::Test {
 protected:
  StorageMoverTest() {
    gpu_ = MakeArena("gpu");
    host_ = MakeArena("host");
    auto options = StoreOptions(folder_.path(), kTierBytes);
    options.wrap_io = WrapWith(&faults_);
    options.io_threads = 1;
    nvme_ = OpenStore(options);
    options_.gpus = {gpu_.get()};
    options_.host = host_.get();
    options_.nvme = nvme_.get();
  }
  static std::unique_ptr<Arena> MakeArena(const std::string& name) {
    auto arena = Arena::Create({name, kTierBytes, false, 0});
    LARDER_CHECK(arena.ok(), "arena");
    return *std::move(arena);
  }
  void Start() { mover_ = std::make_unique<StorageMover>(options_, done_.Listener()); }
  static MoveJob Job(MoveId id, Tier from, uint32_t from_slot, Tier to, uint32_t to_slot,
                     MoveClass move_class = MoveClass::kBackground, uint32_t bytes = 10000) {
    return {id, {from, Slot(from_slot)}, {to, Slot(to_slot)}, bytes, 1, move_class, RecordOf(7)};
  }
  std::span<std::byte> Bytes(Arena& arena, uint32_t slot, uint64_t bytes = 10000) {
    return {arena.At(Slot(slot)), bytes};
  }

  TempDir folder_;
  Faults faults_;
  DoneLog done_;
  std::unique_ptr<Arena> gpu_, host_;
  std::unique_ptr<NvmeStore> nvme_;
  StorageMover::Options options_;
  std::unique_ptr<StorageMover> mover_;  // last: destroyed before what it uses
};

TEST_F(StorageMoverTest, CarriesABlockThroughAllTiersAndBack) {
  Start();
  Fill(Bytes(*gpu_, 1), 42);
  ASSERT_TRUE(mover_->Submit(Job(1, Tier::kGpu, 1, Tier::kHost, 5)).ok());
  ASSERT_TRUE(done_.Wait(1).ok());
  EXPECT_TRUE(IsFilled(Bytes(*host_, 5), 42));
  ASSERT_TRUE(mover_->Submit(Job(2, Tier::kHost, 5, Tier::kNvme, 9)).ok());
  ASSERT_TRUE(done_.Wait(2).ok());
  ASSERT_TRUE(mover_->Submit(Job(3, Tier::kNvme, 9, Tier::kHost, 20)).ok());
  ASSERT_TRUE(done_.Wait(3).ok());
  ASSERT_TRUE(mover_->Submit(Job(4, Tier::kHost, 20, Tier::kGpu, 30)).ok());
  ASSERT_TRUE(done_.Wait(4).ok());
  EXPECT_TRUE(IsFilled(Bytes(*gpu_, 30), 42));
  // Another block's record is a loss, and an erased one too.
  MoveJob other = Job(5, Tier::kNvme, 9, Tier::kHost, 20);
  other.record = RecordOf(8);
  ASSERT_TRUE(mover_->Submit(other).ok());
  EXPECT_TRUE(absl::IsDataLoss(done_.Wait(5)));
  ASSERT_TRUE(mover_->Submit(Job(6, Tier::kHost, 5, Tier::kNvme, 9)).ok());
  ASSERT_TRUE(done_.Wait(6).ok());
  mover_->Erase(Slot(9), RecordOf(7).key.Tag());
  ASSERT_TRUE(mover_->Submit(Job(7, Tier::kHost, 5, Tier::kNvme, 40)).ok());
  ASSERT_TRUE(done_.Wait(7).ok());
  ASSERT_TRUE(mover_->Submit(Job(8, Tier::kNvme, 9, Tier::kHost, 20)).ok());
  EXPECT_TRUE(absl::IsDataLoss(done_.Wait(8)));
}

// Four ranks: the parts lie apart in GPU and together in HOST and on NVME; a block of fewer
// shards leaves the other ranks alone.
TEST_F(StorageMoverTest, CarriesThePartsOfEachRank) {
  std::vector<std::unique_ptr<Arena>> more;
  for (const char* name : {"gpu-1", "gpu-2", "gpu-3"}) {
    options_.gpus.push_back(more.emplace_back(MakeArena(name)).get());
  }
  constexpr uint32_t kPart = 5000;  // no whole page
  Start();
  for (const uint32_t shards : {4u, 2u}) {
    for (uint32_t rank = 0; rank < 4; ++rank) {
      Fill(Bytes(*options_.gpus[rank], 1, kPart), shards * 10 + rank);
      Fill(Bytes(*options_.gpus[rank], 30, kPart), 99);
    }
    // The tier's last slot of HOST has room for one part only.
    MoveJob job = Job(1, Tier::kGpu, 1, Tier::kHost, 1023, MoveClass::kWaiting, shards * kPart);
    job.shards = shards;
    EXPECT_TRUE(absl::IsInvalidArgument(mover_->Submit(job)));
    const std::pair<SlotRef, SlotRef> hops[] = {{{Tier::kGpu, Slot(1)}, {Tier::kHost, Slot(5)}},
                                                {{Tier::kHost, Slot(5)}, {Tier::kNvme, Slot(9)}},
                                                {{Tier::kNvme, Slot(9)}, {Tier::kHost, Slot(20)}},
                                                {{Tier::kHost, Slot(20)}, {Tier::kGpu, Slot(30)}}};
    for (int i = 0; i < 4; ++i) {
      job.id = shards * 10 + static_cast<MoveId>(i);
      std::tie(job.from, job.to) = hops[i];
      ASSERT_TRUE(mover_->Submit(job).ok());
      ASSERT_TRUE(done_.Wait(job.id).ok());
    }
    for (uint32_t rank = 0; rank < 4; ++rank) {
      const bool moved = rank < shards;
      if (moved) {
        EXPECT_TRUE(IsFilled({host_->At(Slot(5)) + rank * kPart, kPart}, shards * 10 + rank));
      }
      EXPECT_TRUE(IsFilled(Bytes(*options_.gpus[rank], 30, kPart), moved ? shards * 10 + rank : 99))
          << rank << " of " << shards;
    }
  }
}

TEST_F(StorageMoverTest, RefusesWhatMakesNoSense) {
  Start();
  const auto code = [&](const MoveJob& job) { return mover_->Submit(job).code(); };
  using absl::StatusCode;
  EXPECT_EQ(code(Job(1, Tier::kNvme, 1, Tier::kGpu, 1)), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Job(1, Tier::kGpu, 1, Tier::kNvme, 1)), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Job(1, Tier::kHost, 1, Tier::kHost, 2)), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Job(1, Tier::kHost, 0, Tier::kGpu, 2)), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Job(1, Tier::kHost, 1023, Tier::kGpu, 2)), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Job(1, Tier::kHost, 1, Tier::kNvme, 1025)), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Job(1, Tier::kHost, 1, Tier::kGpu, 2, MoveClass::kWaiting, 0)),
            StatusCode::kInvalidArgument);
  MoveJob parts = Job(1, Tier::kHost, 1, Tier::kGpu, 2);
  for (uint32_t shards : {0, 3, 2}) {  // 10,000 bytes; one GPU
    parts.shards = shards;
    const absl::Status status = mover_->Submit(parts);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), absl::StrCat(shards, " "))) << status;
  }
  options_.gpus.clear();
  options_.nvme = nullptr;
  Start();
  EXPECT_EQ(code(Job(1, Tier::kHost, 1, Tier::kGpu, 1)), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(Job(1, Tier::kHost, 1, Tier::kNvme, 1)), StatusCode::kInvalidArgument);
  mover_->Erase(Slot(1), RecordOf(1).key.Tag());
  mover_.reset();
  EXPECT_TRUE(done_.order().empty());
}

TEST_F(StorageMoverTest, WaitingBeforeBackgroundOldestFirstAndRaised) {
  absl::Notification started, queued;
  done_.OnDone([&](MoveId id) {
    if (id != 1) return;
    started.Notify();
    queued.WaitForNotification();
  });
  Start();
  ASSERT_TRUE(mover_->Submit(Job(1, Tier::kGpu, 1, Tier::kHost, 1)).ok());
  started.WaitForNotification();
  ASSERT_TRUE(mover_->Submit(Job(2, Tier::kGpu, 5, Tier::kHost, 5)).ok());
  ASSERT_TRUE(mover_->Submit(Job(3, Tier::kHost, 9, Tier::kGpu, 9)).ok());
  ASSERT_TRUE(mover_->Submit(Job(4, Tier::kGpu, 13, Tier::kHost, 13)).ok());
  ASSERT_TRUE(mover_->Submit(Job(5, Tier::kHost, 17, Tier::kGpu, 17, MoveClass::kWaiting)).ok());
  ASSERT_TRUE(mover_->Submit(Job(6, Tier::kGpu, 21, Tier::kHost, 21, MoveClass::kWaiting)).ok());
  mover_->Raise(4);
  mover_->Raise(5);    // waits already
  mover_->Raise(999);  // nobody
  EXPECT_TRUE(absl::IsAlreadyExists(mover_->Submit(Job(4, Tier::kGpu, 1, Tier::kHost, 1))));
  queued.Notify();
  EXPECT_TRUE(mover_->Drain(absl::InfiniteFuture()));
  EXPECT_EQ(done_.order(), (std::vector<MoveId>{1, 5, 6, 4, 2, 3}));
}

TEST_F(StorageMoverTest, WaitingBeforeBackgroundOnNvme) {
  options_.nvme_write_bytes_max = 1;  // one at a time
  faults_.sync_gate.Close();
  Start();
  for (MoveId id : {1, 2, 3}) {
    ASSERT_TRUE(
        mover_->Submit(Job(id, Tier::kHost, 1, Tier::kNvme, static_cast<uint32_t>(4 * id))).ok());
  }
  ASSERT_TRUE(mover_->Submit(Job(4, Tier::kHost, 1, Tier::kNvme, 20, MoveClass::kWaiting)).ok());
  mover_->Raise(3);
  EXPECT_FALSE(mover_->Drain(absl::Now() + absl::Milliseconds(5)));
  faults_.sync_gate.Open();
  EXPECT_TRUE(mover_->Drain(absl::InfiniteFuture()));
  EXPECT_EQ(done_.order(), (std::vector<MoveId>{1, 4, 3, 2}));
}

TEST_F(StorageMoverTest, QueuesAreBoundedPerPairAndClass) {
  options_.queue_max = 2;
  absl::Notification started, queued;
  done_.OnDone([&](MoveId id) {
    if (id != 1) return;
    started.Notify();
    queued.WaitForNotification();
  });
  Start();
  ASSERT_TRUE(mover_->Submit(Job(1, Tier::kGpu, 1, Tier::kHost, 1)).ok());
  started.WaitForNotification();  // it has left the queue
  for (MoveId id : {2, 3}) {
    ASSERT_TRUE(mover_->Submit(Job(id, Tier::kGpu, 1, Tier::kHost, 1)).ok());
  }
  const absl::Status status = mover_->Submit(Job(4, Tier::kGpu, 1, Tier::kHost, 1));
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "GPU -> HOST"));
  EXPECT_TRUE(mover_->Submit(Job(100, Tier::kGpu, 1, Tier::kHost, 1, MoveClass::kWaiting)).ok());
  EXPECT_TRUE(mover_->Submit(Job(101, Tier::kHost, 1, Tier::kGpu, 1)).ok());
  queued.Notify();
  EXPECT_TRUE(mover_->Drain(absl::InfiniteFuture()));
  EXPECT_EQ(done_.Count(4), 0);
}

TEST_F(StorageMoverTest, DegradedNvmeRefusesWritesAtOnce) {
  Start();
  ASSERT_TRUE(mover_->Submit(Job(1, Tier::kHost, 1, Tier::kNvme, 1)).ok());
  ASSERT_TRUE(done_.Wait(1).ok());
  faults_.write_errno = ENOSPC;
  ASSERT_TRUE(mover_->Submit(Job(2, Tier::kHost, 1, Tier::kNvme, 5)).ok());
  EXPECT_TRUE(absl::IsUnavailable(done_.Wait(2)));
  EXPECT_TRUE(absl::IsUnavailable(mover_->Submit(Job(3, Tier::kHost, 1, Tier::kNvme, 5))));
  ASSERT_TRUE(mover_->Submit(Job(4, Tier::kNvme, 1, Tier::kHost, 9)).ok());
  EXPECT_TRUE(done_.Wait(4).ok());
  EXPECT_EQ(done_.Count(3), 0);
}

TEST_F(StorageMoverTest, DestructorCancelsWhatHasNotStarted) {
  options_.nvme_write_bytes_max = 1;
  faults_.sync_gate.Close();
  absl::Notification cancelled;
  done_.OnDone([&](MoveId id) {
    if (id == 3) cancelled.Notify();
  });
  Start();
  for (MoveId id : {1, 2, 3}) {
    ASSERT_TRUE(
        mover_->Submit(Job(id, Tier::kHost, 1, Tier::kNvme, static_cast<uint32_t>(4 * id))).ok());
  }
  std::thread opener([&] {
    cancelled.WaitForNotification();
    faults_.sync_gate.Open();
  });
  mover_.reset();
  opener.join();
  EXPECT_TRUE(done_.Wait(1).ok());
  EXPECT_TRUE(absl::IsCancelled(done_.Wait(2)));
  EXPECT_TRUE(absl::IsCancelled(done_.Wait(3)));
}

// Many threads, all pairs, raises and failures; the mover dies with work queued.
TEST_F(StorageMoverTest, EveryAcceptedJobCompletesExactlyOnce) {
  options_.copy_threads = 2;
  Start();
  std::vector<std::thread> askers;
  absl::Mutex mu;
  std::vector<MoveId> accepted, refused;
  for (uint64_t t = 0; t < 4; ++t) {
    askers.emplace_back([&, t] {
      std::mt19937 random(static_cast<uint32_t>(t));
      for (MoveId n = 0; n < 200; ++n) {
        const MoveId id = t << 32 | n;
        // A slot is one job's at a time: every asker has its own, waits for each of its first
        // jobs, and gives the others, which nobody waits for, one of their own each.
        const bool waits = n < 150;
        const auto slot = [&] {
          return static_cast<uint32_t>(1 + t * 256 + 4 * (waits ? random() % 60 : n - 150));
        };
        const std::pair<Tier, Tier> ways[] = {{Tier::kGpu, Tier::kHost},
                                              {Tier::kHost, Tier::kGpu},
                                              {Tier::kHost, Tier::kNvme},
                                              {Tier::kNvme, Tier::kHost},
                                              {Tier::kGpu, Tier::kNvme}};
        const auto [from, to] = ways[random() % 5];
        const bool ok = mover_
                            ->Submit(Job(id, from, slot(), to, slot(),
                                         static_cast<MoveClass>(random() % 2), 9000))
                            .ok();
        if (random() % 3 == 0) mover_->Raise(t << 32 | random() % 200);
        if (ok && waits) (void)done_.Wait(id);
        absl::MutexLock lock(&mu);
        (ok ? accepted : refused).push_back(id);
      }
    });
  }
  for (std::thread& asker : askers) asker.join();
  mover_.reset();
  for (MoveId id : accepted) EXPECT_EQ(done_.Count(id), 1) << id;
  for (MoveId id : refused) EXPECT_EQ(done_.Count(id), 0) << id;
  EXPECT_EQ(done_.order().size(), accepted.size());
}

TEST(CopyBlock, AllLengthsAndAlignments) {
  for (uint64_t bytes : {0, 1, 63, 64, 4096, 131071, 131072, 131073, 200000, 2 << 20}) {
    for (uint64_t misalign : {0, 1, 16}) {
      BlockMemory from(bytes + 1, misalign), to(bytes + 1);
      Fill(from.span(), bytes);
      CopyBlock(to.span().data(), from.span().data(), bytes);
      EXPECT_EQ(std::memcmp(to.span().data(), from.span().data(), bytes), 0);
      EXPECT_EQ(to.span()[bytes], std::byte{0xee});
    }
  }
}

}  // namespace
}  // namespace larder
