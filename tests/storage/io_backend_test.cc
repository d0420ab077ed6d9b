// Every way of I/O: any alignment, nothing outside of the span, writes beside reads. And
// which way is taken where the kernel refuses one.

#include "storage/io_backend.h"

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <thread>
#include <vector>

#include "absl/strings/match.h"
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
  UniqueFd Open(bool direct) const {
    return UniqueFd(
        ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | (direct ? O_DIRECT : 0), 0600));
  }
};

absl::Status WriteAt(IoBackend& io, uint64_t offset, std::span<const std::byte> from) {
  Waiter waiter;
  io.Write(offset, from, waiter.done());
  return waiter.Wait();
}
absl::Status ReadAt(IoBackend& io, uint64_t offset, std::span<std::byte> to) {
  Waiter waiter;
  io.Read(offset, to, waiter.done());
  return waiter.Wait();
}

class IoBackendTest : public ::testing::TestWithParam<IoWay> {
 protected:
  // Null: no O_DIRECT here.
  std::unique_ptr<IoBackend> Open(bool direct, int threads = 1, std::span<std::byte> memory = {}) {
    UniqueFd fd = file_.Open(direct);
    if (!fd) return nullptr;
    return OpenIo(std::move(fd), {.direct = direct,
                                  .threads = threads,
                                  .name = file_.path,
                                  .memory = memory,
                                  .best = GetParam()})
        .io;
  }
  File file_;
};
INSTANTIATE_TEST_SUITE_P(Ways, IoBackendTest,
                         ::testing::Values(IoWay::kUringRegistered, IoWay::kUring,
                                           IoWay::kThreads));

TEST_P(IoBackendTest, AnyLengthAnyAlignmentNothingOutside) {
  for (bool direct : {true, false}) {
    auto io = Open(direct, 2);
    if (io == nullptr) continue;
    for (uint64_t bytes : {1, 511, 4095, 4096, 4097, 300000, 1 << 20}) {
      for (uint64_t misalign : {0, 1, 64, 512}) {
        BlockMemory out(bytes, misalign);
        Fill(out.span(), bytes + misalign);
        ASSERT_TRUE(WriteAt(*io, 8192, out.span()).ok());
        // One byte more than is asked for shows what is touched beyond.
        BlockMemory in(bytes + 1, misalign);
        in.span()[bytes] = std::byte{0xab};
        ASSERT_TRUE(ReadAt(*io, 8192, in.span().first(bytes)).ok());
        EXPECT_TRUE(IsFilled(in.span().first(bytes), bytes + misalign));
        EXPECT_EQ(in.span()[bytes], std::byte{0xab}) << direct << " " << bytes << " " << misalign;
      }
    }
    EXPECT_TRUE(io->Sync().ok());
  }
}

TEST_P(IoBackendTest, PadsWithZeros) {
  auto io = Open(false);
  BlockMemory ones(8192);
  ASSERT_TRUE(WriteAt(*io, 0, ones.span()).ok());
  ASSERT_TRUE(WriteAt(*io, 0, ones.span().first(100)).ok());
  BlockMemory back(8192);
  ASSERT_TRUE(ReadAt(*io, 0, back.span()).ok());
  EXPECT_EQ(back.span()[99], std::byte{0xee});
  EXPECT_EQ(back.span()[100], std::byte{0});
  EXPECT_EQ(back.span()[4095], std::byte{0});
  EXPECT_EQ(back.span()[4096], std::byte{0xee});
}

// A block may lie in the registered memory, outside of it, or across its end.
TEST_P(IoBackendTest, BlocksInAndOutOfTheMemory) {
  constexpr uint64_t kBlock = 64 << 10;
  constexpr uint64_t kBlocks = 8;
  for (bool direct : {true, false}) {
    BlockMemory memory(kBlock * kBlocks), back(kBlock * kBlocks);
    auto io = Open(direct, 1, memory.span().first(kBlock * kBlocks / 2 - 8192));
    if (io == nullptr) continue;
    for (uint64_t i = 0; i < kBlocks; ++i) {
      const auto block = memory.span().subspan(i * kBlock, kBlock);
      Fill(block, i);
      ASSERT_TRUE(WriteAt(*io, i * kBlock, block).ok());
    }
    ASSERT_TRUE(ReadAt(*io, 0, back.span()).ok());
    std::memset(memory.span().data(), 0, memory.span().size());
    for (uint64_t i = 0; i < kBlocks; ++i) {
      const auto block = memory.span().subspan(i * kBlock, kBlock);
      EXPECT_TRUE(IsFilled(back.span().subspan(i * kBlock, kBlock), i)) << i;
      ASSERT_TRUE(ReadAt(*io, i * kBlock, block).ok());
      EXPECT_TRUE(IsFilled(block, i)) << i;
    }
  }
}

// Reads that never stop, each started as one before it ends.
TEST_P(IoBackendTest, WritesGoOnBesideReads) {
  constexpr int kReadsMax = 1'000'000;
  BlockMemory memory(64 * 4096);
  BlockMemory written(4096);
  auto io = Open(false, 2);
  ASSERT_TRUE(WriteAt(*io, 0, memory.span()).ok());
  std::atomic<int> reads{0}, chains{0};
  std::atomic<int> writes{0};
  std::function<void(int)> read = [&](int at) {
    io->Read(0, memory.span().subspan(at * 4096, 4096), [&, at](absl::Status) {
      if (writes < 3 && ++reads < kReadsMax) return read(at);
      ++chains;
    });
  };
  for (int i = 0; i < 64; ++i) read(i);
  for (int i = 0; i < 3; ++i) {
    io->Write(4096 * i, written.span(), [&](absl::Status) { ++writes; });
  }
  while (chains < 64) std::this_thread::yield();
  EXPECT_EQ(writes, 3);
}

