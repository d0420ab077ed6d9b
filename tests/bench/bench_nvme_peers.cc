// NvmeStore over other ways to keep blocks on a drive: RocksDB's BlobDB, a file a block, Redis; and
// Larder's HOST tier over Redis, which reads memory.
//
// Both sides hold the same blocks, write and read them in the same random order, and take turns:
// with all of them when they write, with a quarter when they read. No page cache helps either: the
// store, BlobDB and the files read with O_DIRECT.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <span>
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

constexpr int kRounds = 5;
constexpr uint64_t kRunBytes = uint64_t{384} << 20;
// Of reads from the drive: 0.1 s, and six times what is under way.
constexpr uint64_t kPortionBytes = uint64_t{96} << 20;
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

// What both sides took for the same blocks.
struct Seconds {
  double ours = 0;
  double peers = 0;
};

// A round: all blocks in an order of its own, in portions that the sides take in turn, so that a
// drive that becomes slower meanwhile is as slow to both. Who goes first changes with each portion.
absl::StatusOr<Seconds> Round(std::span<const uint32_t> blocks, size_t portion, bool write,
                              bool peer_first, NvmeSide& ours, NvmeSide& peer) {
  Seconds seconds;
  absl::Status status;
  for (size_t at = 0; at < blocks.size() && status.ok(); at += portion) {
    const auto part = blocks.subspan(at, std::min(portion, blocks.size() - at));
    const auto run = [&](NvmeSide& side) {
      return Timed([&] { status.Update(write ? side.Write(part) : side.Read(part)); });
    };
    if (peer_first) seconds.peers += run(peer);
    seconds.ours += run(ours);
    if (!peer_first) seconds.peers += run(peer);
    peer_first = !peer_first;
  }
  if (!status.ok()) return status;
  return seconds;
}

// One row: how much faster `ours` is.
absl::Status CompareRates(const std::string& name, const std::string& about, bool write,
                          uint64_t portion_bytes, const Goal& goal, const DriveOptions& options,
                          NvmeSide& ours, NvmeSide& peer) {
  std::vector<uint32_t> blocks = AllBlocks(options);
  std::mt19937 random(7);
  const double megabytes = static_cast<double>(blocks.size() * options.block_bytes) / 1e6;
  const size_t portion = portion_bytes / options.block_bytes;
  std::vector<double> ratios, our_rates, peer_rates;
  for (int round = 0; round < kRounds; ++round) {
    std::shuffle(blocks.begin(), blocks.end(), random);
    const auto took = Round(blocks, portion, write, round % 2 == 0, ours, peer);
    if (!took.ok()) return took.status();
    ratios.push_back(took->peers / took->ours);
    our_rates.push_back(megabytes / took->ours);
    peer_rates.push_back(megabytes / took->peers);
  }
  Print({name + options.suffix, Median(ratios), "x",
         absl::StrFormat("%s: %.0f MB/s; Larder: %.0f MB/s; %s", about, Median(peer_rates),
                         Median(our_rates), Range(ratios)),
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
    // What makes writes durable is done once, at the end of all.
    status = CompareRates(name, about, write, write ? kRunBytes : kPortionBytes,
                          GoalOf(peer_name, write, options.block_bytes), options, store, peer);
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
  // A worker looks up all that it wants.
  return CompareRates("host_read_over_redis", "Redis", /*write=*/false, kRunBytes,
                      {Goal::kAtLeast, 1, ""}, options, **host, **redis);
}

}  // namespace larder::bench
