// What the NVMe tests share: temporary folders, blocks with checkable content, waiting calls,
// and an I/O back end that wraps the real one and fails on demand.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "gtest/gtest.h"
#include "storage/check.h"
#include "storage/errno_status.h"
#include "storage/nvme_store.h"

namespace larder::testing {

// Where fsync costs nothing, for tests in which no power is lost but a process's.
inline std::filesystem::path MemoryFolder() {
  return ::access("/dev/shm", W_OK) == 0 ? std::filesystem::path("/dev/shm")
                                        : std::filesystem::temp_directory_path();
}

class TempDir {
 public:
  explicit TempDir(std::filesystem::path parent = std::filesystem::temp_directory_path()) {
    std::string pattern = parent / "larder-XXXXXX";
    LARDER_CHECK(::mkdtemp(pattern.data()) != nullptr, "mkdtemp");
    path_ = pattern;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Memory for one block; page-aligned and padded as an arena's slot, or off by some bytes.
class BlockMemory {
 public:
  explicit BlockMemory(uint64_t bytes, uint64_t misalign = 0)
      : memory_(static_cast<std::byte*>(
                    std::aligned_alloc(4096, (bytes + misalign + 4095) / 4096 * 4096)),
                &std::free),
        span_(memory_.get() + misalign, bytes) {
    std::memset(memory_.get(), 0xee, (bytes + misalign + 4095) / 4096 * 4096);
  }
  std::span<std::byte> span() const { return span_; }

 private:
  std::unique_ptr<std::byte, decltype(&std::free)> memory_;
  std::span<std::byte> span_;
};

// Content that depends on every bit of the seed.
inline void Fill(std::span<std::byte> block, uint64_t seed) {
  uint64_t x = seed * 0x9e3779b97f4a7c15 + 1;
  for (std::byte& b : block) {
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    b = static_cast<std::byte>(x >> 32);
  }
}

inline bool IsFilled(std::span<const std::byte> block, uint64_t seed) {
  std::vector<std::byte> right(block.size());
  Fill(right, seed);
  return std::memcmp(right.data(), block.data(), block.size()) == 0;
}

inline BlockRecord RecordOf(uint64_t seed) {
  BlockRecord record;
  std::memcpy(record.key.bytes.data(), &seed, sizeof(seed));
  record.key.bytes[31] = 1;
  std::memcpy(record.parent_key.bytes.data() + 8, &seed, sizeof(seed));
  record.model_id = seed * 3 + 1;
  record.depth = static_cast<uint32_t>(seed % 1000);
  return record;
}

// A DoneFn to wait for. Copies share one state.
class Waiter {
 public:
  NvmeStore::DoneFn done() {
    return [state = state_](absl::Status status) {
      state->status = std::move(status);
      state->notification.Notify();
    };
  }
  bool finished() const { return state_->notification.HasBeenNotified(); }
  absl::Status Wait() {
    state_->notification.WaitForNotification();
    // Not a reference to the same text: ThreadSanitizer does not see Abseil count those.
    return {state_->status.code(), state_->status.message()};
  }

 private:
  struct State {
    absl::Notification notification;
    absl::Status status;
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

inline absl::Status WriteBlock(NvmeStore& store, Slot slot, uint64_t bytes, uint64_t seed,
                               uint64_t misalign = 0) {
  BlockMemory block(bytes, misalign);
  Fill(block.span(), seed);
  Waiter waiter;
  store.Write(slot, block.span(), RecordOf(seed), waiter.done());
  return waiter.Wait();
}

// DATA_LOSS also when the store calls wrong bytes right.
inline absl::Status ReadBlock(NvmeStore& store, Slot slot, uint64_t bytes, uint64_t seed,
                              uint64_t misalign = 0) {
  BlockMemory block(bytes, misalign);
  Waiter waiter;
  store.Read(slot, block.span(), RecordOf(seed), waiter.done());
  absl::Status status = waiter.Wait();
  if (status.ok() && !IsFilled(block.span(), seed)) {
    ADD_FAILURE() << "wrong bytes called right in slot " << slot.number();
  }
  return status;
}

// An event that can happen again and again.
class Gate {
 public:
  void Close() { Set(false); }
  void Open() { Set(true); }
  void Pass() {
    absl::MutexLock lock(&mu_);
    while (!open_) changed_.Wait(&mu_);
  }
  bool is_open() {
    absl::MutexLock lock(&mu_);
    return open_;
  }

 private:
  void Set(bool open) {
    absl::MutexLock lock(&mu_);
    open_ = open;
    changed_.SignalAll();
  }
  absl::Mutex mu_;
  absl::CondVar changed_;
  bool open_ ABSL_GUARDED_BY(mu_) = true;
};

// What a FaultyIo does wrong; the test keeps it. 0: works.
struct Faults {
  std::atomic<int> read_errno{0};
  std::atomic<int> write_errno{0};
  std::atomic<int> sync_errno{0};
  std::atomic<bool> lose_writes{false};  // says OK and writes half of it: a torn write
  std::atomic<int> syncs{0};
  std::atomic<int> writes{0};  // whose done has returned
  Gate read_gate;
  Gate sync_gate;
  Gate write_gate;
};

class FaultyIo final : public IoBackend {
 public:
  FaultyIo(std::unique_ptr<IoBackend> real, Faults* faults)
      : faults_(faults), real_(std::move(real)) {}

  void Read(uint64_t offset, std::span<std::byte> to, DoneFn done) override {
    real_->Read(offset, to, [this, done = std::move(done)](absl::Status status) {
      Finish(faults_->read_gate, [this, done, status] {
        const int error = faults_->read_errno;
        done(error != 0 ? ErrnoStatus("faulty read", error) : status);
      });
    });
  }
  void Write(uint64_t offset, std::span<const std::byte> from, DoneFn done) override {
    if (faults_->lose_writes) from = from.first(from.size() / 2);
    real_->Write(offset, from, [this, done = std::move(done)](absl::Status status) {
      Finish(faults_->write_gate, [this, done, status] {
        const int error = faults_->write_errno;
        done(error != 0 ? ErrnoStatus("faulty write", error) : status);
        ++faults_->writes;
      });
    });
  }
  absl::Status Sync() override {
    ++faults_->syncs;
    faults_->sync_gate.Pass();
    if (const int error = faults_->sync_errno; error != 0) {
      return ErrnoStatus("faulty sync", error);
    }
    return real_->Sync();
  }

 private:
  // What hangs, hangs in the device: it keeps no thread of the backend's.
  void Finish(Gate& gate, std::function<void()> tell) {
    if (gate.is_open()) return tell();
    absl::MutexLock lock(&mu_);
    held_.emplace_back([&gate, tell = std::move(tell)] {
      gate.Pass();
      tell();
    });
  }

  Faults* const faults_;
  absl::Mutex mu_;
  std::vector<std::jthread> held_ ABSL_GUARDED_BY(mu_);
  const std::unique_ptr<IoBackend> real_;  // last: its threads use all of the above
};

// The tests of the store run once with each way of I/O (tests/storage/CMakeLists.txt).
inline IoWay WayUnderTest() {
  const char* const name = std::getenv("LARDER_TEST_IO");
  return name != nullptr && std::string(name) == "threads" ? IoWay::kThreads
                                                           : IoWay::kUringRegistered;
}

inline NvmeStore::Options StoreOptions(const std::string& directory, uint64_t bytes = 64 << 20) {
  NvmeStore::Options options;
  options.directory = directory;
  options.bytes = bytes;
  options.probe_interval = absl::Milliseconds(10);
  options.io = WayUnderTest();
  return options;
}

inline std::unique_ptr<NvmeStore> OpenStore(NvmeStore::Options options) {
  auto store = NvmeStore::Open(std::move(options));
  EXPECT_TRUE(store.ok()) << store.status();
  LARDER_CHECK(store.ok());
  return *std::move(store);
}

inline std::function<std::unique_ptr<IoBackend>(std::unique_ptr<IoBackend>)> WrapWith(
    Faults* faults) {
  return [faults](std::unique_ptr<IoBackend> real) {
    return std::make_unique<FaultyIo>(std::move(real), faults);
  };
}

}  // namespace larder::testing
