// CUDA arenas on the fake driver: sizes, what workers open of them, and who goes without.

#include "storage/arena_cuda.h"

#include <unistd.h>

#include "absl/strings/match.h"
#include "gtest/gtest.h"
#include "storage/handover.h"
#include "tests/storage/child_process.h"
#include "tests/storage/cuda_testing.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using namespace ::larder::testing;  // NOLINT: a test's own helpers

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kBoot = 0xb007;

class ArenaCudaTest : public ::testing::Test {
 protected:
  ArenaCudaTest() { FakeCudaReset(); }
  ~ArenaCudaTest() override { FakeCudaReset(); }
};

TEST_F(ArenaCudaTest, TakesWhatTheDeviceHas) {
  FakeCudaSet("bytes=67108864");
  const auto device = OpenDevice();
  {
    auto arena = CudaArena::Create(device, 48 * kMiB, 16 * kMiB);
    ASSERT_TRUE(arena.ok()) << arena.status();
    EXPECT_EQ((*arena)->bytes(), 48 * kMiB);
    EXPECT_FALSE((*arena)->addressable());
    EXPECT_TRUE((*arena)->host_bytes().empty());
    EXPECT_EQ((*arena)->fd(), -1);
    const wire::HandoverArena description = (*arena)->Description();
    EXPECT_EQ(description.kind, wire::kCudaIpc);
    EXPECT_EQ(description.bytes, 48 * kMiB);
    EXPECT_EQ(description.device_uuid[1], 0x10);
    EXPECT_EQ(FakeCudaCount().allocations, 1);
  }
  EXPECT_EQ(FakeCudaCount().allocations, 0);
}

