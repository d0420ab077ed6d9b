// NvmeStore over the drive: how much of it is left after records, checksums and group commits,
// and what that costs.
//
// A file that was written before. A run writes all of it, in random order, or reads 512 blocks of
// it. The store and raw io_uring take turns, each pair gives a ratio. Raw reads are of the store's
// own slot file, the same blocks in the same order; raw writes are to another file in the same
// folder. Everything is O_DIRECT, so no page cache helps either side.
#include "bench_nvme.h"

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <fstream>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "bench.h"
#include "child.h"
#include "daemon_fixture.h"
#include "nvme_side.h"

namespace larder::bench {
namespace {

constexpr size_t kReadBlocks = 512;
constexpr double kGiB = 1024.0 * 1024 * 1024;

// User and system seconds of this process.
double CpuSeconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) { return t.tv_sec + t.tv_usec / 1e6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// What this process has caused to be written to drives.
double WrittenBytes() {
  std::ifstream file("/proc/self/io");
  std::string name;
  double bytes = 0;
  while (file >> name >> bytes) {
    if (name == "write_bytes:") return bytes;
  }
  return 0;
}

// What a run of one side took.
struct Run {
  double seconds = 0;
  double cpu_seconds = 0;
  double written_bytes = 0;
};

Run Measured(const std::function<absl::Status()>& f, absl::Status& status) {
  const double cpu = CpuSeconds();
  const double written = WrittenBytes();
  Run run;
  run.seconds = Timed([&] { status.Update(f()); });
  run.cpu_seconds = CpuSeconds() - cpu;
  run.written_bytes = WrittenBytes() - written;
  return run;
}

struct Pairs {
  std::vector<double> ratios;  // of the rates
  std::vector<double> ours_mb_s, theirs_mb_s;
  std::vector<double> ours_cpu, theirs_cpu;  // seconds a GiB
  std::vector<double> ours_amplification;
};

class DriveBench {
 public:
  DriveBench(const DriveOptions& options, NvmeStore& store, const Blocks& blocks,
             std::unique_ptr<NvmeSide> raw_reads, std::unique_ptr<NvmeSide> raw_writes)
      : options_(options),
        opened_(store),
        store_(MakeStoreSide(store, blocks)),
        writer_blocks_(options.block_bytes),
        writer_(MakeStoreSide(store, writer_blocks_)),
        raw_reads_(std::move(raw_reads)),
        raw_writes_(std::move(raw_writes)) {}

  absl::Status Run();

 private:
  using Call = absl::Status (NvmeSide::*)(std::span<const uint32_t>);
  using Order = std::vector<uint32_t>;

  Order All();
  Order Random();
  Order Prefix();
  absl::Status Fill();
  absl::StatusOr<Pairs> Take(NvmeSide& raw, Call call, Order (DriveBench::*order)());
  absl::Status UnderWrites();
  void PrintRates(const std::string& name, const Pairs& pairs, Goal goal) const;

  const DriveOptions options_;
  NvmeStore& opened_;
  const std::unique_ptr<NvmeSide> store_;
  const Blocks writer_blocks_;
  const std::unique_ptr<NvmeSide> writer_;  // the store too, for what runs beside
  const std::unique_ptr<NvmeSide> raw_reads_;
  const std::unique_ptr<NvmeSide> raw_writes_;
  std::mt19937 random_{11};
};

DriveBench::Order DriveBench::All() {
  Order all(options_.blocks);
  std::iota(all.begin(), all.end(), 0);
  std::shuffle(all.begin(), all.end(), random_);
  return all;
}

DriveBench::Order DriveBench::Random() {
  Order some = All();
  some.resize(kReadBlocks);
  return some;
}

DriveBench::Order DriveBench::Prefix() {
  Order order(kReadBlocks);
  std::iota(order.begin(), order.end(), random_() % (options_.blocks - kReadBlocks));
  return order;
}

// The first write of a place is slower than those that follow.
absl::Status DriveBench::Fill() {
  Order all(options_.blocks);
  std::iota(all.begin(), all.end(), 0);
  absl::Status status = raw_writes_->Write(all);
  status.Update(store_->Write(all));
  return status;
}

// Who goes first changes, so that neither always finds the drive tired.
absl::StatusOr<Pairs> DriveBench::Take(NvmeSide& raw, Call call, Order (DriveBench::*order)()) {
  Pairs pairs;
  absl::Status status;
  for (int pair = 0; pair < options_.pairs; ++pair) {
    const Order blocks = (this->*order)();
    const auto bytes = static_cast<double>(blocks.size() * options_.block_bytes);
    const auto run = [&](NvmeSide& side) {
      return Measured([&] { return (side.*call)(blocks); }, status);
    };
    struct Run ours, theirs;
    if (pair % 2 == 0) theirs = run(raw);
    ours = run(*store_);
    if (pair % 2 != 0) theirs = run(raw);
    if (!status.ok()) return status;
    pairs.ratios.push_back(theirs.seconds / ours.seconds);
    pairs.ours_mb_s.push_back(bytes / 1e6 / ours.seconds);
    pairs.theirs_mb_s.push_back(bytes / 1e6 / theirs.seconds);
    pairs.ours_cpu.push_back(ours.cpu_seconds / (bytes / kGiB));
    pairs.theirs_cpu.push_back(theirs.cpu_seconds / (bytes / kGiB));
    pairs.ours_amplification.push_back(ours.written_bytes / bytes);
  }
  return pairs;
}

void DriveBench::PrintRates(const std::string& name, const Pairs& pairs, Goal goal) const {
  const double ratio = Median(pairs.ratios);
  Print({name + options_.suffix, ratio, "x",
         absl::StrFormat("raw io_uring: %.0f MB/s; store: %.0f MB/s; %s",
                         Median(pairs.theirs_mb_s), Median(pairs.ours_mb_s), Range(pairs.ratios)),
         ratio, goal},
        pairs.ratios);
}

// A prefix is restored alone, and while another thread writes as fast as the store takes it.
absl::Status DriveBench::UnderWrites() {
  std::vector<double> ratios, writes_mb_s;
  for (int pair = 0; pair < options_.pairs; ++pair) {
    const Order prefix = Prefix();
    absl::Status status;
    const double alone = Measured([&] { return store_->Read(prefix); }, status).seconds;
    std::atomic<bool> stop = false;
    const uint64_t at_start = opened_.stats().written_bytes;
    absl::Status write_status;
    std::atomic<bool> writes = true;
    std::thread writer([&] {
      // Blocks that the prefix does not have, as many at a time as the store may have accepted.
      Order others = All();
      std::erase_if(others, [&](uint32_t b) { return b >= prefix.front() && b <= prefix.back(); });
      while (!stop && write_status.ok()) write_status = writer_->Write(others);
      writes = false;
    });
    while (opened_.stats().written_bytes == at_start && writes) std::this_thread::yield();
    const uint64_t before = opened_.stats().written_bytes;
    const double under = Measured([&] { return store_->Read(prefix); }, status).seconds;
    writes_mb_s.push_back(static_cast<double>(opened_.stats().written_bytes - before) / 1e6 /
                          under);
    stop = true;
    writer.join();
    status.Update(write_status);
    if (!status.ok()) return status;
    ratios.push_back(under / alone);
  }
  Print({"nvme_read_under_writes" + options_.suffix,
         Median(ratios),
         "x",
         absl::StrFormat("the same reads alone; beside them %.0f MB/s of writes",
                         Median(writes_mb_s)),
         Median(ratios),
         {Goal::kAtMost, 1.25, ""}},
        ratios);
  return absl::OkStatus();
}

absl::Status DriveBench::Run() {
  absl::Status status = Fill();
  if (!status.ok()) return status;
  const auto writes = Take(*raw_writes_, &NvmeSide::Write, &DriveBench::All);
  if (!writes.ok()) return writes.status();
  PrintRates("nvme_write_over_raw", *writes, {Goal::kAtLeast, 0.9, ""});
  const double amplification = Median(writes->ours_amplification);
  Print({"nvme_write_amplification" + options_.suffix,
         amplification,
         "x",
         "the payload, by /proc/self/io",
         amplification,
         {Goal::kAtMost, 1.03, ""}},
        writes->ours_amplification);
  const auto reads = Take(*raw_reads_, &NvmeSide::Read, &DriveBench::Random);
  if (!reads.ok()) return reads.status();
  PrintRates("nvme_read_over_raw", *reads, {Goal::kAtLeast, 0.9, ""});
  const auto prefixes = Take(*raw_reads_, &NvmeSide::Read, &DriveBench::Prefix);
  if (!prefixes.ok()) return prefixes.status();
  PrintRates("nvme_read_prefix_over_raw", *prefixes, {Goal::kAtLeast, 0.9, ""});
  const double cpu = Median(reads->ours_cpu);
  const double raw_cpu = Median(reads->theirs_cpu);
  Print({"nvme_cpu_s_per_gib" + options_.suffix,
         cpu,
         "s",
         absl::StrFormat("raw io_uring: %.3f s", raw_cpu),
         cpu / raw_cpu,
         {Goal::kAtMost, 0.15, ""}},
        reads->ours_cpu);
  return UnderWrites();
}

}  // namespace

absl::Status MeasureDrive(const std::string& parent, const DriveOptions& options) {
  const TemporaryFolder folder(parent);
  const Blocks blocks(options.block_bytes);
  NvmeStore::Options store_options;
  store_options.directory = folder.path() + "/store";
  store_options.bytes = options.blocks * options.block_bytes;
  store_options.memory = blocks.all();
  auto store = NvmeStore::Open(store_options);
  if (!store.ok()) return store.status();
  std::fprintf(stderr, "nvme by %s\n", (*store)->io().c_str());
  absl::Status status = (*store)->Scan([](Slot, uint32_t, const BlockRecord&) { return true; });
  if (!status.ok()) return status;
  auto raw_reads = MakeRawSide(store_options.directory + "/slots", blocks);
  if (!raw_reads.ok()) return raw_reads.status();
  auto raw_writes = MakeRawSide(folder.path() + "/raw", blocks);
  if (!raw_writes.ok()) return raw_writes.status();
  return DriveBench(options, **store, blocks, *std::move(raw_reads), *std::move(raw_writes)).Run();
}

}  // namespace larder::bench

