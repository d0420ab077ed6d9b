// IoTransfer: whatever the kernel's calls return, all of the block moves once, or the error is
// told.

#include "storage/io_transfer.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>
#include <vector>

#include "absl/strings/match.h"
#include "gtest/gtest.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using ::larder::testing::BlockMemory;
using ::larder::testing::Fill;
using ::larder::testing::IsFilled;
using ::larder::testing::Waiter;

// A file in memory whose calls move as many bytes as they are told to.
class Disk {
 public:
  explicit Disk(uint64_t bytes) : bytes_(bytes) {}
  std::vector<std::byte>& bytes() { return bytes_; }

  int64_t Call(IoTransfer& transfer, uint64_t bytes_max) {
    int64_t moved = 0;
    for (const iovec& part : transfer.Left()) {
      const uint64_t at = transfer.offset() + static_cast<uint64_t>(moved);
      EXPECT_EQ(part.iov_len % 4096, 0u);
      if (at >= bytes_.size()) break;
      const uint64_t n = std::min({part.iov_len, bytes_max - moved, bytes_.size() - at});
      auto* const memory = static_cast<std::byte*>(part.iov_base);
      if (transfer.write()) {
        std::memcpy(bytes_.data() + at, memory, n);
      } else {
        std::memcpy(memory, bytes_.data() + at, n);
      }
      moved += static_cast<int64_t>(n);
    }
    return moved;
  }

 private:
  std::vector<std::byte> bytes_;
};

TEST(IoTransfer, GoesOnAfterShortCountsAndInterruptions) {
  std::mt19937 random(5);
  for (uint64_t bytes : {4096, 5000, 8191, 70000}) {
    for (uint64_t misalign : {0, 8}) {
      Disk disk(4096 + 80 * 1024);
      for (bool write : {true, false}) {
        BlockMemory block(bytes, misalign);
        if (write) Fill(block.span(), bytes);
        Waiter waiter;
        IoTransfer transfer({4096, block.span().data(), bytes, write, waiter.done()}, true);
        EXPECT_EQ(transfer.offset() % 4096, 0u);
        int64_t result = -EINTR;
        while (!transfer.Advance(result)) {
          EXPECT_EQ(transfer.offset() % 4096, 0u);
          const uint64_t bytes_max = 4096 + random() % 9000;  // not always whole pages
          result = random() % 3 == 0 ? -EAGAIN : disk.Call(transfer, bytes_max);
        }
        transfer.Finish("disk");
        ASSERT_TRUE(waiter.Wait().ok());
        EXPECT_TRUE(IsFilled(block.span(), bytes)) << bytes << " " << misalign << " " << write;
      }
      const uint64_t end = 4096 + (bytes + 4095) / 4096 * 4096;
      EXPECT_TRUE(std::all_of(disk.bytes().begin() + 4096 + bytes, disk.bytes().begin() + end,
                              [](std::byte b) { return b == std::byte{0}; }));
    }
  }
}

absl::Status Outcome(std::vector<int64_t> results) {
  BlockMemory block(8192);
  Waiter waiter;
  IoTransfer transfer({4096, block.span().data(), 8192, false, waiter.done()}, true);
  size_t i = 0;
  while (!transfer.Advance(results[std::min(i, results.size() - 1)])) ++i;
  transfer.Finish("disk");
  return waiter.Wait();
}

TEST(IoTransfer, TellsErrorsAndTheEndOfTheFile) {
  EXPECT_TRUE(Outcome({8192}).ok());
  EXPECT_TRUE(Outcome({4096, -EINTR, 4096}).ok());
  EXPECT_TRUE(Outcome({512, 4096, 512, 4095, 4096}).ok());  // less than a page is no end
  const absl::Status bad = Outcome({4096, -EIO});
  EXPECT_TRUE(absl::IsUnavailable(bad)) << bad;
  EXPECT_TRUE(absl::StrContains(bad.message(), "disk: reading 8192 bytes at 4096")) << bad;
  EXPECT_TRUE(absl::StrContains(bad.message(), "errno 5")) << bad;
  EXPECT_TRUE(absl::IsDataLoss(Outcome({0})));
  EXPECT_TRUE(absl::IsDataLoss(Outcome({4096, 0})));
  EXPECT_TRUE(absl::IsDataLoss(Outcome({4096, 100})));  // the file ends within a page
  // A device that always puts us off is not waited for without end.
  EXPECT_TRUE(absl::IsUnavailable(Outcome({-EAGAIN})));
}

}  // namespace
}  // namespace larder
