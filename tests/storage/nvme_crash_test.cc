// A process that writes, reads and erases is killed with SIGKILL at a random point, hundreds of
// times. Every write that it saw acknowledged must be there afterwards, nothing may be there
// that it did not write, no read may return a wrong byte, and `larder nvme check` must find
// nothing but payloads that were under way.

#include <array>
#include <map>
#include <random>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"
#include "storage/nvme_audit.h"
#include "storage/nvme_store.h"
#include "tests/storage/child_process.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using namespace ::larder::testing;  // NOLINT: a test's own helpers

constexpr uint32_t kSlots = 48;
constexpr uint64_t kStride = 16384;
constexpr uint64_t kInFlight = 12;
constexpr int kKills = 200;

Slot SlotOf(uint32_t index) { return Slot::AtOffset(index * kStride); }
uint64_t BytesOf(uint64_t seed) { return kStride - seed % 5000; }

// --- The child ---------------------------------------------------------------------------

// kInFlight operations at a time, each told of when it starts and when it is done.
class Load {
 public:
  Load(NvmeStore& store, uint64_t seed) : store_(store), random_(seed), seed_(seed) {
    for (uint32_t i = 0; i < kSlots; ++i) memory_.emplace_back(kStride);
  }
  void Step() {
    const uint32_t index = TakeSlot();
    const uint64_t held = done_[index];
    const uint64_t dice = random_() % 10;
    if (held != 0 && dice < 2) {
      Read(index, held);
    } else if (held != 0 && dice == 2) {
      Say(absl::StrCat("erase ", index, " ", held));
      store_.Erase(SlotOf(index), RecordOf(held).key.Tag());
      GiveSlot(index, 0);
    } else {
      Write(index, ++seed_);
    }
  }

 private:
  uint32_t TakeSlot() {
    absl::MutexLock lock(&mu_);
    while (in_flight_ >= kInFlight) changed_.Wait(&mu_);
    uint32_t index;
    do {
      index = random_() % kSlots;
    } while (busy_[index]);
    busy_[index] = true;
    ++in_flight_;
    return index;
  }
  void GiveSlot(uint32_t index, uint64_t holds) {
    absl::MutexLock lock(&mu_);
    done_[index] = holds;
    busy_[index] = false;
    --in_flight_;
    changed_.Signal();
  }
  void Write(uint32_t index, uint64_t seed) {
    Say(absl::StrCat("start ", index, " ", seed));
    const auto block = memory_[index].span().first(BytesOf(seed));
    Fill(block, seed);
    store_.Write(SlotOf(index), block, RecordOf(seed), [=, this](absl::Status status) {
      Say(absl::StrCat(status.ok() ? "done " : "failed ", index, " ", seed));
      GiveSlot(index, status.ok() ? seed : 0);
    });
  }
  void Read(uint32_t index, uint64_t seed) {
    const auto block = memory_[index].span().first(BytesOf(seed));
    store_.Read(SlotOf(index), block, RecordOf(seed), [=, this](absl::Status status) {
      if (!status.ok() || !IsFilled(block, seed)) Say(absl::StrCat("wrong ", index, " ", seed));
      GiveSlot(index, seed);
    });
  }

  NvmeStore& store_;
  std::mt19937_64 random_;
  uint64_t seed_;
  std::vector<BlockMemory> memory_;
  absl::Mutex mu_;
  absl::CondVar changed_;
  std::array<bool, kSlots> busy_ ABSL_GUARDED_BY(mu_) = {};
  uint64_t in_flight_ ABSL_GUARDED_BY(mu_) = 0;
  std::array<uint64_t, kSlots> done_{};  // its slot's holder's
};

TEST(NvmeCrashChild, DISABLED_Loads) {
  auto options = StoreOptions(ChildParameter("FOLDER"), kSlots * kStride);
  options.sync_delay = absl::Milliseconds(1);
  auto store = OpenStore(options);
  Load load(*store, std::stoull(ChildParameter("SEED")));
  while (true) load.Step();
}

// --- The parent --------------------------------------------------------------------------

struct SlotState {
  uint64_t started = 0;  // the last write
  uint64_t done = 0;     // the last one acknowledged; 0: none that must be there
  uint64_t erased = 0;   // may be there still
};
using Slots = std::map<uint32_t, SlotState>;