int main(int argc, char** argv) {
  using namespace larder::bench;
  std::vector<std::string> names(argv + 1, argv + argc);
  const DaemonPlace place = {TakeFlag(names, "larderd", "larderd"),
                             TakeFlag(names, "directory", ".")};
  const std::string& folder = place.folder;
  const DriveOptions large{uint64_t{2} << 20, 1024, 5, ""};
  const DriveOptions small{uint64_t{192} << 10, 4096, 15, "_192k"};
  std::vector<Benchmark> all;
  for (const DriveOptions& options : {large, small}) {
    const auto named = [&](std::vector<std::string> names) {
      for (std::string& name : names) name += options.suffix;
      return names;
    };
    all.push_back(
        {named({"nvme_write_over_raw", "nvme_write_amplification", "nvme_read_over_raw",
                "nvme_read_prefix_over_raw", "nvme_cpu_s_per_gib", "nvme_read_under_writes"}),
         [=] { return MeasureDrive(folder, options); }});
  }
  for (const DriveOptions& options : {large, small}) {
    std::vector<std::string> names;
    for (const char* peer : {"blobdb", "files", "redis"}) {
      for (const char* what : {"nvme_write_over_", "nvme_read_over_"}) {
        names.push_back(std::string(what) + peer + options.suffix);
      }
    }
    names.push_back(std::string("host_read_over_redis") + options.suffix);
    all.push_back({names, [=] { return MeasurePeers(place, options); }});
  }
  all.push_back({{"nvme_restart_over_redis"}, [=] { return MeasureRestart(place); }});
  all.push_back(
      {{"nvme_recover_1m_s", "nvme_bytes_per_slot"}, [=] { return MeasureIndex(folder); }});
  return RunBenchmarks(names, all);
}
