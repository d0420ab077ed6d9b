#include "client/worker/restore.h"

#include <vector>

#include "gtest/gtest.h"
#include "tests/worker/test_daemon.h"

namespace larder::worker {
namespace {

// One second a token, whatever its position: nothing here waits so long.
PrefillRate SlowToCompute() {
  return PrefillRate(
      {.tokens = 10, .at_start = absl::Seconds(10), .far_begin = 100, .far = absl::Seconds(10)});
}

v1::PrefetchEvent Event(uint32_t ready, uint32_t promised) {
  v1::PrefetchEvent event;
  event.set_ready_blocks(ready);
  event.set_promised_blocks(promised);
  return event;
}

class RestoreTest : public testing::Test {
 protected:
  // Two blocks in HOST, three on NVMe.
  Lease Run(const PrefillRate& rate, double patience = 0.1) {
    Lease lease = daemon_.LookUp(2, 3);
    daemon_.AnswerState(2, 0);
    absl::Notification told;
    Restore restore(std::move(lease), v1::TIER_HOST, 5 * kBlockTokens, rate, patience,
                    [&] { told.Notify(); });
    told.WaitForNotification();
    EXPECT_TRUE(restore.done());
    return restore.Take();
  }

  TestDaemon daemon_;
};

TEST_F(RestoreTest, BringsBlocksUp) {
  v1::PrefetchEvent all = Event(5, 5);
  *all.add_runs() = FakeDaemon::HostRun(2, {8 * kBlockBytes, 9 * kBlockBytes, 10 * kBlockBytes});
  all.set_done(true);
  daemon_.fake().AnswerPrefetch({all});
  const Lease lease = Run(SlowToCompute());
  EXPECT_EQ(lease.end(), 5u);
  EXPECT_EQ(FirstUnreadable(lease, v1::TIER_HOST), 5u);
  EXPECT_EQ(daemon_.fake().Calls("Truncate"), 0);
}

// What is in HOST is read in place by a CPU, and has to be brought up for a GPU.
TEST_F(RestoreTest, HostIsBelowAGpu) {
  Lease lease = daemon_.LookUp(2, 3);
  EXPECT_EQ(FirstUnreadable(lease, v1::TIER_HOST), 2u);
  EXPECT_EQ(FirstUnreadable(lease, v1::TIER_GPU), 0u);
  v1::PrefetchEvent some = Event(2, 2);
  *some.add_runs() = FakeDaemon::GpuRun(0, {8 * kBlockBytes, 9 * kBlockBytes});
  some.set_done(true);
  daemon_.fake().AnswerPrefetch({some});
  daemon_.AnswerState(2, 0);
  Restore restore(std::move(lease), v1::TIER_GPU, 5 * kBlockTokens, SlowToCompute(), 0.1, [] {});
  lease = restore.Take();
  EXPECT_EQ(lease.end(), 2u);
  EXPECT_EQ(FirstUnreadable(lease, v1::TIER_GPU), 2u);
}

TEST_F(RestoreTest, AsksAgainWhileMoreArrives) {
  v1::PrefetchEvent some = Event(3, 5);
  *some.add_runs() = FakeDaemon::HostRun(2, {8 * kBlockBytes});
  some.set_done(true);  // the call's time was over
  daemon_.fake().AnswerPrefetch({some});
  daemon_.AnswerState(3, 0);
  // The answer is the same each time, so it ends when patience does: 0.1 * 20 tokens' time.
  const PrefillRate rate({.tokens = 10,
                          .at_start = absl::Milliseconds(100),
                          .far_begin = 100,
                          .far = absl::Milliseconds(100)});
  Lease lease = daemon_.LookUp(2, 3);
  Restore restore(std::move(lease), v1::TIER_HOST, 5 * kBlockTokens, rate, 0.1, [] {});
  lease = restore.Take();
  EXPECT_EQ(lease.end(), 3u);
  EXPECT_GT(daemon_.fake().Calls("Prefetch"), 1);
  EXPECT_EQ(daemon_.fake().LastPosition(), 3u);
}

TEST_F(RestoreTest, AnUnreadableBlockEndsIt) {
  v1::PrefetchEvent bad = Event(2, 5);
  bad.set_unreadable(true);
  bad.set_unreadable_position(2);
  daemon_.fake().AnswerPrefetch({bad});
  const Lease lease = Run(SlowToCompute());
  EXPECT_EQ(lease.end(), 2u);
  EXPECT_EQ(daemon_.fake().Calls("Prefetch"), 1);
}

TEST_F(RestoreTest, NoRoomEndsIt) {
  v1::PrefetchEvent none = Event(2, 2);
  none.set_done(true);
  daemon_.fake().AnswerPrefetch({none});
  const Lease lease = Run(SlowToCompute());
  EXPECT_EQ(lease.end(), 2u);
  EXPECT_EQ(daemon_.fake().Calls("Prefetch"), 1);
}

TEST_F(RestoreTest, WhatIsComputedAtOnceIsNotWaitedFor) {
  const Lease lease = Run(PrefillRate());
  EXPECT_EQ(lease.end(), 2u);
  EXPECT_EQ(daemon_.fake().Calls("Prefetch"), 0);
}

TEST_F(RestoreTest, ALostDaemonEndsIt) {
  Lease lease = daemon_.LookUp(2, 3);
  daemon_.Kill();
  Restore restore(std::move(lease), v1::TIER_HOST, 5 * kBlockTokens, SlowToCompute(), 0.1, [] {});
  lease = restore.Take();
  // Not truncated: nobody answered. Its NVMe part stays unreadable.
  EXPECT_EQ(FirstUnreadable(lease, v1::TIER_HOST), 2u);
}

}  // namespace
}  // namespace larder::worker
