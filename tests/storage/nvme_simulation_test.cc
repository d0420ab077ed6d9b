// The NVMe tier on a drive that fails, forgets, flips bits and loses power, beside a dumb model;
// its index a map, or RocksDB with its files on that drive. What is checked:
//   - what was acknowledged is there and right, whatever comes after it; nothing wrong is served;
//   - no record is found that nobody wrote, none stays behind when all is erased: no slot leaks;
//   - every start succeeds, and writes go on by themselves once the drive works again.
// A seed fixes the operations and what the drive does; which writes share a group is the
// committer's and may differ from run to run.
//   LARDER_SEED=n LARDER_SEEDS=1 storage_test --gtest_filter='NvmeSimulation.*'

#include <cerrno>
#include <cstdlib>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "storage/nvme_store.h"
#include "tests/storage/nvme_testing.h"
#include "tests/storage/simulated_drive.h"

namespace larder {
namespace {

using namespace ::larder::testing;  // NOLINT: a test's own helpers

constexpr uint32_t kSlots = 8;
constexpr uint64_t kStride = 8192;
constexpr uint64_t kTierBytes = kSlots * kStride;

struct Op {
  enum Kind {
    kWrite,        // a new block into the slot; goes on beside what follows
    kRead,         // what should be there
    kReadOther,    // a block that is not there
    kErase,        // what should be there
    kFlipPayload,  // bit `arg` of the slot's block
    kFlipRecord,   // bit `arg` of the slot's record
    kFailReads,    // until kHeal
    kFailWrites,
    kFailSyncs,
    kFailIndex,
    kHeal,
    kRestart,
    kPowerCut,  // after `arg` more writes, syncs and changes of records; then starts again
  };
  Kind kind;
  uint32_t slot;
  uint64_t arg;
};

// As a literal, to be pasted into Replay below.
std::string Print(const std::vector<Op>& ops) {
  constexpr const char* kNames[] = {"kWrite",      "kRead",      "kReadOther", "kErase",
                                    "kFlipPayload", "kFlipRecord", "kFailReads", "kFailWrites",
                                    "kFailSyncs",  "kFailIndex", "kHeal",      "kRestart",
                                    "kPowerCut"};
  std::string text = "{";
  for (const Op& op : ops) {
    absl::StrAppend(&text, "{Op::", kNames[op.kind], ", ", op.slot, ", ", op.arg, "}, ");
  }
  return text + "}";
}

std::vector<Op> RandomOps(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<Op> ops;
  for (int i = 0; i < 60; ++i) {
    constexpr std::pair<Op::Kind, int> kOdds[] = {
        {Op::kWrite, 40},     {Op::kRead, 20},      {Op::kReadOther, 3}, {Op::kErase, 5},
        {Op::kFlipPayload, 2}, {Op::kFlipRecord, 2}, {Op::kFailReads, 2}, {Op::kFailWrites, 3},
        {Op::kFailSyncs, 3},  {Op::kFailIndex, 3},  {Op::kHeal, 9},      {Op::kRestart, 3},
        {Op::kPowerCut, 5}};
    int dice = static_cast<int>(random() % 100);
    for (const auto& [kind, odds] : kOdds) {
      if ((dice -= odds) >= 0) continue;
      ops.push_back({kind, static_cast<uint32_t>(random() % kSlots), random() % 65536});
      break;
    }
  }
  return ops;
}

// What a slot may hold. `must`: it was acknowledged and nothing has happened to it since.
struct Expected {
  std::optional<uint64_t> must;
  std::set<uint64_t> may;
  bool damaged = false;         // `must` with a flipped bit: DATA_LOSS, once
  bool record_damaged = false;  // it is the record's: a start drops that by itself

  void Loosen() {
    if (must) may.insert(*must);
    must.reset();
    damaged = record_damaged = false;
  }
};

enum class Index { kMap, kRocksDb };

class Simulation {
 public:
  Simulation(const std::string& folder, uint64_t seed, Index index)
      : folder_(folder), index_(index), drive_(kTierBytes + kSlotGranule, seed) {
    for (uint32_t i = 0; i < kSlots; ++i) memory_.emplace_back(kStride);
    Open();
  }
  ~Simulation() { store_.reset(); }

