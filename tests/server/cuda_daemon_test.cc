// The whole daemon over a fake CUDA device: workers are processes of their own, because CUDA opens
// an allocation only in other processes than its owner's.

#include <unistd.h>

#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "gtest/gtest.h"
#include "server/daemon.h"
#include "tests/storage/child_process.h"
#include "tests/storage/cuda_testing.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using namespace ::larder::testing;  // NOLINT: a test's own helpers

constexpr uint32_t kBlockTokens = 16;
constexpr uint32_t kBlockBytes = 64 << 10;
constexpr uint32_t kPromptBlocks = 32;
constexpr uint32_t kPrompts = 8;  // twice what fits into GPU

v1::ModelSpec Spec() {
  v1::ModelSpec spec;
  spec.set_name("cuda");
  spec.set_layers(4);
  spec.set_kv_heads(4);
  spec.set_head_dim(64);
  spec.set_dtype(v1::DTYPE_BF16);
  spec.set_block_tokens(kBlockTokens);
  return spec;
}

std::vector<uint32_t> TokensOf(uint32_t prompt) {
  std::vector<uint32_t> tokens(kPromptBlocks * kBlockTokens);
  for (size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = prompt * 100'000 + static_cast<uint32_t>(i);
  }
  return tokens;
}

uint64_t SeedOf(uint32_t prompt, uint32_t position) { return prompt * 1000 + position + 1; }

Config ConfigIn(const std::string& folder) {
  Config config;
  config.listen = {absl::StrCat("unix:", folder, "/larder.sock")};
  config.handover_socket = absl::StrCat(folder, "/handover.sock");
  config.gpu = GpuBackend::kCuda;
  config.gpu_devices = {"0"};
  config.gpu_bytes = kPrompts / 2 * kPromptBlocks * kBlockBytes;
  config.host_bytes = 4 * config.gpu_bytes;
  config.huge_pages = false;
  config.low_water = 0.25;
  config.log_level = LogLevel::kError;
  return config;
}

// A worker: its kernels are copies between the device and its own memory.
class Worker {
 public:
  explicit Worker(const std::string& folder)
      : client_(*Client::Connect(absl::StrCat("unix:", folder, "/larder.sock"))),
        model_(*client_.OpenModel(Spec())) {
    LARDER_CHECK(model_.block_bytes() == kBlockBytes, "the test's blocks");
    Attach();
  }

  void Attach() {
    auto session = client_.NewSession("worker");
    LARDER_CHECK(session.ok(), "attach");
    session_.emplace(*std::move(session));
    auto gpu = session_->Device(0);
    LARDER_CHECK(gpu.ok(), "the GPU arena opens");
    gpu_ = *gpu;
    device_ = OpenDevice(gpu_.device);
  }
  void Detach() { session_.reset(); }

  // Reserves in GPU, writes there, publishes; returns with the blocks on their way down.
  void Put(uint32_t prompt) {
    const std::vector<uint32_t> tokens = TokensOf(prompt);
    auto lease = session_->Lookup(model_, tokens);
    ASSERT_TRUE(lease.ok()) << lease.status();
    ASSERT_EQ(lease->end(), 0u);
    ASSERT_TRUE(lease->Reserve(kPromptBlocks, v1::TIER_GPU).ok());
    EXPECT_TRUE(absl::IsFailedPrecondition(lease->Reserved(0).status()));  // not for the CPU
    std::vector<std::byte> block(kBlockBytes);
    for (uint32_t i = 0; i < kPromptBlocks; ++i) {
      Fill(block, SeedOf(prompt, i));
      const auto address = lease->DeviceAddress(i);
      ASSERT_TRUE(address.ok()) << address.status();
      WriteDevice(device_, *address, block);
    }
    const auto put = lease->Put(tokens);
    ASSERT_TRUE(put.ok()) << put.status();
    ASSERT_TRUE(lease->Release().ok());
    AwaitIdle();
  }

  // Brings the prompt up to GPU and compares every byte. The lease, so that it may be held.
  std::optional<Lease> Check(uint32_t prompt) {
    auto lease = session_->Lookup(model_, TokensOf(prompt));
    EXPECT_TRUE(lease.ok()) << lease.status();
    if (!lease.ok()) return std::nullopt;
    EXPECT_EQ(lease->end(), kPromptBlocks) << prompt;
    PrefetchOptions options;
    options.tier = v1::TIER_GPU;
    const auto prefetched = lease->Prefetch(options);
    EXPECT_TRUE(prefetched.ok()) << prefetched.status();
    if (!prefetched.ok()) return std::nullopt;
    EXPECT_EQ(prefetched->ready_blocks, kPromptBlocks);
    for (uint32_t i = 0; i < lease->end(); ++i) {
      const BlockPlace& place = lease->places()[i];
      EXPECT_EQ(place.tier, v1::TIER_GPU) << i;
      EXPECT_EQ(lease->DeviceAddress(i).value_or(0), gpu_.address + place.offset);
      EXPECT_TRUE(IsFilled(ReadDevice(device_, gpu_.address + place.offset, kBlockBytes),
                           SeedOf(prompt, i)))
          << prompt << ", " << i;
    }
    return *std::move(lease);
  }

