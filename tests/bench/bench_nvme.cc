// NvmeStore over raw reads and writes: how much of the drive is left after records, checksums
// and group commits.
//
// Both sides have as many I/O threads, blocks of the same size in the same order, O_DIRECT, and a
// file in the same folder that has been written before. Raw writes end with one fdatasync; the
// store's are durable one by one. Store and raw take turns, and each pair gives a ratio.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <thread>

#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"
#include "bench.h"
#include "child.h"
#include "storage/check.h"
#include "storage/nvme_store.h"
#include "storage/unique_fd.h"

namespace larder::bench {
namespace {

constexpr int kThreads = 4;
constexpr int kInFlight = 64;  // what the store may have accepted and not completed
constexpr uint64_t kFileBytes = uint64_t{512} << 20;
constexpr int kPairs = 7;

// Memory for kInFlight blocks, aligned as O_DIRECT wants it.
class Buffers {
 public:
  explicit Buffers(uint64_t block_bytes) : block_bytes_(block_bytes) {
    base_ = static_cast<std::byte*>(::mmap(nullptr, block_bytes * kInFlight, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    LARDER_CHECK(base_ != MAP_FAILED);
    std::mt19937_64 random(3);
    for (uint64_t at = 0; at < block_bytes * kInFlight; at += sizeof(uint64_t)) {
      const uint64_t word = random();
      std::memcpy(base_ + at, &word, sizeof(word));
    }
  }
  ~Buffers() { ::munmap(base_, block_bytes_ * kInFlight); }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  std::span<std::byte> At(uint64_t i) const {
    return {base_ + i % kInFlight * block_bytes_, block_bytes_};
  }

 private:
  const uint64_t block_bytes_;
  std::byte* base_;
};

struct Side {
  virtual ~Side() = default;
  // Each writes or reads every block once, in the given order.
  virtual absl::Status Write(const std::vector<uint32_t>& order) = 0;
  virtual absl::Status Read(const std::vector<uint32_t>& order) = 0;
};

class RawSide final : public Side {
 public:
  RawSide(const std::string& path, const Buffers& buffers)
      : fd_(::open(path.c_str(), O_RDWR | O_CREAT | O_DIRECT | O_CLOEXEC, 0600)),
        buffers_(buffers) {}

  absl::Status Write(const std::vector<uint32_t>& order) override {
    if (!fd_) return absl::UnavailableError("the folder's file system has no O_DIRECT");
    absl::Status status = InThreads(order, [&](uint64_t i, uint64_t offset) {
      const std::span<std::byte> block = buffers_.At(i);
      return ::pwrite(fd_.get(), block.data(), block.size(), static_cast<off_t>(offset));
    });
    if (status.ok() && ::fdatasync(fd_.get()) != 0) status = absl::UnavailableError("fdatasync");
    return status;
  }

  absl::Status Read(const std::vector<uint32_t>& order) override {
    return InThreads(order, [&](uint64_t i, uint64_t offset) {
      const std::span<std::byte> block = buffers_.At(i);
      return ::pread(fd_.get(), block.data(), block.size(), static_cast<off_t>(offset));
    });
  }

 private:
  absl::Status InThreads(const std::vector<uint32_t>& order,
                         const std::function<ssize_t(uint64_t, uint64_t)>& f) const {
    std::atomic<uint64_t> next = 0;
    std::atomic<bool> failed = false;
    std::vector<std::thread> threads;
    const uint64_t block_bytes = buffers_.At(0).size();
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&] {
        for (uint64_t i = next++; i < order.size(); i = next++) {
          if (f(i, order[i] * block_bytes) != static_cast<ssize_t>(block_bytes)) failed = true;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    return failed ? absl::UnavailableError("a raw read or write failed") : absl::OkStatus();
  }

  const UniqueFd fd_;
  const Buffers& buffers_;
};

class StoreSide final : public Side {
 public:
  StoreSide(NvmeStore& store, const Buffers& buffers) : store_(store), buffers_(buffers) {}

  absl::Status Write(const std::vector<uint32_t>& order) override {
    return All(order, [&](uint32_t block, std::span<std::byte> bytes, NvmeStore::DoneFn done) {
      store_.Write(SlotOf(block), bytes, RecordOf(block), std::move(done));
    });
  }

  absl::Status Read(const std::vector<uint32_t>& order) override {
    return All(order, [&](uint32_t block, std::span<std::byte> bytes, NvmeStore::DoneFn done) {
      store_.Read(SlotOf(block), bytes, RecordOf(block), std::move(done));
    });
  }

 private:
  Slot SlotOf(uint32_t block) const { return Slot::AtOffset(block * buffers_.At(0).size()); }

  static BlockRecord RecordOf(uint32_t block) {
    BlockRecord record;
    std::memcpy(record.key.bytes.data(), &block, sizeof(block));
    record.key.bytes[31] = 1;
    record.model_id = 1;
    return record;
  }

  // A buffer belongs to its operation until done: completions come in any order.
  absl::Status All(
      const std::vector<uint32_t>& order,
      const std::function<void(uint32_t, std::span<std::byte>, NvmeStore::DoneFn)>& start) {
    absl::Mutex mu;
    absl::Status result;
    std::vector<uint64_t> free(kInFlight);
    std::iota(free.begin(), free.end(), 0);
    for (const uint32_t block : order) {
      mu.LockWhen(absl::Condition(
          +[](std::vector<uint64_t>* f) { return !f->empty(); }, &free));
      const uint64_t buffer = free.back();
      free.pop_back();
      mu.Unlock();
      start(block, buffers_.At(buffer), [&, buffer](const absl::Status& status) {
        const absl::MutexLock lock(&mu);
        result.Update(status);
        free.push_back(buffer);
      });
    }
    const absl::MutexLock lock(&mu);
    mu.Await(absl::Condition(
        +[](std::vector<uint64_t>* f) { return f->size() == kInFlight; }, &free));
    return result;
  }

  NvmeStore& store_;
  const Buffers& buffers_;
};

struct Rates {
  std::vector<double> store_mb_s;
  std::vector<double> raw_mb_s;
  std::vector<double> ratios;
};

using Work = absl::Status (Side::*)(const std::vector<uint32_t>&);

absl::Status Pairs(Side& store, Side& raw, Work work, std::vector<uint32_t> order,
                   uint64_t block_bytes, Rates& rates) {
  std::mt19937 random(11);
  const double megabytes = static_cast<double>(order.size() * block_bytes) / 1e6;
  for (int pair = 0; pair < kPairs; ++pair) {
    std::shuffle(order.begin(), order.end(), random);
    absl::Status status;
    const auto rate = [&](Side& side) {
      return megabytes / Timed([&] { status.Update((side.*work)(order)); });
    };
    // Who goes first changes, so that neither always finds the drive tired.
    double raw_rate = pair % 2 == 0 ? rate(raw) : 0;
    const double store_rate = rate(store);
    if (raw_rate == 0) raw_rate = rate(raw);
    if (!status.ok()) return status;
    rates.store_mb_s.push_back(store_rate);
    rates.raw_mb_s.push_back(raw_rate);
    rates.ratios.push_back(store_rate / raw_rate);
  }
  return absl::OkStatus();
}

void PrintRates(const std::string& name, const Rates& rates) {
  Print({name,
         Median(rates.ratios),
         "x",
         absl::StrFormat("%d threads, raw: %.0f MB/s; store: %.0f MB/s", kThreads,
                         Median(rates.raw_mb_s), Median(rates.store_mb_s)),
         Median(rates.ratios),
         {}},
        rates.ratios);
}

absl::Status Measure(const std::string& parent, uint64_t block_bytes, const std::string& suffix) {
  const TemporaryFolder folder(parent);
  NvmeStore::Options options;
  options.directory = folder.path() + "/store";
  options.bytes = kFileBytes;
  options.io_threads = kThreads;
  absl::StatusOr<std::unique_ptr<NvmeStore>> store = NvmeStore::Open(options);
  if (!store.ok()) return store.status();
  absl::Status status = (*store)->Scan([](Slot, uint32_t, const BlockRecord&) { return true; });
  if (!status.ok()) return status;
  const Buffers buffers(block_bytes);
  StoreSide store_side(**store, buffers);
  RawSide raw_side(folder.path() + "/raw", buffers);
  std::vector<uint32_t> order(kFileBytes / block_bytes);
  std::iota(order.begin(), order.end(), 0);
  // The first write of a place is slower than those that follow.
  status = raw_side.Write(order);
  status.Update(store_side.Write(order));
  Rates writes;
  status.Update(Pairs(store_side, raw_side, &Side::Write, order, block_bytes, writes));
  if (!status.ok()) return status;
  PrintRates("nvme_write_over_raw" + suffix, writes);
  Rates reads;
  status.Update(Pairs(store_side, raw_side, &Side::Read, order, block_bytes, reads));
  if (!status.ok()) return status;
  PrintRates("nvme_read_over_raw" + suffix, reads);
  return absl::OkStatus();
}

}  // namespace
}  // namespace larder::bench

int main(int argc, char** argv) {
  using namespace larder::bench;
  std::vector<std::string> names(argv + 1, argv + argc);
  const std::string folder = TakeFlag(names, "directory", ".");
  return RunBenchmarks(names, {{{"nvme_write_over_raw", "nvme_read_over_raw"},
                                [&] { return Measure(folder, uint64_t{2} << 20, ""); }},
                               {{"nvme_write_over_raw_192k", "nvme_read_over_raw_192k"},
                                [&] { return Measure(folder, uint64_t{192} << 10, "_192k"); }}});
}
