#include "client/worker/prefill_rate.h"

#include "gtest/gtest.h"

namespace larder::worker {
namespace {

// 1 ms a token and 1 us more for each position.
double Seconds(uint32_t begin, uint32_t end) {
  double seconds = 0;
  for (uint32_t p = begin; p < end; ++p) seconds += 1e-3 + 1e-6 * p;
  return seconds;
}

PrefillRate Rate() {
  return PrefillRate({.tokens = 100,
                      .at_start = absl::Seconds(Seconds(0, 100)),
                      .far_begin = 2'000,
                      .far = absl::Seconds(Seconds(2'000, 2'100))});
}

TEST(PrefillRate, KnowsThatLaterTokensTakeLonger) {
  const PrefillRate rate = Rate();
  for (const auto& [begin, end] : {std::pair{0u, 1u}, {0u, 5'000u}, {3'000u, 3'016u}}) {
    EXPECT_NEAR(absl::ToDoubleSeconds(rate.Estimate(begin, end)), Seconds(begin, end), 1e-6);
  }
  EXPECT_EQ(rate.Estimate(5, 5), absl::ZeroDuration());
  EXPECT_NEAR(rate.TokensPerSecond(4'000), 4'000 / Seconds(0, 4'000), 1e-3);
}

TEST(PrefillRate, FollowsWhatStepsTook) {
  PrefillRate rate = Rate();
  for (int i = 0; i < 50; ++i) rate.Observe(500, 600, absl::Seconds(3 * Seconds(500, 600)));
  EXPECT_NEAR(absl::ToDoubleSeconds(rate.Estimate(0, 1'000)), 3 * Seconds(0, 1'000), 1e-3);
}

TEST(PrefillRate, UnknownGivesZero) {
  PrefillRate rate;
  rate.Observe(0, 100, absl::Seconds(1));
  EXPECT_FALSE(rate.known());
  EXPECT_EQ(rate.Estimate(0, 100), absl::ZeroDuration());
  EXPECT_EQ(rate.TokensPerSecond(100), 0);
}

// The first chunk was disturbed, or there is no second one: no slope, and nothing negative.
TEST(PrefillRate, TakesWhatAMeasurementGives) {
  for (const uint32_t far_begin : {0u, 2'000u}) {
    const PrefillRate rate({.tokens = 100,
                            .at_start = absl::Seconds(2),
                            .far_begin = far_begin,
                            .far = absl::Seconds(1)});
    EXPECT_NEAR(absl::ToDoubleSeconds(rate.Estimate(0, 100)), 2, 1e-6);
    EXPECT_NEAR(absl::ToDoubleSeconds(rate.Estimate(5'000, 5'100)), 2, 1e-6);
  }
  // So steep that the matrices would take less than nothing.
  const PrefillRate steep(
      {.tokens = 100, .at_start = absl::Milliseconds(1), .far_begin = 10, .far = absl::Seconds(1)});
  EXPECT_TRUE(steep.known());
  EXPECT_GT(steep.Estimate(0, 100), absl::ZeroDuration());
}

}  // namespace
}  // namespace larder::worker
