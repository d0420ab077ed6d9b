// CudaCopyEngine on the fake driver: bytes, order, errors that stay, a device that hangs.

#include "storage/cuda_copy_engine.h"

#include <sys/prctl.h>

#include <atomic>
#include <cstring>
#include <random>

#include "gtest/gtest.h"
#include "tests/storage/cuda_testing.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using namespace ::larder::testing;  // NOLINT: a test's own helpers
using Engine = CudaCopyEngine;

constexpr uint64_t kBytes = 8 << 20;

class CudaCopyEngineTest : public ::testing::Test {
 protected:
  CudaCopyEngineTest() : host_(kBytes) {
    FakeCudaReset();
    device_ = OpenDevice();
    memory_ = device_->Allocate(kBytes).value;
  }
  ~CudaCopyEngineTest() override {
    engine_.reset();
    FakeCudaReset();
    device_->Free(memory_);
  }
  void Start(Engine::Options options = {}) {
    options.on_lost = [this](const CudaStatus& why) {
      lost_ = why.code;
      ++lost_calls_;
    };
    auto engine = Engine::Start(device_, std::move(options));
    ASSERT_TRUE(engine.ok()) << engine.status.text;
    engine_ = std::move(engine.value);
  }
  std::span<std::byte> Host(uint64_t offset, uint64_t bytes) {
    return std::span(host_).subspan(offset, bytes);
  }

  std::vector<std::byte> host_;
  std::shared_ptr<CudaDevice> device_;
  CudaPointer memory_ = 0;
  std::atomic<int> lost_ = 0;
  std::atomic<int> lost_calls_ = 0;
  std::unique_ptr<Engine> engine_;
};

TEST_F(CudaCopyEngineTest, CoalescesNeighboursOnBothSides) {
  std::byte* const h = host_.data();
  const Engine::Batch merged = Engine::Coalesce(
      {{100, h, 10}, {110, h + 10, 5}, {115, h + 20, 5}, {120, h + 25, 5}, {200, h + 30, 5}});
  const Engine::Batch expected = {{100, h, 15}, {115, h + 20, 10}, {200, h + 30, 5}};
  EXPECT_EQ(merged, expected);
  EXPECT_TRUE(Engine::Coalesce({}).empty());
}

TEST_F(CudaCopyEngineTest, CarriesNeighboursInOneCopy) {
  Start();
  const long before = FakeCudaCount().copies;
  CopyWaiter waiter;
  engine_->Copy(Engine::kToDevice,
                {{memory_, host_.data(), 4096}, {memory_ + 4096, host_.data() + 4096, 4096}},
                waiter.done());
  ASSERT_TRUE(waiter.Wait().ok());
  EXPECT_EQ(FakeCudaCount().copies, before + 1);
}

// Random batches both ways at once against two arrays; batches of one round touch no byte twice.
TEST_F(CudaCopyEngineTest, BytesAreRightWhateverTheOrder) {
  Start();
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  std::vector<std::byte> device_model(kBytes);
  Fill(host_, seed);
  ASSERT_TRUE(CopyAndWait(*engine_, Engine::kToDevice, memory_, host_).ok());
  device_model = host_;
  std::vector<std::byte> host_model = host_;
  constexpr uint64_t kUnit = 4096;
  for (int round = 0; round < 50; ++round) {
    std::vector<CopyWaiter> waiters(16);
    for (uint64_t i = 0; i < waiters.size(); ++i) {
      const bool up = random() % 2 == 0;
      Engine::Batch batch;
      for (uint64_t k = 0; k < 4; ++k) {
        // Each piece has the (4 i + k)th of 64 parts to itself, another one on the other side.
        const uint64_t part = kBytes / 64;
        const uint64_t number = 4 * i + k;
        const uint64_t host = number * part + random() % 8 * kUnit;
        const uint64_t device = (number + round) % 64 * part + random() % 8 * kUnit;
        const uint64_t bytes = 1 + random() % (16 * kUnit);
        batch.push_back({memory_ + device, host_.data() + host, bytes});
        const uint64_t to = up ? device : host;
        const uint64_t from = up ? host : device;
        auto& target = up ? device_model : host_model;
        auto& source = up ? host_model : device_model;
        std::memcpy(target.data() + to, source.data() + from, bytes);
      }
      engine_->Copy(up ? Engine::kToDevice : Engine::kToHost, std::move(batch), waiters[i].done());
    }
    for (CopyWaiter& waiter : waiters) ASSERT_TRUE(waiter.Wait().ok());
    ASSERT_EQ(std::memcmp(host_.data(), host_model.data(), kBytes), 0);
    Fill(Host(0, kBytes), random());
    host_model = host_;
  }
  std::vector<std::byte> back(kBytes);
  ASSERT_TRUE(CopyAndWait(*engine_, Engine::kToHost, memory_, back).ok());
  EXPECT_EQ(std::memcmp(back.data(), device_model.data(), kBytes), 0);
  EXPECT_EQ(lost_calls_, 0);
}