void Follow(const std::string& line, Slots& slots, uint64_t& highest) {
  std::istringstream words(line);
  std::string what;
  uint32_t index;
  uint64_t seed;
  words >> what >> index >> seed;
  SlotState& slot = slots[index];
  highest = std::max(highest, seed);
  if (what == "start") {
    slot.started = seed;
  } else if (what == "done") {
    slot.done = seed;
  } else {
    ASSERT_EQ(what, "erase") << line;
    slot = {.started = seed, .done = 0, .erased = seed};
  }
}

// Only what was being overwritten may fail its checksum.
void CheckOffline(const std::string& folder, Slots& slots) {
  auto audit = NvmeAudit::Open(folder);
  ASSERT_TRUE(audit.ok()) << audit.status();
  const auto findings = (*audit)->Check(1, [](uint64_t, uint64_t) {});
  ASSERT_TRUE(findings.ok()) << findings.status();
  for (const NvmeAudit::Finding& finding : *findings) {
    if (finding.problem == NvmeAudit::Problem::kOrphan) continue;  // blocks here have no parents
    const SlotState& slot = slots[static_cast<uint32_t>(finding.slot.offset() / kStride)];
    EXPECT_EQ(finding.problem, NvmeAudit::Problem::kChecksum) << finding.slot.number();
    EXPECT_NE(slot.started, slot.done) << "slot " << finding.slot.number() << " is damaged";
  }
}

// Afterwards each slot holds what its state says, or nothing.
void CheckOnline(const std::string& folder, Slots& slots) {
  auto store = OpenStore(StoreOptions(folder, kSlots * kStride));
  ASSERT_TRUE(store
                  ->Scan([&](Slot slot, uint32_t, const BlockRecord& record) {
                    const SlotState& state = slots[static_cast<uint32_t>(slot.offset() / kStride)];
                    EXPECT_TRUE((state.done != 0 && record.key == RecordOf(state.done).key) ||
                                record.key == RecordOf(state.started).key ||
                                record.key == RecordOf(state.erased).key)
                        << "slot " << slot.number() << " holds what nobody wrote there";
                    return true;
                  })
                  .ok());
  for (auto& [index, state] : slots) {
    const uint64_t held = state.done != 0 ? state.done : state.started;
    // ReadBlock compares the bytes.
    const absl::Status status = ReadBlock(*store, SlotOf(index), BytesOf(held), held);
    if (state.done != 0 && state.started == state.done) {
      EXPECT_TRUE(status.ok()) << "slot " << index << ": " << status;
    } else {
      EXPECT_TRUE(status.ok() || absl::IsDataLoss(status)) << status;
    }
    state = status.ok() ? SlotState{held, held, 0} : SlotState();
  }
}

TEST(NvmeCrash, AcknowledgedWritesSurviveSigkill) {
  std::random_device entropy;
  const uint32_t test_seed = entropy();
  SCOPED_TRACE(absl::StrCat("seed ", test_seed));
  std::mt19937 random(test_seed);
  TempDir folder(MemoryFolder());
  Slots slots;
  uint64_t seed = 1;
  uint64_t acknowledged = 0;
  for (int round = 0; round < kKills && !::testing::Test::HasFailure(); ++round) {
    ChildProcess child("NvmeCrashChild.DISABLED_Loads",
                       {{"FOLDER", folder.path()}, {"SEED", absl::StrCat(seed)}});
    const int lines = 1 + static_cast<int>(random() % 60);
    for (int i = 0; i < lines; ++i) {
      auto line = child.ReadLine();
      ASSERT_TRUE(line.has_value());
      ASSERT_NO_FATAL_FAILURE(Follow(*line, slots, seed));
    }
    child.Kill();
    while (auto line = child.ReadLine()) ASSERT_NO_FATAL_FAILURE(Follow(*line, slots, seed));
    for (const auto& [index, state] : slots) acknowledged += state.done != 0;
    ASSERT_NO_FATAL_FAILURE(CheckOffline(folder.path(), slots));
    ASSERT_NO_FATAL_FAILURE(CheckOnline(folder.path(), slots));
  }
  EXPECT_GT(acknowledged, static_cast<uint64_t>(kKills));
}

}  // namespace
}  // namespace larder