  void AwaitIdle() {
    while (client_.GetStatus()->moves_in_flight() > 0) std::this_thread::yield();
  }

  const Client& client() const { return client_; }
  const v1::Model& model() const { return model_; }
  Session& session() { return *session_; }

 private:
  const Client client_;
  const v1::Model model_;
  std::optional<Session> session_;
  DeviceArena gpu_;
  std::shared_ptr<CudaDevice> device_;
};

class CudaDaemon : public ::testing::Test {
 protected:
  CudaDaemon() { FakeCudaReset(); }
  ~CudaDaemon() override {
    daemon_.reset();
    FakeCudaReset();
  }
  void Start(const Config& config, DaemonHooks hooks = {}) {
    auto daemon = Daemon::Start(config, std::move(hooks));
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
    client_.emplace(*Client::Connect(config.listen[0]));
    model_ = *client_->OpenModel(Spec());
  }
  std::unique_ptr<ChildProcess> StartChild(const std::string& name, const std::string& fake = "") {
    return std::make_unique<ChildProcess>(
        absl::StrCat("CudaDaemonChild.DISABLED_", name),
        std::map<std::string, std::string>{{"FOLDER", folder_.path()}, {"FAKE_CUDA", fake}});
  }
  void PutAll() {
    auto worker = StartChild("Puts");
    EXPECT_EQ(worker->ReadLine(), "put");
    EXPECT_TRUE(worker->Join());
  }
  v1::TierStatus TierOf(v1::Tier tier) {
    const auto status = client_->GetStatus();
    for (const v1::TierStatus& each : status->tiers()) {
      if (each.tier() == tier) return each;
    }
    return {};
  }
  // Over the wire; how many blocks had the right bytes.
  uint32_t Download(uint32_t prompt, absl::Status* status) {
    std::string block;
    uint32_t right = 0;
    *status = client_->Download(model_.model_id(), TokensOf(prompt), 0, 0, absl::Seconds(30),
                                [&](const v1::DownloadChunk& chunk) {
                                  block += chunk.data();
                                  if (block.size() < kBlockBytes) return absl::OkStatus();
                                  right += IsFilled(std::as_bytes(std::span(block)),
                                                    SeedOf(prompt, chunk.position()));
                                  block.clear();
                                  return absl::OkStatus();
                                });
    return right;
  }

  TempDir folder_;
  std::unique_ptr<Daemon> daemon_;
  std::optional<Client> client_;
  v1::Model model_;
};

TEST(CudaDaemonChild, DISABLED_Puts) {
  Worker worker(ChildParameter("FOLDER"));
  for (uint32_t i = 0; i < kPrompts; ++i) worker.Put(i);
  worker.Detach();
  EXPECT_EQ(FakeCudaCount().imports, 0);
  Say("put");
}

TEST(CudaDaemonChild, DISABLED_Checks) {
  Worker worker(ChildParameter("FOLDER"));
  for (uint32_t i = 0; i < kPrompts; ++i) worker.Check(i);
  Say("checked");
}

TEST(CudaDaemonChild, DISABLED_Holds) {
  Worker worker(ChildParameter("FOLDER"));
  const std::optional<Lease> lease = worker.Check(0);
  ASSERT_TRUE(lease.has_value());
  Say("holds");
  ::pause();
}

TEST_F(CudaDaemon, WorkersShareBlocksInTheDevicesMemory) {
  Start(ConfigIn(folder_.path()));
  EXPECT_TRUE(absl::StrContains(daemon_->Summary(), "GPU cuda 8 MiB")) << daemon_->Summary();
  EXPECT_EQ(TierOf(v1::TIER_GPU).backend(), "cuda");
  EXPECT_EQ(TierOf(v1::TIER_GPU).health(), "OK");
  PutAll();
  EXPECT_GE(TierOf(v1::TIER_HOST).blocks(), kPrompts / 2 * kPromptBlocks);
  auto one = StartChild("Holds");
  EXPECT_EQ(one->ReadLine(), "holds");
  auto two = StartChild("Checks");
  EXPECT_EQ(two->ReadLine(), "checked");
  EXPECT_TRUE(two->Join());
  EXPECT_EQ(TierOf(v1::TIER_GPU).bytes_pinned(), kPromptBlocks * kBlockBytes);
  one->Kill();  // with the memory open and blocks pinned
  while (TierOf(v1::TIER_GPU).bytes_pinned() > 0) std::this_thread::yield();
  auto three = StartChild("Checks");
  EXPECT_EQ(three->ReadLine(), "checked");
  EXPECT_TRUE(three->Join());
}