TEST_F(CudaCopyEngineTest, AnErrorStays) {
  Start();
  FakeCudaSet("copy=214");
  EXPECT_EQ(CopyAndWait(*engine_, Engine::kToDevice, memory_, Host(0, 4096)).code, 214);
  EXPECT_EQ(lost_, 214);  // told before the batch was
  FakeCudaSet("copy=0");
  const CudaStatus later = CopyAndWait(*engine_, Engine::kToHost, memory_, Host(0, 4096));
  EXPECT_EQ(later.code, 214);
  EXPECT_NE(later.text.find("ECC"), std::string::npos) << later.text;
  EXPECT_EQ(lost_, 214);
  EXPECT_EQ(lost_calls_, 1);
}

// Three batches each way are with the device, and a sleep between two looks is not made twice as
// long by the kernel's standard slack.
TEST_F(CudaCopyEngineTest, KeepsTheDeviceBusy) {
  Start();
  FakeCudaSet("hold=1");
  std::vector<CopyWaiter> waiters(10);
  for (size_t i = 0; i < waiters.size(); ++i) {
    engine_->Copy(i % 2 == 0 ? Engine::kToDevice : Engine::kToHost,
                  {{memory_ + i * 4096, host_.data() + i * 4096, 4096}}, waiters[i].done());
  }
  while (FakeCudaCount().asked < 6) std::this_thread::yield();
  FakeCudaSet("hold=0");
  for (CopyWaiter& waiter : waiters) EXPECT_TRUE(waiter.Wait().ok());
  std::atomic<int> slack_ns = 0;
  engine_->Copy(Engine::kToDevice, {{memory_, host_.data(), 4096}},
                [&](const CudaStatus&) { slack_ns = ::prctl(PR_GET_TIMERSLACK); });
  while (slack_ns == 0) std::this_thread::yield();
  EXPECT_EQ(slack_ns, 1000);
}

TEST_F(CudaCopyEngineTest, AllUnderWayFailWithIt) {
  Start();
  FakeCudaSet("hold=1");
  std::vector<CopyWaiter> waiters(20);
  for (size_t i = 0; i < waiters.size(); ++i) {
    engine_->Copy(i % 2 == 0 ? Engine::kToDevice : Engine::kToHost,
                  {{memory_ + i * 4096, host_.data() + i * 4096, 4096}}, waiters[i].done());
  }
  FakeCudaSet("copy=719 hold=0");
  for (CopyWaiter& waiter : waiters) EXPECT_EQ(waiter.Wait().code, 719);
  EXPECT_EQ(lost_calls_, 1);
}

