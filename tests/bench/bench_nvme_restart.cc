// A restore after a restart: Larder's NVMe tier over Redis, like for like, since both begin with
// nothing in memory.
//
// Each keeps the same 1,024 blocks of 2 MiB, put as two prompts and durable before the server is
// killed. Then it is started again, and the time is from there until 512 blocks, the second
// prompt, have been compared with what was put. Redis keeps an append-only file, synced at every
// write, as Larder's Flush is, and is ready when it has read all of it; its file may be in the
// page cache, Larder reads the drive. The sides take turns.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "bench.h"
#include "bench_nvme.h"
#include "child.h"
#include "daemon_fixture.h"
#include "nvme_side.h"

namespace larder::bench {
namespace {

constexpr uint64_t kBlock = uint64_t{2} << 20;
constexpr uint32_t kPromptBlocks = 512;
constexpr uint32_t kPrompts = 2;
constexpr int kRounds = 3;

std::vector<uint32_t> TokensOf(uint32_t prompt) {
  std::mt19937 random(prompt);
  std::vector<uint32_t> tokens(kPromptBlocks * kBlockTokens);
  for (uint32_t& token : tokens) token = random() % 128'000;
  return tokens;
}

std::vector<uint32_t> BlocksOf(uint32_t prompt) {
  std::vector<uint32_t> blocks(kPromptBlocks);
  std::iota(blocks.begin(), blocks.end(), prompt * kPromptBlocks);
  return blocks;
}

absl::Status Compare(std::span<const std::byte> read, std::span<const std::byte> put,
                     uint32_t block) {
  if (std::equal(read.begin(), read.end(), put.begin(), put.end())) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat("block ", block, " is not what was put"));
}

// A larderd on a folder of its own, and a worker.
class Restarted {
 public:
  Restarted(const DaemonPlace& place, const std::string& folder)
      : larderd_(place.larderd), folder_(folder), address_("unix:" + folder + "/larder.sock") {}

  absl::Status Start() {
    auto daemon =
        Child::Start({larderd_, "--listen=" + address_, "--host-bytes=1536MiB",
                      "--nvme-dir=" + folder_ + "/nvme", "--nvme-bytes=3GiB", "--log-level=error"});
    if (!daemon.ok()) return daemon.status();
    daemon_ = *std::move(daemon);
    auto client = Client::Connect(address_);
    if (!client.ok()) return client.status();
    client_ = *std::move(client);
    auto model = client_->OpenModel(BenchSpec(kBlock));
    if (!model.ok()) return model.status();
    model_ = *std::move(model);
    auto session = client_->NewSession("bench");
    if (!session.ok()) return session.status();
    session_ = *std::move(session);
    return absl::OkStatus();
  }

  void Kill() {
    daemon_->Kill();
    session_.reset();
    client_.reset();
    daemon_.reset();
  }

  absl::Status Put(uint32_t prompt, const Blocks& from) {
    const std::vector<uint32_t> tokens = TokensOf(prompt);
    auto lease = session_->Lookup(model_, tokens);
    if (!lease.ok()) return lease.status();
    if (auto status = lease->Reserve(kPromptBlocks, v1::TIER_HOST); !status.ok()) return status;
    for (uint32_t i = 0; i < kPromptBlocks; ++i) {
      const auto to = lease->Reserved(i);
      if (!to.ok()) return to.status();
      std::memcpy(to->data(), from.From(prompt * kPromptBlocks + i).data(), kBlock);
    }
    if (const auto put = lease->Put(tokens); !put.ok()) return put.status();
    if (const auto flushed = lease->Flush(absl::Minutes(1)); !flushed.ok()) return flushed.status();
    return lease->Release();
  }

  absl::Status Check(uint32_t prompt, const Blocks& put) {
    auto lease = session_->Lookup(model_, TokensOf(prompt));
    if (!lease.ok()) return lease.status();
    PrefetchOptions options;
    options.tier = v1::TIER_HOST;
    const auto ready = lease->Prefetch(options);
    if (!ready.ok()) return ready.status();
    if (ready->ready_blocks != kPromptBlocks) {
      return absl::DataLossError(absl::StrCat(ready->ready_blocks, " blocks were restored"));
    }
    absl::Status status;
    for (uint32_t i = 0; i < kPromptBlocks && status.ok(); ++i) {
      const auto block = lease->Block(i);
      if (!block.ok()) return block.status();
      const uint32_t number = prompt * kPromptBlocks + i;
      status = Compare(*block, put.From(number), number);
    }
    return status;
  }

 private:
  const std::string larderd_, folder_, address_;
  // In this order, so that the worker leaves before the daemon goes.
  std::unique_ptr<Child> daemon_;
  std::optional<Client> client_;
  std::optional<Session> session_;
  v1::Model model_;
};

// Waits while Redis reads its file, then compares each of the blocks.
absl::Status CheckRedis(NvmeSide& redis, std::span<const uint32_t> blocks, const Blocks& put,
                        const Blocks& read) {
  absl::Status status;
  while (absl::StrContains((status = redis.Read(blocks.first(1))).message(), "LOADING")) {
    absl::SleepFor(absl::Milliseconds(5));
  }
  for (size_t at = 0; at < blocks.size() && status.ok(); at += read.read_count()) {
    const auto part = blocks.subspan(at, std::min<size_t>(read.read_count(), blocks.size() - at));
    status = redis.Read(part);
    for (const uint32_t block : part)
      status.Update(Compare(read.To(block), put.From(block), block));
  }
  return status;
}

}  // namespace

absl::Status MeasureRestart(const DaemonPlace& place) {
  const TemporaryFolder folder(place.folder);
  const Blocks put(kBlock);
  const Blocks read(kBlock);
  const auto start_redis = [&](const Blocks& blocks) {
    return MakeRedisSide(folder.path() + "/redis", blocks, RedisSync::kAlways);
  };
  auto redis = start_redis(put);
  if (absl::IsNotFound(redis.status())) {
    std::fprintf(stderr, "%s: no row against it\n", std::string(redis.status().message()).c_str());
    return absl::OkStatus();
  }
  if (!redis.ok()) return redis.status();
  Restarted larder(place, folder.path());
  absl::Status status = larder.Start();
  for (uint32_t prompt = 0; prompt < kPrompts && status.ok(); ++prompt) {
    status = larder.Put(prompt, put);
    status.Update((*redis)->Write(BlocksOf(prompt)));
  }
  const uint32_t wanted = kPrompts - 1;
  const std::vector<uint32_t> blocks = BlocksOf(wanted);
  std::vector<double> ratios, ours, theirs;
  for (int round = 0; round < kRounds && status.ok(); ++round) {
    (*redis)->Kill();
    theirs.push_back(Timed([&] {
      redis = start_redis(read);
      status.Update(redis.ok() ? CheckRedis(**redis, blocks, put, read) : redis.status());
    }));
    larder.Kill();
    ours.push_back(Timed([&] {
      if (status.ok()) status = larder.Start();
      if (status.ok()) status = larder.Check(wanted, put);
    }));
    ratios.push_back(theirs.back() / ours.back());
  }
  if (!status.ok()) return status;
  Print({"nvme_restart_over_redis", Median(ratios), "x",
         absl::StrFormat("Redis, AOF synced at each write: %.2f s; Larder: %.2f s, to %u of %u MiB",
                         Median(theirs), Median(ours), kPromptBlocks * (kBlock >> 20),
                         kPrompts * kPromptBlocks * (kBlock >> 20)),
         Median(ratios), Goal{Goal::kAtLeast, 1, ""}},
        ratios);
  return absl::OkStatus();
}

}  // namespace larder::bench