  void Run(const std::vector<Op>& ops) {
    for (const Op& op : ops) {
      Do(op);
      if (::testing::Test::HasFailure()) return;
    }
    Restart();
    for (uint32_t slot = 0; slot < kSlots; ++slot) Read(slot);
    for (const auto& [slot, key] : found_) store_->Erase(slot, key.Tag());
    Restart();
    EXPECT_TRUE(found_.empty()) << "slot " << found_.begin()->first.number() << " has leaked";
  }

 private:
  static Slot SlotOf(uint32_t index) { return Slot::AtOffset(index * kStride); }
  static uint64_t BytesOf(uint64_t block) { return kStride - block * 977 % 4000; }

  void Open() {
    auto options = StoreOptions(folder_, kTierBytes);
    options.io_threads = 1;
    options.sync_delay = absl::Microseconds(50);
    options.probe_interval = absl::Microseconds(200);
    options.wrap_io = [this](std::unique_ptr<IoBackend>) { return drive_.Io(); };
    options.open_records = [this] { return OpenRecords(); };
    store_ = OpenStore(options);
    found_.clear();
    ASSERT_TRUE(store_
                    ->Scan([&](Slot slot, uint32_t, const BlockRecord& record) {
                      CheckFound(slot, record);
                      found_[slot] = record.key;
                      return true;
                    })
                    .ok());
  }

  absl::StatusOr<std::unique_ptr<NvmeRecords>> OpenRecords() {
    if (index_ == Index::kMap) return drive_.Records();
    return NvmeRecords::Open("/index", drive_.env());
  }

  // Nothing is made up, and what must be there is.
  void CheckFound(Slot slot, const BlockRecord& record) {
    const Expected& expected = expected_[static_cast<uint32_t>(slot.offset() / kStride)];
    bool known = expected.must && record.key == RecordOf(*expected.must).key;
    for (const uint64_t block : expected.may) known = known || record.key == RecordOf(block).key;
    EXPECT_TRUE(known) << "slot " << slot.number() << " holds what nobody wrote there";
  }

  void Do(const Op& op) {
    switch (op.kind) {
      case Op::kWrite:
        return Write(op.slot);
      case Op::kRead:
        return Read(op.slot);
      case Op::kReadOther:
        return ReadOther(op.slot);
      case Op::kErase:
        return Erase(op.slot);
      case Op::kFlipPayload:
      case Op::kFlipRecord:
        return Flip(op);
      case Op::kFailReads:
        drive_.read_errno = EIO;
        return;
      case Op::kFailWrites:
        drive_.write_errno = op.arg % 2 == 0 ? ENOSPC : EIO;
        return;
      case Op::kFailSyncs:
        drive_.sync_errno = EIO;
        return;
      case Op::kFailIndex:
        drive_.index_errno = op.arg % 2 == 0 ? ENOSPC : EIO;
        return;
      case Op::kHeal:
        return Heal();
      case Op::kRestart:
        return Restart();
      case Op::kPowerCut:
        return PowerCut(op.arg);
    }
  }

  void Write(uint32_t slot) {
    Settle(slot);
    const uint64_t block = next_block_++;
    Expected& expected = expected_[slot];
    expected.Loosen();
    expected.may.insert(block);
    const auto bytes = memory_[slot].span().first(BytesOf(block));
    Fill(bytes, block);
    auto [it, added] = under_way_.emplace(slot, std::pair(block, Waiter()));
    ASSERT_TRUE(added);
    store_->Write(SlotOf(slot), bytes, RecordOf(block), it->second.second.done());
  }

  // Waits for the slot's write.
  void Settle(uint32_t slot) {
    const auto it = under_way_.find(slot);
    if (it == under_way_.end()) return;
    if (it->second.second.Wait().ok()) expected_[slot] = {it->second.first, {}, false, false};
    under_way_.erase(it);
  }
  void SettleAll() {
    for (uint32_t slot = 0; slot < kSlots; ++slot) Settle(slot);
  }

  void Read(uint32_t slot) {
    Settle(slot);
    Expected& expected = expected_[slot];
    if (!expected.must && expected.may.empty()) return;
    const uint64_t block = expected.must ? *expected.must : *expected.may.rbegin();
    const uint64_t corrupt = store_->stats().corrupt;
    // ReadBlock compares the bytes.
    const absl::Status status = ReadBlock(*store_, SlotOf(slot), BytesOf(block), block);
    if (drive_.read_errno != 0 || drive_.off()) {
      ASSERT_TRUE(absl::IsUnavailable(status)) << status;
      return;
    }
    ASSERT_TRUE(status.ok() || absl::IsDataLoss(status)) << status;
    ASSERT_EQ(store_->stats().corrupt, corrupt + !status.ok()) << "a loss is counted";
    if (expected.must && !expected.damaged) {
      ASSERT_TRUE(status.ok()) << "block " << block << " was acknowledged: " << status;
    }
    ASSERT_FALSE(expected.damaged && status.ok()) << "a flipped bit in block " << block;
    if (!status.ok()) expected.Loosen();  // the record has been deleted, unless the index fails
  }

