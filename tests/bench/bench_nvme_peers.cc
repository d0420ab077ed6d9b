// NvmeStore over other ways to keep blocks on a drive: RocksDB's BlobDB, a file a block, Redis; and
// Larder's HOST tier over Redis, which reads memory.
//
// Both sides hold the same blocks, write and read them in the same random order, and take turns.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "bench.h"
#include "bench_nvme.h"
#include "child.h"
#include "daemon_fixture.h"
#include "nvme_side.h"

namespace larder::bench {
namespace {

constexpr int kPairs = 5;
constexpr uint64_t kRunBytes = uint64_t{384} << 20;
constexpr uint64_t kLargeBlock = uint64_t{1} << 20;

// Any side that keeps a few large reads under way gets all that the drive gives, and Redis asks
// none: what it has in memory, Larder has in HOST, which has a row of its own.
Goal GoalOf(const std::string& peer_name, bool write, uint64_t block_bytes) {
  if (write) return {Goal::kAtLeast, 1, ""};
  if (peer_name == "redis") return {Goal::kReport, 0, "memory against a drive"};
  if (block_bytes < kLargeBlock) return {Goal::kAtLeast, 1, ""};
  return {Goal::kAtLeast, 0.95, "the drive is the limit"};
}

std::vector<uint32_t> AllBlocks(const DriveOptions& options) {
  std::vector<uint32_t> blocks(kRunBytes / options.block_bytes);
  std::iota(blocks.begin(), blocks.end(), 0);
  return blocks;
}

// One row: how much faster `ours` is.
absl::Status CompareRates(const std::string& name, const std::string& about, bool write,
                          const Goal& goal, const DriveOptions& options, NvmeSide& ours,
                          NvmeSide& peer) {
  std::vector<uint32_t> blocks = AllBlocks(options);
  std::mt19937 random(7);
  absl::Status status;
  const double megabytes = static_cast<double>(blocks.size() * options.block_bytes) / 1e6;
  std::vector<double> ratios, our_rates, peer_rates;
  for (int pair = 0; pair < kPairs && status.ok(); ++pair) {
    std::shuffle(blocks.begin(), blocks.end(), random);
    const auto seconds = [&](NvmeSide& side) {
      return Timed([&] { status.Update(write ? side.Write(blocks) : side.Read(blocks)); });
    };
    double of_peer = pair % 2 == 0 ? seconds(peer) : 0;
    const double of_ours = seconds(ours);
    if (of_peer == 0) of_peer = seconds(peer);
    ratios.push_back(of_peer / of_ours);
    our_rates.push_back(megabytes / of_ours);
    peer_rates.push_back(megabytes / of_peer);
  }
  if (!status.ok()) return status;
  Print({name + options.suffix, Median(ratios), "x",
         absl::StrFormat("%s: %.0f MB/s; Larder: %.0f MB/s", about, Median(peer_rates),
                         Median(our_rates)),
         Median(ratios), goal},
        ratios);
  return absl::OkStatus();
}

absl::Status Compare(const std::string& peer_name, const std::string& about,
                     const DriveOptions& options, NvmeSide& store, NvmeSide& peer) {
  const std::vector<uint32_t> blocks = AllBlocks(options);
  absl::Status status = store.Write(blocks);
  status.Update(peer.Write(blocks));
  for (const bool write : {true, false}) {
    if (!status.ok()) return status;
    const std::string name = (write ? "nvme_write_over_" : "nvme_read_over_") + peer_name;
    status = CompareRates(name, about, write, GoalOf(peer_name, write, options.block_bytes),
                          options, store, peer);
  }
  return status;
}

}  // namespace

absl::Status MeasurePeers(const DaemonPlace& place, const DriveOptions& options) {
  const TemporaryFolder folder(place.folder);
  const Blocks blocks(options.block_bytes);
  NvmeStore::Options store_options;
  store_options.directory = folder.path() + "/store";
  store_options.bytes = kRunBytes;
  store_options.memory = blocks.all();
  auto opened = NvmeStore::Open(store_options);
  if (!opened.ok()) return opened.status();
  const std::unique_ptr<NvmeSide> store = MakeStoreSide(**opened, blocks);
  {
    auto blob = MakeBlobSide(folder.path() + "/blob", blocks);
    if (!blob.ok()) return blob.status();
    absl::Status status = Compare("blobdb", "BlobDB, no log, flushed", options, *store, **blob);
    if (!status.ok()) return status;
  }
  {
    const auto files = MakeFilesSide(folder.path() + "/files", blocks);
    absl::Status status = Compare("files", "a file a block, one syncfs", options, *store, *files);
    if (!status.ok()) return status;
  }
  auto redis = MakeRedisSide(folder.path() + "/redis", blocks, RedisSync::kEachSecond);
  if (absl::IsNotFound(redis.status())) {
    std::fprintf(stderr, "%s: no rows against it\n", std::string(redis.status().message()).c_str());
    return absl::OkStatus();
  }
  if (!redis.ok()) return redis.status();
  absl::Status status =
      Compare("redis", "Redis, AOF synced each second", options, *store, **redis);
  if (!status.ok()) return status;
  auto host = MakeHostSide(place, static_cast<uint32_t>(AllBlocks(options).size()), blocks);
  if (!host.ok()) return host.status();
  return CompareRates("host_read_over_redis", "Redis", /*write=*/false, {Goal::kAtLeast, 1, ""},
                      options, **host, **redis);
}

}  // namespace larder::bench