TEST_F(ArenaCudaTest, RefusesWhatDoesNotFit) {
  FakeCudaSet("bytes=67108864");
  const auto device = OpenDevice();
  const absl::Status too_large = CudaArena::Create(device, 50 * kMiB, 16 * kMiB).status();
  EXPECT_TRUE(absl::IsResourceExhausted(too_large)) << too_large;
  for (const char* part : {"52428800", "has 67108864", "16777216", "Fake 0"}) {
    EXPECT_TRUE(absl::StrContains(too_large.message(), part)) << too_large;
  }
  EXPECT_TRUE(absl::IsResourceExhausted(CudaArena::Create(device, 2 * kMiB, 65 * kMiB).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(CudaArena::Create(device, 3 * kMiB, 0).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(CudaArena::Create(device, 0, 0).status()));
  FakeCudaSet("cuIpcGetMemHandle=801");  // as where IPC is not supported
  EXPECT_TRUE(absl::IsUnavailable(CudaArena::Create(device, 2 * kMiB, 0).status()));
  EXPECT_EQ(FakeCudaCount().allocations, 0);
}

TEST_F(ArenaCudaTest, TellsMemoryThatOthersHoldFromTooLittle) {
  FakeCudaSet("bytes=67108864");
  const auto device = OpenDevice();
  const CudaPointer others = device->Allocate(20 * kMiB).value;
  const absl::Status held = CudaArena::Create(device, 48 * kMiB, 0).status();
  EXPECT_TRUE(absl::IsAborted(held)) << held;
  for (const char* part : {"held by other processes", "46137344 are free", "50331648"}) {
    EXPECT_TRUE(absl::StrContains(held.message(), part)) << held;
  }
  EXPECT_TRUE(absl::IsAborted(CudaArena::Create(device, 2 * kMiB, 48 * kMiB).status()));
  EXPECT_TRUE(absl::IsResourceExhausted(CudaArena::Create(device, 66 * kMiB, 0).status()));
  FakeCudaSet("cuMemAlloc=2");  // taken since it was asked for
  EXPECT_TRUE(absl::IsAborted(CudaArena::Create(device, 2 * kMiB, 0).status()));
  FakeCudaSet("cuMemAlloc=0");
  device->Free(others);
  EXPECT_TRUE(CudaArena::Create(device, 48 * kMiB, 0).ok());
}

TEST_F(ArenaCudaTest, HostMemoryIsRegisteredForAsLong) {
  const auto device = OpenDevice();
  auto host = Arena::Create({"host", 4 * kMiB, false, 0});
  ASSERT_TRUE(host.ok());
  {
    const CudaRegistration registration(device, **host);
    EXPECT_TRUE(registration.status().ok());
    EXPECT_EQ(FakeCudaCount().registrations, 1);
  }
  FakeCudaSet("cuMemHostRegister=304");
  {
    const CudaRegistration registration(device, **host);
    EXPECT_TRUE(absl::IsUnavailable(registration.status()));
    EXPECT_EQ(FakeCudaCount().registrations, 0);
  }
}

// Two arenas by a real hand-over: 0 on the device, 1 in HOST.
class CudaHandover : public ArenaCudaTest {
 protected:
  CudaHandover() {
    device_ = OpenDevice();
    gpu_ = *CudaArena::Create(device_, 4 * kMiB, 0);
    host_ = *Arena::Create({"host", kMiB, false, 0});
    HandoverServer::Options options;
    options.socket_path = folder_.path() + "/socket";
    options.boot_id = kBoot;
    options.arenas = {{gpu_->Description()}, {host_->Description(), host_->fd()}};
    options.arenas[1].description.arena = 1;
    server_ = *HandoverServer::Start(
        options, [](uint64_t) { return true; }, [](uint64_t) {});
  }
  std::unique_ptr<ChildProcess> StartWorker(const std::string& name, const std::string& fake) {
    return std::make_unique<ChildProcess>(
        name, std::map<std::string, std::string>{{"SOCKET", folder_.path() + "/socket"},
                                                 {"FAKE_CUDA", fake}});
  }

  TempDir folder_;
  std::shared_ptr<CudaDevice> device_;
  std::unique_ptr<CudaArena> gpu_;
  std::unique_ptr<Arena> host_;
  std::unique_ptr<HandoverServer> server_;
};

TEST(CudaHandoverChild, DISABLED_OpensAndReads) {
  for (int session = 0; session < 3; ++session) {
    auto got = ConnectHandover(ChildParameter("SOCKET"), kBoot, 1);
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_EQ(got->arenas[0], nullptr);
    EXPECT_EQ(FakeCudaCount().contexts, 0);  // nobody has asked for it
    const wire::HandoverArena& description = got->descriptions[0];
    auto first = CudaArena::Import(description, kBoot);
    auto second = CudaArena::Import(description, kBoot);
    ASSERT_TRUE(first.ok() && second.ok()) << first.status() << second.status();
    EXPECT_EQ((*first)->bytes(), 4 * kMiB);
    EXPECT_EQ((*first)->base(), (*second)->base());  // opened once
    EXPECT_EQ(FakeCudaCount().imports, 1);
    first->reset();
    EXPECT_EQ(FakeCudaCount().imports, 1);
    EXPECT_TRUE(IsFilled(ReadDevice(OpenDevice(FormatCudaUuid((*second)->device().uuid())),
                                    (*second)->pointer(), kMiB),
                         1));
    // The same handle of another boot is another daemon's.
    EXPECT_TRUE(CudaArena::Import(description, kBoot + 1).ok());
  }
  EXPECT_EQ(FakeCudaCount().imports, 0);
  EXPECT_EQ(FakeCudaCount().contexts, 0);
  Say("read");
}

TEST(CudaHandoverChild, DISABLED_GoesWithout) {
  auto got = ConnectHandover(ChildParameter("SOCKET"), kBoot, 1);
  ASSERT_TRUE(got.ok()) << got.status();
  ASSERT_NE(got->arenas[1], nullptr);
  EXPECT_EQ(got->arenas[1]->base()[0], std::byte{42});
  Say(std::string(CudaArena::Import(got->descriptions[0], kBoot).status().ToString()));
}

TEST_F(CudaHandover, TwoWorkersOpenItOnceEach) {
  std::vector<std::byte> bytes(kMiB);
  Fill(bytes, 1);
  WriteDevice(device_, gpu_->pointer(), bytes);
  auto one = StartWorker("CudaHandoverChild.DISABLED_OpensAndReads", "");
  auto two = StartWorker("CudaHandoverChild.DISABLED_OpensAndReads", "devices=2");
  EXPECT_EQ(one->ReadLine(), "read");
  EXPECT_EQ(two->ReadLine(), "read");
  EXPECT_TRUE(one->Join());
  EXPECT_TRUE(two->Join());
}

TEST_F(CudaHandover, AWorkerWithoutADeviceStillHasHost) {
  host_->base()[0] = std::byte{42};
  for (const auto& [fake, reason] : {std::pair{"cuInit=803", "UNAVAILABLE"},
                                     {"devices=0", "no CUDA-capable device"},
                                     {"cuIpcOpenMemHandle=205", "cuIpcOpenMemHandle"}}) {
    auto worker = StartWorker("CudaHandoverChild.DISABLED_GoesWithout", fake);
    const std::optional<std::string> why = worker->ReadLine();
    ASSERT_TRUE(why.has_value()) << fake;
    EXPECT_TRUE(absl::StrContains(*why, reason)) << *why;
    EXPECT_TRUE(worker->Join());
  }
  // In the exporter's own process, too: CUDA cannot open it there.
  const absl::Status own = CudaArena::Import(gpu_->Description(), kBoot).status();
  EXPECT_TRUE(absl::IsUnavailable(own)) << own;
}

}  // namespace
}  // namespace larder
