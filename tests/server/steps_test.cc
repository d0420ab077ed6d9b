#include "server/rpc/steps.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace larder {
namespace {

class Counter final : public Steps {
 public:
  int steps = 0;
  uint32_t seen = 0;
  int again = 0;  // signals itself so often
  std::atomic<bool> inside = false;

 private:
  void Step(uint32_t signals) override {
    EXPECT_FALSE(inside.exchange(true)) << "entered twice";
    EXPECT_NE(signals, 0u);
    ++steps;
    seen |= signals;
    if (again-- > 0) Signal(kStepNews);
    inside = false;
  }
};

TEST(Steps, NewsFromInsideRunsAgainAndDoesNotNest) {
  const auto counter = std::make_shared<Counter>();
  counter->again = 3;
  counter->Signal(kStepStart);
  EXPECT_EQ(counter->steps, 4);
  EXPECT_EQ(counter->seen, kStepStart | kStepNews);
}

TEST(Steps, ManyThreadsOneStepAndNothingLost) {
  const auto counter = std::make_shared<Counter>();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([counter, t] {
      for (int i = 0; i < 10'000; ++i) counter->Signal(1u << t);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(counter->seen, 15u);
  const int before = counter->steps;
  counter->Signal(kStepNews);
  EXPECT_EQ(counter->steps, before + 1);
}

class Fragile final : public Steps {
 public:
  std::shared_ptr<Fragile> self;
  bool* died = nullptr;
  ~Fragile() override { *died = true; }

 private:
  void Step(uint32_t) override {
    self.reset();
    EXPECT_FALSE(*died) << "alive until Signal returns";
  }
};

TEST(Steps, LivesUntilSignalReturns) {
  bool died = false;
  auto fragile = std::make_shared<Fragile>();
  Fragile* const raw = fragile.get();
  raw->died = &died;
  raw->self = std::move(fragile);
  raw->Signal(kStepStart);
  EXPECT_TRUE(died);
}

}  // namespace
}  // namespace larder