  void ReadOther(uint32_t slot) {
    Settle(slot);
    const absl::Status status = ReadBlock(*store_, SlotOf(slot), 4096, next_block_++);
    if (drive_.read_errno == 0 && !drive_.off()) {
      ASSERT_TRUE(absl::IsDataLoss(status)) << status;
      expected_[slot].Loosen();
    } else {
      ASSERT_FALSE(status.ok());
    }
  }

  void Erase(uint32_t slot) {
    Settle(slot);
    Expected& expected = expected_[slot];
    if (!expected.must) return;
    store_->Erase(SlotOf(slot), RecordOf(*expected.must).key.Tag());
    expected.Loosen();
  }

  void Flip(const Op& op) {
    SettleAll();
    Expected& expected = expected_[op.slot];
    if (!expected.must || expected.damaged) return;
    // A flipped bit in RocksDB's files is nvme_damage_test's matter.
    if (op.kind == Op::kFlipRecord && index_ == Index::kRocksDb) return;
    if (op.kind == Op::kFlipRecord) {
      drive_.FlipRecordBit(SlotOf(op.slot), op.arg);
    } else {
      drive_.FlipPayloadBit(op.slot * kStride + op.arg % BytesOf(*expected.must),
                            static_cast<int>(op.arg % 8));
    }
    expected.damaged = true;
    expected.record_damaged = op.kind == Op::kFlipRecord;
  }

  void Heal() {
    drive_.read_errno = drive_.write_errno = drive_.sync_errno = drive_.index_errno = 0;
    SettleAll();
    // By itself, without a restart.
    while (store_->health().degraded) std::this_thread::yield();
  }

  void Restart() {
    Heal();
    store_.reset();
    DropDamagedRecords();
    Open();
  }

  void PowerCut(uint64_t arg) {
    drive_.CutAfter(1 + arg % 12);
    for (uint32_t i = 0; i < 6 && !drive_.off(); ++i) Write(static_cast<uint32_t>(arg >> 4) % kSlots);
    for (uint32_t slot = 0; slot < kSlots && !drive_.off(); ++slot) Write(slot);
    SettleAll();
    store_.reset();
    DropDamagedRecords();
    drive_.PowerOn();
    Open();
  }

  void DropDamagedRecords() {
    for (auto& [slot, expected] : expected_) {
      if (expected.record_damaged) expected = {};
    }
  }

  const std::string folder_;
  const Index index_;
  SimulatedDrive drive_;
  std::vector<BlockMemory> memory_;
  std::map<uint32_t, Expected> expected_;
  std::map<uint32_t, std::pair<uint64_t, Waiter>> under_way_;
  std::map<Slot, BlockKey> found_;  // at the last start
  uint64_t next_block_ = 1;
  std::unique_ptr<NvmeStore> store_;
};

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* const text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

void Replay(const std::string& folder, const std::vector<Op>& ops, uint64_t seed, Index index) {
  Simulation simulation(folder, seed, index);
  simulation.Run(ops);
}

void RunSeeds(Index index, uint64_t seeds) {
  TempDir folder(MemoryFolder());
  const uint64_t first = FromEnvironment("LARDER_SEED", 1);
  const uint64_t last = first + FromEnvironment("LARDER_SEEDS", seeds);
  for (uint64_t seed = first; seed < last; ++seed) {
    const std::vector<Op> ops = RandomOps(seed);
    Replay(folder.path(), ops, seed, index);
    if (::testing::Test::HasFailure()) FAIL() << "LARDER_SEED=" << seed << "\n" << Print(ops);
  }
}

TEST(NvmeSimulation, NeverWrongAndWhatWasAcknowledgedIsThere) { RunSeeds(Index::kMap, 800); }
TEST(NvmeSimulation, NeverWrongOverRocksDb) { RunSeeds(Index::kRocksDb, 120); }

}  // namespace
}  // namespace larder
