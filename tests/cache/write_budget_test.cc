// The two promises of WriteBudget, on a clock moved by hand.

#include "server/cache/write_budget.h"

#include <gtest/gtest.h>

#include <deque>
#include <random>

#include "absl/strings/str_cat.h"

namespace larder {
namespace {

constexpr uint64_t kBlock = 1 << 20;
const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1000) + absl::Minutes(59);

// Writes as often as it may at this time.
uint64_t Burst(WriteBudget& budget, absl::Time now) {
  uint64_t bytes = 0;
  while (budget.Allows(kBlock, now) && bytes < 10'000 * kBlock) {
    budget.Take(kBlock, now);
    bytes += kBlock;
  }
  return bytes;
}

TEST(WriteBudget, WithoutLimitsEverythingGoes) {
  WriteBudget budget({});
  EXPECT_EQ(Burst(budget, kStart), 10'000 * kBlock);
}

TEST(WriteBudget, ASecondsWorthAtOnceThenTheRate) {
  WriteBudget budget({.bytes_per_second = 8 * kBlock});
  EXPECT_EQ(Burst(budget, kStart), 8 * kBlock);
  EXPECT_EQ(Burst(budget, kStart), 0u);
  EXPECT_EQ(Burst(budget, kStart + absl::Milliseconds(500)), 4 * kBlock);
  EXPECT_EQ(Burst(budget, kStart + absl::Hours(5)), 8 * kBlock) << "a long rest saves nothing up";
}

TEST(WriteBudget, ABlockLargerThanTheBucketGoesAndIsPaidForAfterwards) {
  WriteBudget budget({.bytes_per_second = kBlock / 4});
  EXPECT_EQ(Burst(budget, kStart), kBlock);
  EXPECT_EQ(Burst(budget, kStart + absl::Seconds(2)), 0u);
  EXPECT_EQ(Burst(budget, kStart + absl::Seconds(4)), kBlock);
}

TEST(WriteBudget, TheDaysWorthComesBackAfterADay) {
  WriteBudget budget({.bytes_per_day = 100 * kBlock});
  EXPECT_EQ(Burst(budget, kStart), 100 * kBlock);
  EXPECT_EQ(Burst(budget, kStart + absl::Hours(24)), 0u) << "the hour it began in still counts";
  EXPECT_EQ(Burst(budget, kStart + absl::Hours(25)), 100 * kBlock);
}

// What the drive's index remembers is by a wall clock, the budget's is another: hours of the two
// begin anywhere. A promise that a restart must not break, so never a byte too early.
TEST(WriteBudget, ARestartForgetsNothingOfTheDay) {
  const WriteBudget::Limits limits{.bytes_per_day = 100 * kBlock};
  for (int minutes = 0; minutes < 60; minutes += 7) {
    const absl::Time wall =
        absl::FromUnixSeconds(1'000'000 * int64_t{3600}) + absl::Minutes(minutes);
    for (int hours_ago = 0; hours_ago <= 26; ++hours_ago) {
      SCOPED_TRACE(absl::StrCat(minutes, " minutes, ", hours_ago, " hours ago"));
      NvmeWritten before;
      before.Advance(wall - absl::Hours(hours_ago));
      before.Add(60 * kBlock);
      before.Advance(wall);
      WriteBudget budget(limits);
      budget.Recover(before, kStart);
      const bool within_day = hours_ago <= 23;
      if (within_day) {
        EXPECT_EQ(Burst(budget, kStart), 40 * kBlock);
      } else if (hours_ago > 25) {
        EXPECT_EQ(Burst(budget, kStart), 100 * kBlock);
      }
      // Until a day after it was written, and no more than two hours longer.
      WriteBudget later(limits);
      later.Recover(before, kStart);
      const absl::Time day_after = kStart + absl::Hours(24 - hours_ago);
      if (within_day) {
        EXPECT_EQ(Burst(later, day_after - absl::Seconds(1)), 40 * kBlock);
      }
      if (day_after >= kStart) {
        WriteBudget rested(limits);
        rested.Recover(before, kStart);
        EXPECT_EQ(Burst(rested, day_after + absl::Hours(2)), 100 * kBlock);
      }
    }
  }
}

TEST(WriteBudget, MoreThanTheLimitBeforeARestartStopsWritesUntilItIsADayAgo) {
  NvmeWritten before;
  before.Add(~uint64_t{0});
  WriteBudget budget({.bytes_per_day = 100 * kBlock});
  budget.Recover(before, kStart);
  EXPECT_EQ(Burst(budget, kStart), 0u);
  EXPECT_EQ(Burst(budget, kStart + absl::Hours(24)), 0u);
  EXPECT_EQ(Burst(budget, kStart + absl::Hours(26)), 100 * kBlock);
}

// Both promises over every span of a random run.
TEST(WriteBudget, NoSpanExceedsEitherLimit) {
  for (uint32_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937 random(seed);
    const WriteBudget::Limits limits{.bytes_per_second = (1 + random() % 8) * kBlock / 2,
                                     .bytes_per_day = (1 + random() % 500) * kBlock};
    WriteBudget budget(limits);
    struct Written {
      absl::Time at;
      uint64_t bytes;
    };
    std::deque<Written> written;
    absl::Time now = kStart;
    for (int i = 0; i < 2000; ++i) {
      now += random() % 50 == 0 ? absl::Minutes(random() % 300) : absl::Milliseconds(random() % 900);
      if (const uint64_t bytes = Burst(budget, now); bytes > 0) written.push_back({now, bytes});
      uint64_t sum = 0;
      uint64_t day = 0;
      for (auto it = written.rbegin(); it != written.rend() && now - it->at < absl::Hours(24); ++it) {
        day += it->bytes;
        if (now - it->at > absl::Minutes(1)) continue;
        sum += it->bytes;
        const double span_s = absl::ToDoubleSeconds(now - it->at);
        ASSERT_LE(sum, static_cast<double>(limits.bytes_per_second) * (span_s + 1) + kBlock);
      }
      ASSERT_LE(day, limits.bytes_per_day);
    }
    EXPECT_GT(written.size(), 10u);
  }
}

}  // namespace
}  // namespace larder