// The context's error is the answer to every question, also while a copy to host is under way.
TEST_F(CudaCopyEngineTest, ACopyToHostOutlivesAnothersError) {
  Start({.settle = std::chrono::seconds(60)});
  FakeCudaSet("hold=1");
  CopyWaiter down;
  CopyWaiter up;
  CopyWaiter late;
  engine_->Copy(Engine::kToHost, {{memory_, host_.data(), 4096}}, down.done());
  engine_->Copy(Engine::kToDevice, {{memory_ + 4096, host_.data() + 4096, 4096}}, up.done());
  while (FakeCudaCount().asked < 2) std::this_thread::yield();
  FakeCudaSet("cuEventQuery=719");
  EXPECT_EQ(up.Wait().code, 719);
  engine_->Copy(Engine::kToHost, {{memory_, host_.data() + 8192, 4096}}, late.done());
  EXPECT_EQ(late.Wait().code, 719);
  EXPECT_FALSE(down.finished());
  FakeCudaSet("cuEventQuery=0 hold=0");
  EXPECT_TRUE(down.Wait().ok());
}

TEST_F(CudaCopyEngineTest, ACopyOutsideOfTheMemoryIsRefused) {
  Start();
  EXPECT_EQ(CopyAndWait(*engine_, Engine::kToDevice, memory_ + kBytes - 4096, Host(0, 4097)).code,
            kCudaInvalidValue);
  EXPECT_EQ(lost_, kCudaInvalidValue);
}

// Copies to the device fail when it hangs; those to host end only when it has let go.
TEST_F(CudaCopyEngineTest, AHangIsFoundOut) {
  Start({.stall_limit = std::chrono::milliseconds(20)});
  FakeCudaSet("hold=1");
  CopyWaiter up;
  CopyWaiter down;
  CopyWaiter queued;
  CopyWaiter late;
  engine_->Copy(Engine::kToHost, {{memory_, host_.data(), 4096}}, down.done());
  engine_->Copy(Engine::kToDevice, {{memory_ + 4096, host_.data() + 4096, 4096}}, up.done());
  EXPECT_EQ(up.Wait().code, kCudaTimeout);
  EXPECT_EQ(lost_, kCudaTimeout);
  engine_->Copy(Engine::kToHost, {{memory_, host_.data() + 8192, 4096}}, late.done());
  EXPECT_EQ(late.Wait().code, kCudaTimeout);
  EXPECT_FALSE(down.finished());
  FakeCudaSet("hold=0");
  EXPECT_TRUE(down.Wait().ok());
}

// Shutting down does not wait for ever, and calls nothing of the driver that might.
TEST_F(CudaCopyEngineTest, AHangDoesNotHoldUpTheEnd) {
  Start({.stall_limit = std::chrono::milliseconds(20)});
  FakeCudaSet("hold=1");
  CopyWaiter down;
  engine_->Copy(Engine::kToHost, {{memory_, host_.data(), 4096}}, down.done());
  // Until it is with the device, the end would only cancel it.
  CopyWaiter up;
  engine_->Copy(Engine::kToDevice, {{memory_ + 4096, host_.data() + 4096, 4096}}, up.done());
  EXPECT_EQ(up.Wait().code, kCudaTimeout);
  const int streams = FakeCudaCount().streams;
  engine_.reset();
  EXPECT_EQ(down.Wait().code, kCudaTimeout);
  EXPECT_TRUE(device_->abandoned());
  EXPECT_EQ(FakeCudaCount().streams, streams);
}

TEST_F(CudaCopyEngineTest, WhatIsQueuedAtTheEndFails) {
  Start();
  FakeCudaSet("hold=1");
  std::vector<CopyWaiter> waiters(5);
  // Each to a place of its own: they may run at once.
  for (size_t i = 0; i < waiters.size(); ++i) {
    engine_->Copy(Engine::kToDevice, {{memory_ + i * 4096, host_.data() + i * 4096, 4096}},
                  waiters[i].done());
  }
  std::thread end([this] { engine_.reset(); });
  EXPECT_EQ(waiters[4].Wait().code, kCudaStopped);
  FakeCudaSet("hold=0");
  end.join();
  for (CopyWaiter& waiter : waiters) EXPECT_TRUE(waiter.finished());
}

}  // namespace
}  // namespace larder
