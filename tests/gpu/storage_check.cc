// storage_check: what the GPU tier asks of a device, bit for bit. Exits 0 when all of it holds.
//
//   storage_check [DEVICE]     DEVICE: a number or a UUID, as in larderd --gpu=cuda:DEVICE
//
// Blocks of 2 MiB and 192 KiB go to the device and back in batches, both ways at once, and every
// word is compared. A second process (this program again) opens the memory by its IPC handle, reads
// it and writes it; handles that must not open do not.
#include <spawn.h>
#include <sys/wait.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tests/gpu/storage_memory.h"

extern char** environ;

namespace larder::gpu {
namespace {

constexpr uint64_t kBytes = 64 << 20;

// The 64-bit word at `index` of what `seed` stands for.
uint64_t Word(uint64_t seed, uint64_t index) {
  uint64_t x = seed * 0x9e37'79b9'7f4a'7c15 + index;
  x = (x ^ (x >> 30)) * 0xbf58'476d'1ce4'e5b9;
  return x ^ (x >> 27);
}

void Fill(std::byte* at, uint64_t bytes, uint64_t seed) {
  for (uint64_t i = 0; i < bytes / 8; ++i) {
    const uint64_t word = Word(seed, i);
    std::memcpy(at + 8 * i, &word, 8);
  }
}

uint64_t WrongWords(const std::byte* at, uint64_t bytes, uint64_t seed) {
  uint64_t wrong = 0;
  for (uint64_t i = 0; i < bytes / 8; ++i) {
    const uint64_t word = Word(seed, i);
    wrong += std::memcmp(at + 8 * i, &word, 8) != 0;
  }
  return wrong;
}

bool Report(const std::string& what, uint64_t wrong) {
  std::printf("%-40s %s (%llu wrong)\n", what.c_str(), wrong == 0 ? "ok" : "FAILED",
              static_cast<unsigned long long>(wrong));
  return wrong == 0;
}

// Block i of the device is block order[i] of the host. Round r writes one half of the memory and
// reads back at the same time what round r - 1 wrote to the other.
bool CheckBlocks(const std::shared_ptr<CudaDevice>& device, uint64_t block_bytes) {
  constexpr uint64_t kBatch = 4;
  const uint64_t blocks = kBytes / block_bytes;
  const CudaPointer memory = Must(device->Allocate(2 * kBytes), "allocate");
  const PinnedMemory up(device, kBytes);
  const PinnedMemory down(device, kBytes);
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), std::mt19937_64(block_bytes));
  auto engine = Must(CudaCopyEngine::Start(device, {}), "engine");
  uint64_t wrong = 0;
  for (uint64_t round = 0; round < 5; ++round) {
    const CudaPointer to = memory + round % 2 * kBytes;
    const CudaPointer from = memory + (round + 1) % 2 * kBytes;
    Fill(up.data(), blocks * block_bytes, round);
    std::memset(down.data(), 0, kBytes);
    Pending pending;
    for (uint64_t first = 0; first < blocks; first += kBatch) {
      CudaCopyEngine::Batch there;
      CudaCopyEngine::Batch back;
      for (uint64_t i = first; i < std::min(first + kBatch, blocks); ++i) {
        there.push_back({to + i * block_bytes, up.data() + order[i] * block_bytes, block_bytes});
        back.push_back({from + i * block_bytes, down.data() + order[i] * block_bytes, block_bytes});
      }
      engine->Copy(CudaCopyEngine::kToDevice, std::move(there), pending.Add());
      if (round > 0) engine->Copy(CudaCopyEngine::kToHost, std::move(back), pending.Add());
    }
    pending.Wait();
    if (round > 0) wrong += WrongWords(down.data(), blocks * block_bytes, round - 1);
  }
  engine.reset();
  device->Free(memory);
  return Report("blocks of " + std::to_string(block_bytes >> 10) + " KiB, both ways", wrong);
}

std::string ToHex(const CudaIpcHandle& handle) {
  std::string text;
  for (const uint8_t b : handle.bytes) {
    text += "0123456789abcdef"[b >> 4];
    text += "0123456789abcdef"[b & 15];
  }
  return text;
}

CudaIpcHandle FromHex(const std::string& text) {
  CudaIpcHandle handle;
  for (size_t i = 0; i < sizeof(handle.bytes); ++i) {
    handle.bytes[i] = static_cast<uint8_t>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  }
  return handle;
}

// The second process: opens and closes a hundred times, reads seed 1, leaves seed 2.
int Import(const std::string& which, const std::string& hex) {
  const std::shared_ptr<CudaDevice> device = Must(CudaDevice::Open(which), "open");
  CudaPointer memory = 0;
  for (int i = 0; i < 100; ++i) {
    memory = Must(device->Import(FromHex(hex)), "import");
    if (i < 99) device->Close(memory);
  }
  const PinnedMemory host(device, kBytes);
  auto engine = Must(CudaCopyEngine::Start(device, {}), "engine");
  Pending pending;
  engine->Copy(CudaCopyEngine::kToHost, {{memory, host.data(), kBytes}}, pending.Add());
  pending.Wait();
  const bool right = Report("another process reads it", WrongWords(host.data(), kBytes, 1));
  Fill(host.data(), kBytes, 2);
  engine->Copy(CudaCopyEngine::kToDevice, {{memory, host.data(), kBytes}}, pending.Add());
  pending.Wait();
  engine.reset();
  device->Close(memory);
  const bool opened = device->Import(CudaIpcHandle{}).ok();
  return Report("a handle of zeros does not open", opened) && right ? 0 : 1;
}

bool RunImport(const std::string& which, const std::string& hex) {
  std::vector<std::string> words = {"/proc/self/exe", "--import", which, hex};
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  pid_t pid = 0;
  int status = 0;
  std::fflush(stdout);
  return ::posix_spawn(&pid, "/proc/self/exe", nullptr, nullptr, argv.data(), environ) == 0 &&
         ::waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

bool CheckIpc(const std::shared_ptr<CudaDevice>& device) {
  const CudaPointer memory = Must(device->Allocate(kBytes), "allocate");
  const CudaIpcHandle handle = Must(device->Export(memory), "export");
  const PinnedMemory host(device, kBytes);
  auto engine = Must(CudaCopyEngine::Start(device, {}), "engine");
  Pending pending;
  Fill(host.data(), kBytes, 1);
  engine->Copy(CudaCopyEngine::kToDevice, {{memory, host.data(), kBytes}}, pending.Add());
  pending.Wait();
  bool right = RunImport(FormatCudaUuid(device->uuid()), ToHex(handle));
  engine->Copy(CudaCopyEngine::kToHost, {{memory, host.data(), kBytes}}, pending.Add());
  pending.Wait();
  engine.reset();
  right = Report("what it wrote is seen here", WrongWords(host.data(), kBytes, 2)) && right;
  right = Report("its owner's process cannot open it", device->Import(handle).ok()) && right;
  device->Free(memory);
  return right;
}

int Main(const std::string& which) {
  const std::shared_ptr<CudaDevice> device = Must(CudaDevice::Open(which), "open");
  std::printf("%s\n", device->name().c_str());
  bool right = CheckBlocks(device, 2 << 20);
  right = CheckBlocks(device, 192 << 10) && right;
  right = CheckIpc(device) && right;
  return right ? 0 : 1;
}

}  // namespace
}  // namespace larder::gpu

int main(int argc, char** argv) {
  if (argc == 4 && std::string(argv[1]) == "--import") {
    return larder::gpu::Import(argv[2], argv[3]);
  }
  return larder::gpu::Main(argc > 1 ? argv[1] : "");
}
