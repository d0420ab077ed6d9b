// The thread pool's I/O: any alignment, nothing outside of the span, reads before writes.

#include "storage/io_backend.h"

#include <fcntl.h>

#include <vector>

#include "gtest/gtest.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using ::larder::testing::BlockMemory;
using ::larder::testing::Fill;
using ::larder::testing::IsFilled;
using ::larder::testing::TempDir;
using ::larder::testing::Waiter;

struct File {
  TempDir folder;
  std::string path = folder.path() + "/file";
  std::unique_ptr<IoBackend> Open(bool direct, int threads) {
    UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | (direct ? O_DIRECT : 0), 0600));
    if (!fd) return nullptr;
    return MakeThreadPoolIo(std::move(fd), direct, threads, path);
  }
};

TEST(ThreadPoolIo, AnyLengthAnyAlignmentNothingOutside) {
  for (bool direct : {true, false}) {
    File file;
    auto io = file.Open(direct, 2);
    if (io == nullptr) continue;  // no O_DIRECT here
    for (uint64_t bytes : {1, 511, 4095, 4096, 4097, 300000, 1 << 20}) {
      for (uint64_t misalign : {0, 1, 64, 512}) {
        BlockMemory out(bytes, misalign);
        Fill(out.span(), bytes + misalign);
        Waiter written;
        io->Write(8192, out.span(), written.done());
        ASSERT_TRUE(written.Wait().ok());
        // One byte more than is asked for shows what is touched beyond.
        BlockMemory in(bytes + 1, misalign);
        in.span()[bytes] = std::byte{0xab};
        Waiter read;
        io->Read(8192, in.span().first(bytes), read.done());
        ASSERT_TRUE(read.Wait().ok());
        EXPECT_TRUE(IsFilled(in.span().first(bytes), bytes + misalign));
        EXPECT_EQ(in.span()[bytes], std::byte{0xab}) << direct << " " << bytes << " " << misalign;
      }
    }
    EXPECT_TRUE(io->Sync().ok());
  }
}

TEST(ThreadPoolIo, PadsWithZeros) {
  File file;
  auto io = file.Open(false, 1);
  BlockMemory ones(8192);
  Waiter a, b, c;
  io->Write(0, ones.span(), a.done());
  ASSERT_TRUE(a.Wait().ok());
  io->Write(0, ones.span().first(100), b.done());
  ASSERT_TRUE(b.Wait().ok());
  BlockMemory back(8192);
  io->Read(0, back.span(), c.done());
  ASSERT_TRUE(c.Wait().ok());
  EXPECT_EQ(back.span()[99], std::byte{0xee});
  EXPECT_EQ(back.span()[100], std::byte{0});
  EXPECT_EQ(back.span()[4095], std::byte{0});
  EXPECT_EQ(back.span()[4096], std::byte{0xee});
}

TEST(ThreadPoolIo, ReadsStartBeforeWrites) {
  File file;
  auto io = file.Open(false, 1);
  BlockMemory memory(4096);
  absl::Notification queued;
  Waiter first;
  io->Write(0, memory.span(), [&, done = first.done()](absl::Status status) {
    queued.WaitForNotification();
    done(status);
  });
  std::string order;  // the one I/O thread's, then ours
  Waiter writes, reads;
  io->Write(0, memory.span(), [&, done = writes.done()](absl::Status s) {
    order += 'w';
    done(s);
  });
  io->Read(0, memory.span(), [&](absl::Status) { order += 'r'; });
  io->Read(0, memory.span(), [&, done = reads.done()](absl::Status s) {
    order += 'r';
    done(s);
  });
  queued.Notify();
  ASSERT_TRUE(writes.Wait().ok());
  EXPECT_EQ(order, "rrw");
}

TEST(ThreadPoolIo, EndOfFileIsDataLossAndErrnoIsNamed) {
  File file;
  auto io = file.Open(false, 1);
  BlockMemory memory(4096);
  Waiter past;
  io->Read(1 << 20, memory.span(), past.done());
  EXPECT_TRUE(absl::IsDataLoss(past.Wait()));
  auto closed = MakeThreadPoolIo(UniqueFd(), false, 1, "closed");
  Waiter bad;
  closed->Write(0, memory.span(), bad.done());
  const absl::Status status = bad.Wait();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_NE(status.message().find("errno 9"), absl::string_view::npos) << status;
}

TEST(ThreadPoolIo, DestructorCompletesEverything) {
  File file;
  auto io = file.Open(false, 2);
  BlockMemory memory(4096);
  std::atomic<int> done{0};
  for (int i = 0; i < 200; ++i) io->Write(i * 4096, memory.span(), [&](absl::Status) { ++done; });
  io.reset();
  EXPECT_EQ(done, 200);
}

}  // namespace
}  // namespace larder
