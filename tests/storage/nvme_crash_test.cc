// A writing process is killed with SIGKILL at a random point; every write that it saw
// acknowledged must be there afterwards, and no read may return a wrong byte.

#include <deque>
#include <map>
#include <random>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"
#include "storage/nvme_store.h"
#include "tests/storage/child_process.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using namespace ::larder::testing;  // NOLINT: a test's own helpers

constexpr uint32_t kSlots = 48;
constexpr uint64_t kStride = 16384;
constexpr uint64_t kInFlight = 12;

Slot SlotOf(uint32_t index) { return Slot::AtOffset(index * kStride); }
uint64_t BytesOf(uint64_t seed) { return kStride - seed % 5000; }

// Writes for ever, kInFlight blocks at a time, and says what it starts and what is done.
TEST(NvmeCrashChild, DISABLED_Writes) {
  auto options = StoreOptions(ChildParameter("FOLDER"), kSlots * kStride);
  options.sync_delay = absl::Milliseconds(1);
  auto store = OpenStore(options);
  uint64_t seed = std::stoull(ChildParameter("SEED"));
  std::mt19937_64 random(seed);
  std::vector<BlockMemory> memory;
  for (uint32_t i = 0; i < kSlots; ++i) memory.emplace_back(kStride);
  absl::Mutex mu;
  absl::CondVar changed;
  std::vector<bool> busy(kSlots);
  uint64_t in_flight = 0;
  while (true) {
    uint32_t index;
    {
      absl::MutexLock lock(&mu);
      while (in_flight >= kInFlight) changed.Wait(&mu);
      do {
        index = random() % kSlots;
      } while (busy[index]);
      busy[index] = true;
      ++in_flight;
      Say(absl::StrCat("start ", index, " ", ++seed));
    }
    const auto block = memory[index].span().first(BytesOf(seed));
    Fill(block, seed);
    store->Write(SlotOf(index), block, RecordOf(seed), [&, index, seed](absl::Status status) {
      absl::MutexLock lock(&mu);
      Say(absl::StrCat(status.ok() ? "done " : "failed ", index, " ", seed));
      busy[index] = false;
      --in_flight;
      changed.Signal();
    });
  }
}

struct SlotState {
  uint64_t started = 0;
  uint64_t done = 0;
};

void Follow(const std::string& line, std::map<uint32_t, SlotState>& slots, uint64_t& highest) {
  std::istringstream words(line);
  std::string what;
  uint32_t index;
  uint64_t seed;
  words >> what >> index >> seed;
  ASSERT_TRUE(what == "start" || what == "done") << line;
  (what == "start" ? slots[index].started : slots[index].done) = seed;
  highest = std::max(highest, seed);
}

TEST(NvmeCrash, AcknowledgedWritesSurviveSigkill) {
  std::random_device entropy;
  const uint32_t test_seed = entropy();
  SCOPED_TRACE(absl::StrCat("seed ", test_seed));
  std::mt19937 random(test_seed);
  TempDir folder;
  std::map<uint32_t, SlotState> slots;
  uint64_t seed = 1;
  for (int round = 0; round < 6; ++round) {
    ChildProcess child("NvmeCrashChild.DISABLED_Writes",
                       {{"FOLDER", folder.path()}, {"SEED", absl::StrCat(seed)}});
    const int lines = 50 + static_cast<int>(random() % 600);
    for (int i = 0; i < lines; ++i) {
      auto line = child.ReadLine();
      ASSERT_TRUE(line.has_value());
      ASSERT_NO_FATAL_FAILURE(Follow(*line, slots, seed));
    }
    child.Kill();
    while (auto line = child.ReadLine()) ASSERT_NO_FATAL_FAILURE(Follow(*line, slots, seed));

    auto store = OpenStore(StoreOptions(folder.path(), kSlots * kStride));
    int kept = 0;
    for (auto& [index, state] : slots) {
      if (state.done == 0) continue;
      const absl::Status status = ReadBlock(*store, SlotOf(index), BytesOf(state.done), state.done);
      if (state.started == state.done) {
        EXPECT_TRUE(status.ok()) << "slot " << index << ": " << status;
      } else {
        // Being overwritten: the old block, or a miss. ReadBlock has compared the bytes.
        EXPECT_TRUE(status.ok() || absl::IsDataLoss(status)) << status;
        state.done = 0;
      }
      kept += status.ok();
    }
    EXPECT_GT(kept, 0);
  }
}

}  // namespace
}  // namespace larder