TEST_P(IoBackendTest, EndOfFileIsDataLossAndErrnoIsNamed) {
  for (bool direct : {true, false}) {
    auto io = Open(direct);
    if (io == nullptr) continue;
    BlockMemory memory(16384);
    ASSERT_TRUE(WriteAt(*io, 0, memory.span().first(8192)).ok());
    EXPECT_TRUE(absl::IsDataLoss(ReadAt(*io, 1 << 20, memory.span())));
    EXPECT_TRUE(absl::IsDataLoss(ReadAt(*io, 4096, memory.span())));  // in the middle
  }
  auto closed = OpenIo(UniqueFd(), {.name = "closed", .best = GetParam()}).io;
  BlockMemory memory(4096);
  const absl::Status status = WriteAt(*closed, 0, memory.span());
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "errno 9")) << status;
}

TEST_P(IoBackendTest, DestructorCompletesEverything) {
  auto io = Open(false, 2);
  BlockMemory memory(4096);
  std::atomic<int> done{0};
  for (int i = 0; i < 200; ++i) io->Write(i * 4096, memory.span(), [&](absl::Status) { ++done; });
  io.reset();
  EXPECT_EQ(done, 200);
}

// Each byte is in one place: many operations from many threads, checked against what was written.
TEST_P(IoBackendTest, ManyAtOnceFromManyThreads) {
  constexpr uint64_t kBlock = 20000;
  constexpr uint64_t kStride = 20480;
  constexpr int kThreads = 4;
  constexpr int kEach = 100;
  BlockMemory memory(kStride * kThreads * kEach);
  auto io = Open(true, 3, memory.span());
  if (io == nullptr) io = Open(false, 3, memory.span());
  const auto each = [&](const std::function<void(uint64_t, std::function<void(bool)>)>& f) {
    std::atomic<int> good{0}, done{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (int i = 0; i < kEach; ++i) {
          f(t * kEach + i, [&](bool ok) {
            good += ok;
            ++done;
          });
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    while (done < kThreads * kEach) std::this_thread::yield();
    return good.load();
  };
  EXPECT_EQ(each([&](uint64_t i, std::function<void(bool)> told) {
              const auto block = memory.span().subspan(i * kStride, kBlock);
              Fill(block, i);
              io->Write(i * kStride, block, [told](absl::Status s) { told(s.ok()); });
            }),
            kThreads * kEach);
  std::memset(memory.span().data(), 0, memory.span().size());
  EXPECT_EQ(each([&](uint64_t i, std::function<void(bool)> told) {
              const auto block = memory.span().subspan(i * kStride, kBlock);
              io->Read(i * kStride, block,
                       [=](absl::Status s) { told(s.ok() && IsFilled(block, i)); });
            }),
            kThreads * kEach);
}

TEST(OpenIo, SaysWhichWayItTook) {
  File file;
  BlockMemory memory(1 << 20);
  IoOptions options{.threads = 3, .name = "f", .memory = memory.span()};
  EXPECT_EQ(OpenIo(file.Open(false), options).how, "io_uring, registered buffers");
  options.best = IoWay::kUring;
  EXPECT_EQ(OpenIo(file.Open(false), options).how, "io_uring");
  options.best = IoWay::kThreads;
  EXPECT_EQ(OpenIo(file.Open(false), options).how, "pread in 3 threads");
}

TEST(OpenIo, WithoutRegisteredBuffersWhereTheyAreRefused) {
  File file;
  void* const none = ::mmap(nullptr, 1 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(none, MAP_FAILED);
  OpenedIo opened = OpenIo(
      file.Open(false), {.name = "f", .memory = {static_cast<std::byte*>(none), size_t{1} << 20}});
  EXPECT_EQ(opened.how, "io_uring; buffers not registered: Bad address (errno 14)");
  BlockMemory memory(4096);
  EXPECT_TRUE(WriteAt(*opened.io, 0, memory.span()).ok());
  ::munmap(none, 1 << 20);
}

// In a thread of its own: a filter binds the thread that installs it and those that it starts.
void RefuseIoUring() {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program = {std::size(code), code};
  ASSERT_EQ(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
  ASSERT_EQ(::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
}

TEST(OpenIo, ThreadsWhereIoUringIsForbidden) {
  std::thread([] {
    RefuseIoUring();
    File file;
    OpenedIo opened = OpenIo(file.Open(false), {.threads = 2, .name = "f"});
    EXPECT_EQ(opened.how,
              "pread in 2 threads; io_uring refused: Operation not permitted (errno 1)");
    BlockMemory memory(4096);
    EXPECT_TRUE(WriteAt(*opened.io, 0, memory.span()).ok());
    EXPECT_TRUE(ReadAt(*opened.io, 0, memory.span()).ok());
  }).join();
}

}  // namespace
}  // namespace larder
