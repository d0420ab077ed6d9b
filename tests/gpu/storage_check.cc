// storage_check: what the GPU tier asks of a device, bit for bit. Exits 0 when all of it holds.
//
//   storage_check [DEVICE [MIB]]    DEVICE: a number or a UUID, as in larderd --gpu=cuda:DEVICE
//                                   MIB: of the memory whose opening is timed, 8192 where not said
//
// Blocks of 2 MiB and 192 KiB go to the device and back in batches, both ways at once, from and to
// every kind of pages that HOST may have, and every word is compared. A second process (this
// program again) opens the memory by its IPC handle, reads it and writes it; handles that must not
// open do not. What CUDA does not promise is only told: lines that begin with "told".
#include <signal.h>
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
bool CheckBlocks(const std::shared_ptr<CudaDevice>& device, uint64_t block_bytes, Pages pages,
                 const std::string& name) {
  constexpr uint64_t kBatch = 4;
  const uint64_t blocks = kBytes / block_bytes;
  const CudaPointer memory = Must(device->Allocate(2 * kBytes), "allocate");
  const PinnedMemory up(device, kBytes, pages);
  const PinnedMemory down(device, kBytes, pages);
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
  std::printf("told: %.3f s to register a GiB of %s\n",
              down.registration_seconds() * (1 << 30) / kBytes, name.c_str());
  return Report("blocks of " + std::to_string(block_bytes >> 10) + " KiB, both ways, " + name,
                wrong);
}