TEST_F(CudaDaemon, TheWireReachesTheDevicesMemoryToo) {
  Start(ConfigIn(folder_.path()));
  PutAll();
  absl::Status status;
  for (uint32_t i = 0; i < kPrompts; ++i) {
    EXPECT_EQ(Download(i, &status), kPromptBlocks);
    EXPECT_TRUE(status.ok()) << status;
  }
  // More at once than there are buffers.
  std::vector<std::thread> readers;
  for (int i = 0; i < 12; ++i) {
    readers.emplace_back([this] {
      absl::Status ended;
      EXPECT_EQ(Download(kPrompts - 1, &ended), kPromptBlocks);
      EXPECT_TRUE(ended.ok()) << ended;
    });
  }
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(FakeCudaCount().pageable_copies, 0);  // each would have held up all others
}

// CUDA does not say what becomes of memory that others have open when its owner frees it.
TEST_F(CudaDaemon, MemoryThatAWorkerHasOpenIsLeftToTheProcessesEnd) {
  Start(ConfigIn(folder_.path()));
  PutAll();
  auto one = StartChild("Holds");
  EXPECT_EQ(one->ReadLine(), "holds");
  daemon_.reset();
  EXPECT_EQ(FakeCudaCount().allocations, 1);
  EXPECT_TRUE(CudaDevice::AnyAbandoned());  // and that end is _exit
}

TEST_F(CudaDaemon, NothingLeaksOverStartsAndEnds) {
  for (int i = 0; i < 3; ++i) {
    Start(ConfigIn(folder_.path()));
    EXPECT_EQ(FakeCudaCount().allocations, 1);
    EXPECT_EQ(FakeCudaCount().registrations, 2);  // HOST, and the reader's buffers
    daemon_.reset();
    const FakeCudaCounts counts = FakeCudaCount();
    EXPECT_EQ(counts.contexts + counts.allocations + counts.registrations + counts.streams +
                  counts.events,
              0);
  }
}

TEST_F(CudaDaemon, RunsWithoutADeviceThatIsMissingOrBroken) {
  for (const char* fault :
       {"cuInit=100", "cuInit=999", "cuInit=0 devices=0", "devices=1 cuDevicePrimaryCtxRetain=46",
        "cuDevicePrimaryCtxRetain=0 cuMemGetInfo=999", "cuMemGetInfo=0 cuIpcGetMemHandle=801",
        "cuIpcGetMemHandle=0 cuStreamCreate=999"}) {
    FakeCudaSet(fault);
    Start(ConfigIn(folder_.path()));
    EXPECT_TRUE(absl::StrContains(daemon_->Summary(), "(GPU none: ")) << daemon_->Summary();
    EXPECT_TRUE(absl::StartsWith(TierOf(v1::TIER_GPU).health(), "ABSENT: "))
        << TierOf(v1::TIER_GPU).health();
    std::vector<std::byte> data(kPromptBlocks * kBlockBytes);
    for (uint32_t i = 0; i < kPromptBlocks; ++i) {
      Fill(std::span(data).subspan(i * kBlockBytes, kBlockBytes), SeedOf(0, i));
    }
    ASSERT_TRUE(client_->Put(model_, {}, TokensOf(0), data).ok()) << fault;
    absl::Status status;
    EXPECT_EQ(Download(0, &status), kPromptBlocks);
    EXPECT_TRUE(status.ok()) << status;
    daemon_.reset();
    EXPECT_EQ(FakeCudaCount().allocations, 0) << fault;
  }
}

TEST_F(CudaDaemon, RefusesATierThatDoesNotFit) {
  FakeCudaSet("bytes=16777216");
  Config config = ConfigIn(folder_.path());
  config.gpu_reserve = 10 << 20;
  const absl::Status status = Daemon::Start(config).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  for (const char* part : {"gpu-bytes", "8388608", "has 16777216", "10485760", "gpu-reserve"}) {
    EXPECT_TRUE(absl::StrContains(status.message(), part)) << status;
  }
}

// The test itself is who holds it.
TEST_F(CudaDaemon, RunsWithoutMemoryThatOthersHold) {
  FakeCudaSet("bytes=16777216");
  const auto device = OpenDevice();
  const CudaPointer others = device->Allocate(10 << 20).value;
  Start(ConfigIn(folder_.path()), {.gpu_patience = absl::ZeroDuration()});
  EXPECT_TRUE(absl::StartsWith(TierOf(v1::TIER_GPU).health(),
                               "ABSENT: memory held by other processes: 6291456 are free"))
      << TierOf(v1::TIER_GPU).health();
  device->Free(others);
}

