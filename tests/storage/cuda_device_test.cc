// CudaDriver and CudaDevice on the fake driver: what is refused, and that nothing leaks.

#include "storage/cuda_device.h"

#include "gtest/gtest.h"
#include "tests/storage/child_process.h"
#include "tests/storage/cuda_testing.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using namespace ::larder::testing;  // NOLINT: a test's own helpers
using ::testing::Test;

class CudaDeviceTest : public Test {
 protected:
  CudaDeviceTest() { FakeCudaReset(); }
  ~CudaDeviceTest() override { FakeCudaReset(); }
};

void ExpectNothingHeld() {
  const FakeCudaCounts counts = FakeCudaCount();
  EXPECT_EQ(counts.contexts, 0);
  EXPECT_EQ(counts.allocations, 0);
  EXPECT_EQ(counts.imports, 0);
  EXPECT_EQ(counts.registrations, 0);
  EXPECT_EQ(counts.streams, 0);
  EXPECT_EQ(counts.events, 0);
}

TEST_F(CudaDeviceTest, SaysWhyThereIsNone) {
  const auto missing = CudaDevice::Open("", "libno-such-driver.so.1");
  EXPECT_EQ(missing.status.code, kCudaNoDriver);
  EXPECT_NE(missing.status.text.find("libno-such-driver.so.1"), std::string::npos);
  const auto other = CudaDevice::Open("", "libc.so.6");  // a library, but not a driver
  EXPECT_EQ(other.status.code, kCudaNoDriver);
  EXPECT_NE(other.status.text.find("cuInit"), std::string::npos) << other.status.text;
  for (const auto& [setting, code] : {std::pair{"cuInit=100", 100},
                                      {"cuInit=803", 803},
                                      {"cuInit=999", 999},
                                      {"cuInit=0 devices=0", 100},
                                      {"devices=1 cuDevicePrimaryCtxRetain=2", 2}}) {
    FakeCudaSet(setting);
    const auto device = CudaDevice::Open("");
    EXPECT_EQ(device.status.code, code) << setting;
    EXPECT_NE(device.status.text.find("CUDA " + std::to_string(code)), std::string::npos)
        << device.status.text;
  }
  FakeCudaReset();
  ExpectNothingHeld();
}

TEST_F(CudaDeviceTest, IsFoundByOrdinalAndUuid) {
  FakeCudaSet("devices=3");
  EXPECT_EQ(OpenDevice()->name(), "Fake 0 (GPU-00102030-4050-6070-8090-a0b0c0d0e0f0)");
  EXPECT_EQ(OpenDevice("2")->uuid().bytes[1], 0x12);
  EXPECT_EQ(OpenDevice("GPU-01112131-4151-6171-8191-a1b1c1d1e1f1")->uuid().bytes[0], 1);
  EXPECT_EQ(OpenDevice("MIG-01112131-4151-6171-8191-a1b1c1d1e1f1")->uuid().bytes[0], 1);
  EXPECT_EQ(OpenDevice("GPU-01112131-4151-6171-8191-A1B1C1D1E1F1")->uuid().bytes[0], 1);
  for (const char* wrong : {"3", "GPU-ff112131-4151-6171-8191-a1b1c1d1e1f1", "-1", "0x1"}) {
    const auto device = CudaDevice::Open(wrong);
    EXPECT_EQ(device.status.code, kCudaInvalidDevice);
    EXPECT_NE(device.status.text.find(wrong), std::string::npos);
    EXPECT_NE(device.status.text.find("1 is GPU-0111"), std::string::npos) << device.status.text;
  }
  ExpectNothingHeld();
}

TEST_F(CudaDeviceTest, HundredCyclesLeakNothing) {
  std::vector<std::byte> memory(8192);
  auto* const page = memory.data() + (4096 - reinterpret_cast<uintptr_t>(memory.data()) % 4096);
  for (int i = 0; i < 100; ++i) {
    const auto device = OpenDevice();
    const auto before = device->MemoryInfo();
    const auto pointer = device->Allocate(4 << 20);
    ASSERT_TRUE(pointer.ok());
    EXPECT_EQ(device->MemoryInfo().value.free_bytes, before.value.free_bytes - (4 << 20));
    ASSERT_TRUE(device->Register(page, 4096).ok());
    ASSERT_TRUE(CudaCopyEngine::Start(device, {}).ok());  // and ends
    device->Unregister(page);
    device->Free(pointer.value);
  }
  ExpectNothingHeld();
}

TEST_F(CudaDeviceTest, RefusesMoreThanThereIs) {
  FakeCudaSet("bytes=16777216");
  const auto device = OpenDevice();
  EXPECT_EQ(device->MemoryInfo().value.total_bytes, 16u << 20);
  EXPECT_EQ(device->Allocate(32 << 20).status.code, kCudaOutOfMemory);
  FakeCudaSet("cuMemAlloc=2");
  EXPECT_EQ(device->Allocate(2 << 20).status.code, kCudaOutOfMemory);
}

// Opens and closes the parent's handle a hundred times, then reads what is there and answers.
TEST(CudaDeviceChild, DISABLED_Opens) {
  CudaIpcHandle handle;
  const std::string hex = ChildParameter("HANDLE");
  for (size_t i = 0; i < sizeof(handle.bytes); ++i) {
    handle.bytes[i] = static_cast<uint8_t>(std::stoi(hex.substr(2 * i, 2), nullptr, 16));
  }
  const auto device = OpenDevice();
  for (int i = 0; i < 100; ++i) {
    const auto opened = device->Import(handle);
    ASSERT_TRUE(opened.ok()) << opened.status.text;
    device->Close(opened.value);
  }
  EXPECT_EQ(FakeCudaCount().imports, 0);
  const auto opened = device->Import(handle);
  ASSERT_TRUE(opened.ok());
  EXPECT_NE(std::to_string(opened.value), ChildParameter("ADDRESS"));
  EXPECT_TRUE(IsFilled(ReadDevice(device, opened.value + 4096, 100000), 7));
  std::vector<std::byte> answer(5000);
  Fill(answer, 8);
  WriteDevice(device, opened.value, answer);
  Say("written");
  ::pause();
}

TEST_F(CudaDeviceTest, AnotherProcessMapsTheMemory) {
  const auto device = OpenDevice();
  const auto pointer = device->Allocate(2 << 20);
  ASSERT_TRUE(pointer.ok());
  const auto handle = device->Export(pointer.value);
  ASSERT_TRUE(handle.ok());
  EXPECT_FALSE(device->Import(handle.value).ok());  // never in the exporter's process
  std::vector<std::byte> bytes(100000);
  Fill(bytes, 7);
  WriteDevice(device, pointer.value + 4096, bytes);
  std::string hex;
  for (const uint8_t b : handle.value.bytes) {
    hex += "0123456789abcdef"[b >> 4];
    hex += "0123456789abcdef"[b & 15];
  }
  ChildProcess child("CudaDeviceChild.DISABLED_Opens",
                     {{"HANDLE", hex}, {"ADDRESS", std::to_string(pointer.value)}});
  ASSERT_EQ(child.ReadLine(), "written");
  child.Kill();  // with the mapping open
  EXPECT_TRUE(IsFilled(ReadDevice(device, pointer.value, 5000), 8));
  device->Free(pointer.value);
}

}  // namespace
}  // namespace larder