bool CheckAllPages(const std::shared_ptr<CudaDevice>& device) {
  bool right = true;
  for (const auto& [pages, name] : kAllPages) {
    if (!HasPages(pages, kBytes)) {
      std::printf("told: there are no pages here of %s: %s\n", name, std::strerror(errno));
      continue;
    }
    right = CheckBlocks(device, 2 << 20, pages, name) && right;
    right = CheckBlocks(device, 192 << 10, pages, name) && right;
  }
  return right;
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

// This program again, in a process of its own; what it prints can be read.
class Self {
 public:
  explicit Self(std::vector<std::string> words, const std::vector<std::string>& by = {}) {
    char path[4096] = "";
    if (::readlink("/proc/self/exe", path, sizeof(path) - 1) < 0) std::exit(1);
    words.insert(words.begin(), path);
    words.insert(words.begin(), by.begin(), by.end());
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    int ends[2] = {};
    if (::pipe2(ends, O_CLOEXEC) != 0) std::exit(1);
    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
    std::fflush(stdout);
    if (::posix_spawnp(&pid_, argv[0], &actions, nullptr, argv.data(), environ) != 0) pid_ = -1;
    ::posix_spawn_file_actions_destroy(&actions);
    ::close(ends[1]);
    output_ = ::fdopen(ends[0], "r");
  }
  ~Self() { std::fclose(output_); }
  Self(const Self&) = delete;
  Self& operator=(const Self&) = delete;

  bool started() const { return pid_ > 0; }
  // Without the end of line; empty: it has ended.
  std::string ReadLine() {
    char line[512] = "";
    if (std::fgets(line, sizeof(line), output_) == nullptr) return "";
    return std::string(line, std::strcspn(line, "\n"));
  }
  // Prints what it has to say, waits for it; whether it exited with 0.
  bool Join() {
    for (std::string line = ReadLine(); !line.empty(); line = ReadLine()) std::puts(line.c_str());
    int status = 0;
    return pid_ > 0 && ::waitpid(pid_, &status, 0) == pid_ && WIFEXITED(status) &&
           WEXITSTATUS(status) == 0;
  }
  void Kill() {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }

 private:
  pid_t pid_ = -1;
  FILE* output_ = nullptr;
};

// Another process: opens, and ends without closing.
int Leave(const std::string& which, const std::string& hex) {
  Must(Must(CudaDevice::Open(which), "open")->Import(FromHex(hex)), "import");
  ::_exit(0);
}

// Another process: memory that begins with seed 3, until it is killed.
int Export(const std::string& which, uint64_t bytes) {
  const std::shared_ptr<CudaDevice> device = Must(CudaDevice::Open(which), "open");
  const CudaPointer memory = Must(device->Allocate(bytes), "allocate");
  const PinnedMemory host(device, kBytes);
  Fill(host.data(), kBytes, 3);
  auto engine = Must(CudaCopyEngine::Start(device, {}), "engine");
  Pending pending;
  engine->Copy(CudaCopyEngine::kToDevice, {{memory, host.data(), kBytes}}, pending.Add());
  pending.Wait();
  std::puts(ToHex(Must(device->Export(memory), "export")).c_str());
  std::fflush(stdout);
  while (true) ::pause();
}

double FreeGib(const CudaDevice& device) {
  return static_cast<double>(Must(device.MemoryInfo(), "memory").free_bytes) / (1 << 30);
}

// What is left of memory whose owner was killed while it was open here; and how long opening takes.
void TellOfADeadOwner(const std::shared_ptr<CudaDevice>& device, uint64_t bytes) {
  using Clock = std::chrono::steady_clock;
  const auto ms = [](Clock::time_point from) {
    return std::chrono::duration<double, std::milli>(Clock::now() - from).count();
  };
  Self owner({"--export", FormatCudaUuid(device->uuid()), std::to_string(bytes)});
  std::string hex = owner.ReadLine();
  while (!hex.empty() && hex.size() != 2 * sizeof(CudaIpcHandle)) hex = owner.ReadLine();
  if (hex.empty()) {
    std::puts("told: there is no room for it");
    return;
  }
  const CudaIpcHandle handle = FromHex(hex);
  const Clock::time_point opened = Clock::now();
  const CudaPointer memory = Must(device->Import(handle), "import");
  std::printf("told: %.1f ms to open %llu MiB\n", ms(opened),
              static_cast<unsigned long long>(bytes >> 20));
  const double before = FreeGib(*device);
  owner.Kill();
  const double killed = FreeGib(*device);
  const PinnedMemory host(device, kBytes);
  auto engine = Must(CudaCopyEngine::Start(device, {}), "engine");
  Pending pending;
  engine->Copy(CudaCopyEngine::kToHost, {{memory, host.data(), kBytes}}, pending.Add());
  pending.Wait();
  engine.reset();
  std::printf("told: after its owner's SIGKILL %llu words of it are wrong here\n",
              static_cast<unsigned long long>(WrongWords(host.data(), kBytes, 3)));
  const Clock::time_point closed = Clock::now();
  device->Close(memory);
  std::printf(
      "told: %.1f ms to close it; GiB free: %.2f open, %.2f its owner killed, %.2f closed\n",
      ms(closed), before, killed, FreeGib(*device));
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
  const std::vector<std::string> import = {"--import", FormatCudaUuid(device->uuid()),
                                           ToHex(handle)};
  std::vector<std::string> leave = import;
  leave[0] = "--leave";
  bool right = true;
  for (int i = 0; i < 5; ++i) right = Self(leave).Join() && right;
  right = Report("opened five times and left to the end of processes", !right);
  right = Self(import).Join() && right;
  engine->Copy(CudaCopyEngine::kToHost, {{memory, host.data(), kBytes}}, pending.Add());
  pending.Wait();
  engine.reset();
  right = Report("what it wrote is seen here", WrongWords(host.data(), kBytes, 2)) && right;
  right = Report("its owner's process cannot open it", device->Import(handle).ok()) && right;
  // Last: it may have written only a part.
  Self other(import, {"setpriv", "--reuid=65534", "--clear-groups"});
  const bool tried = other.started();
  std::printf("told: a process of another user %s open it\n", !tried         ? "was not there to"
                                                              : other.Join() ? "can"
                                                                             : "cannot");
  device->Free(memory);
  return right;
}

int Main(const std::string& which, uint64_t mib) {
  const auto start = std::chrono::steady_clock::now();
  const std::shared_ptr<CudaDevice> device = Must(CudaDevice::Open(which), "open");
  const std::chrono::duration<double> opening = std::chrono::steady_clock::now() - start;
  std::printf("%s\ntold: %.3f s to its context\n", device->name().c_str(), opening.count());
  bool right = CheckAllPages(device);
  right = CheckIpc(device) && right;
  if (right) TellOfADeadOwner(device, mib << 20);
  return right ? 0 : 1;
}

}  // namespace
}  // namespace larder::gpu

int main(int argc, char** argv) {
  if (argc == 4 && std::string(argv[1]) == "--import") {
    return larder::gpu::Import(argv[2], argv[3]);
  }
  if (argc == 4 && std::string(argv[1]) == "--leave") return larder::gpu::Leave(argv[2], argv[3]);
  if (argc == 4 && std::string(argv[1]) == "--export") {
    return larder::gpu::Export(argv[2], std::strtoull(argv[3], nullptr, 10));
  }
  return larder::gpu::Main(argc > 1 ? argv[1] : "",
                           argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 8192);
}