TEST_F(CudaDaemon, WaitsForMemoryThatOthersLetGo) {
  FakeCudaSet("bytes=16777216");
  const auto device = OpenDevice();
  const CudaPointer others = device->Allocate(10 << 20).value;
  std::atomic<bool> started = false;
  std::thread start([&] {
    Start(ConfigIn(folder_.path()), {.gpu_patience = absl::InfiniteDuration()});
    started = true;
  });
  while (FakeCudaCount().memory_queries < 2 && !started) std::this_thread::yield();
  device->Free(others);
  start.join();
  EXPECT_EQ(TierOf(v1::TIER_GPU).health(), "OK");
}

TEST_F(CudaDaemon, ADeviceThatIsLostCostsItsTierOnly) {
  Start(ConfigIn(folder_.path()));
  PutAll();
  FakeCudaSet("copy=719");
  PrefetchOptions up;
  up.tier = v1::TIER_GPU;
  for (uint32_t i = 0; i < kPrompts && TierOf(v1::TIER_GPU).health() == "OK"; ++i) {
    const auto prefetched = client_->Prefetch(model_.model_id(), TokensOf(i), up);
    ASSERT_TRUE(!prefetched.ok() || prefetched->unreadable_position.has_value() ||
                prefetched->ready_blocks == kPromptBlocks);
  }
  EXPECT_TRUE(absl::StartsWith(TierOf(v1::TIER_GPU).health(), "DEGRADED: lost"))
      << TierOf(v1::TIER_GPU).health();
  while (TierOf(v1::TIER_GPU).blocks() > 0) std::this_thread::yield();
  EXPECT_TRUE(absl::IsUnavailable(client_->Prefetch(model_.model_id(), TokensOf(0), up).status()));
  // What HOST has is served, and never a wrong byte.
  uint32_t served = 0;
  for (uint32_t i = 0; i < kPrompts; ++i) {
    const uint32_t cached =
        client_->Peek(model_.model_id(), TokensOf(i))->matched_tokens() / kBlockTokens;
    absl::Status status;
    EXPECT_EQ(Download(i, &status), cached);
    EXPECT_TRUE(status.ok()) << status;
    served += cached;
  }
  EXPECT_GE(served, kPrompts / 4 * kPromptBlocks);
  // New blocks go to HOST.
  std::vector<std::byte> data(kPromptBlocks * kBlockBytes);
  EXPECT_TRUE(client_->Put(model_, {}, TokensOf(100), data).ok());
}

TEST(CudaDaemonChild, DISABLED_RunsADaemon) {
  Config config = ConfigIn(ChildParameter("FOLDER"));
  config.nvme_dir = absl::StrCat(ChildParameter("FOLDER"), "/nvme");
  config.nvme_bytes = 64 << 20;
  auto daemon = Daemon::Start(config, {.gpu_patience = absl::ZeroDuration()});
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  Say((*daemon)->Summary());
  ::pause();
}

// Its workers hold the memory of a daemon that was killed until they close it: a device with room
// for one tier has none for the next daemon's. A lease keeps it open, since a kernel may be
// reading; without one it is closed with no call of the worker's.
TEST_F(CudaDaemon, AKilledDaemonsMemoryIsLetGoWithTheLastLease) {
  const std::string machine = absl::StrCat("bytes=12582912 machine=", ::getpid());
  const auto start_daemon = [&](const std::string& gpu) {
    auto daemon = StartChild("RunsADaemon", machine);
    const std::string summary = daemon->ReadLine().value_or("none");
    EXPECT_TRUE(absl::StrContains(summary, gpu)) << summary;
    return daemon;
  };
  auto daemon = start_daemon("(GPU cuda 8 MiB");
  Worker worker(folder_.path());
  worker.Put(0);
  std::optional<Lease> lease = worker.Check(0);
  ASSERT_TRUE(lease.has_value());
  ASSERT_TRUE(lease->Flush(absl::Seconds(30)).ok());
  daemon->Kill();
  while (worker.session().Alive()) std::this_thread::yield();
  EXPECT_TRUE(absl::IsUnavailable(worker.session().Device(0).status()));
  EXPECT_EQ(FakeCudaCount().imports, 1);
  start_daemon("(GPU none: memory held by other processes: ")->Kill();
  EXPECT_EQ(FakeCudaCount().imports, 1);
  lease.reset();
  while (FakeCudaCount().imports > 0) std::this_thread::yield();
  auto next = start_daemon("(GPU cuda 8 MiB");
  Worker again(folder_.path());  // the model is opened anew
  again.Check(0);
  next->Kill();  // nobody holds a lease
  while (FakeCudaCount().imports > 0) std::this_thread::yield();
  start_daemon("(GPU cuda 8 MiB");
}

}  // namespace
}  // namespace larder
