// GpuReader over a copier that the test completes batch by batch.
#include "server/gpu_reader.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "absl/synchronization/notification.h"
#include "tests/storage/cuda_testing.h"

namespace larder {
namespace {

using ::larder::testing::OpenDevice;

class StubCopier final : public Copier {
 public:
  Limits limits() const override { return {}; }
  void Copy(Direction, Batch batch, DoneFn done) override {
    absl::MutexLock lock(&mu_);
    batches_.push_back({std::move(batch), std::move(done)});
  }
  size_t handed_over() {
    absl::MutexLock lock(&mu_);
    return batches_.size();
  }
  void AwaitHandedOver(size_t count) {
    absl::MutexLock lock(&mu_);
    const auto enough = [&] { return batches_.size() >= count; };
    mu_.Await(absl::Condition(&enough));
  }
  // The batch's bytes become `value`.
  void Complete(size_t index, std::byte value, absl::Status status = absl::OkStatus()) {
    DoneFn done;
    {
      absl::MutexLock lock(&mu_);
      for (const Piece& piece : batches_[index].batch) {
        std::fill_n(piece.host, piece.bytes, value);
      }
      done = batches_[index].done;
    }
    done(std::move(status));
  }

 private:
  struct Handed {
    Batch batch;
    DoneFn done;
  };
  absl::Mutex mu_;
  std::vector<Handed> batches_;
};

struct Outcome {
  std::vector<std::byte> bytes = std::vector<std::byte>(4096, std::byte{0xee});
  absl::Status status;
  absl::Notification ended;
};

class GpuReaderTest : public ::testing::Test {
 protected:
  static constexpr size_t kReads = 6;
  static constexpr size_t kBuffers = 4;

  void SetUp() override {
    auto reader = GpuReader::Create(copier_, OpenDevice());
    ASSERT_TRUE(reader.ok()) << reader.status();
    reader_ = *std::move(reader);
    for (Outcome& outcome : outcomes_) {
      reader_->Read(0, nullptr, outcome.bytes, [&outcome](absl::Status status) {
        outcome.status = std::move(status);
        outcome.ended.Notify();
      });
    }
  }

  StubCopier copier_;
  std::vector<Outcome> outcomes_ = std::vector<Outcome>(kReads);
  std::unique_ptr<GpuReader> reader_;
};

TEST_F(GpuReaderTest, ReadsAreAsManyAtOnceAsBuffers) {
  EXPECT_EQ(copier_.handed_over(), kBuffers);
  for (size_t i = 0; i < kReads; ++i) {
    copier_.AwaitHandedOver(std::min(kReads, kBuffers + i));
    const absl::Status status = i == 2 ? absl::UnavailableError("lost") : absl::OkStatus();
    copier_.Complete(i, std::byte(i), status);
    outcomes_[i].ended.WaitForNotification();
    EXPECT_EQ(outcomes_[i].status, status);
    const auto expected = i == 2 ? std::byte{0xee} : std::byte(i);
    EXPECT_EQ(std::ranges::count(outcomes_[i].bytes, expected), 4096) << i;
  }
  EXPECT_EQ(copier_.handed_over(), kReads);
}

// Whether they wait or are with a device that does not answer, which may write until its end.
TEST_F(GpuReaderTest, StopEndsAllReads) {
  copier_.Complete(1, std::byte{1});
  outcomes_[1].ended.WaitForNotification();
  copier_.AwaitHandedOver(kBuffers + 1);
  reader_->Stop();
  for (size_t i = 0; i < kReads; ++i) {
    ASSERT_TRUE(outcomes_[i].ended.HasBeenNotified()) << i;
    EXPECT_EQ(absl::IsCancelled(outcomes_[i].status), i != 1) << outcomes_[i].status;
  }
  EXPECT_EQ(copier_.handed_over(), kBuffers + 1);
  for (const size_t late : {0, 2, 3, 4}) copier_.Complete(late, std::byte{9});
  for (size_t i = 0; i < kReads; ++i) {
    EXPECT_EQ(std::ranges::count(outcomes_[i].bytes, i == 1 ? std::byte{1} : std::byte{0xee}), 4096)
        << i;
  }
}

}  // namespace
}  // namespace larder
