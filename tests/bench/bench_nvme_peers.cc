// NvmeStore over other ways to keep blocks on a drive: RocksDB's BlobDB, a file a block, Redis.
//
// The store and the peer hold the same blocks, write and read them in the same random order, and
// take turns.
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
#include "nvme_side.h"

namespace larder::bench {
namespace {

constexpr int kPairs = 5;
constexpr uint64_t kRunBytes = uint64_t{384} << 20;
constexpr uint64_t kLargeBlock = uint64_t{1} << 20;

// Any side that keeps a few large reads under way gets all that the drive gives, and Redis asks
// none: what it has in memory, Larder has in HOST.
Goal GoalOf(const std::string& peer_name, bool write, uint64_t block_bytes) {
  if (write) return {Goal::kAtLeast, 1, ""};
  if (peer_name == "redis") return {Goal::kReport, 0, "memory against a drive"};
  if (block_bytes < kLargeBlock) return {Goal::kAtLeast, 1, ""};
  return {Goal::kAtLeast, 0.95, "the drive is the limit"};
}

absl::Status Compare(const std::string& peer_name, const std::string& about,
                     const DriveOptions& options, NvmeSide& store, NvmeSide& peer) {
  std::vector<uint32_t> blocks(kRunBytes / options.block_bytes);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::mt19937 random(7);
  absl::Status status = store.Write(blocks);
  status.Update(peer.Write(blocks));
  const double megabytes = static_cast<double>(blocks.size() * options.block_bytes) / 1e6;
  for (const bool write : {true, false}) {
    std::vector<double> ratios, ours, theirs;
    for (int pair = 0; pair < kPairs && status.ok(); ++pair) {
      std::shuffle(blocks.begin(), blocks.end(), random);
      const auto seconds = [&](NvmeSide& side) {
        return Timed([&] { status.Update(write ? side.Write(blocks) : side.Read(blocks)); });
      };
      double of_peer = pair % 2 == 0 ? seconds(peer) : 0;
      const double of_store = seconds(store);
      if (of_peer == 0) of_peer = seconds(peer);
      ratios.push_back(of_peer / of_store);
      ours.push_back(megabytes / of_store);
      theirs.push_back(megabytes / of_peer);
    }
    if (!status.ok()) return status;
    Print(
        {absl::StrFormat("nvme_%s_over_%s%s", write ? "write" : "read", peer_name, options.suffix),
         Median(ratios), "x",
         absl::StrFormat("%s: %.0f MB/s; store: %.0f MB/s", about, Median(theirs), Median(ours)),
         Median(ratios), GoalOf(peer_name, write, options.block_bytes)},
        ratios);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status MeasurePeers(const std::string& parent, const DriveOptions& options) {
  const TemporaryFolder folder(parent);
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
  auto redis = MakeRedisSide(folder.path() + "/redis", blocks);
  if (absl::IsNotFound(redis.status())) {
    std::fprintf(stderr, "%s: no rows against it\n", std::string(redis.status().message()).c_str());
    return absl::OkStatus();
  }
  if (!redis.ok()) return redis.status();
  return Compare("redis", "Redis, AOF synced each second", options, *store, **redis);
}

}  // namespace larder::bench
