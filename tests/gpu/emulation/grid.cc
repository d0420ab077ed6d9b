#include "tests/gpu/emulation/grid.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "tests/gpu/emulation/fiber.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace larder::emulation {
namespace {

constexpr int kBarriers = 16;
constexpr size_t kBlockThreadsMax = 1024;
constexpr size_t kResidentThreadsMax = 1024;
constexpr size_t kResidentBlocksMax = 4;
constexpr size_t kSharedBytesMax = 227 * 1024;  // what a block may have on sm_90
constexpr size_t kSharedAlignment = 128;
constexpr size_t kPageBytes = 4096;

size_t RoundUp(size_t x, size_t to) { return (x + to - 1) / to * to; }

// Memory between guard pages that ends, but for alignment, where the second begins.
class GuardedBytes {
 public:
  explicit GuardedBytes(size_t bytes) : bytes_(bytes), padded_(RoundUp(bytes, kSharedAlignment)) {
    mapped_ = RoundUp(padded_, kPageBytes) + 2 * kPageBytes;
    void* const map =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) std::abort();
    map_ = static_cast<std::byte*>(map);
    mprotect(map_, kPageBytes, PROT_NONE);
    mprotect(map_ + mapped_ - kPageBytes, kPageBytes, PROT_NONE);
    data_ = map_ + mapped_ - kPageBytes - padded_;
    std::memset(data_, 0xff, padded_);
  }
  ~GuardedBytes() { munmap(map_, mapped_); }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;

  std::byte* data() const { return data_; }
  bool Holds(const void* p, size_t bytes) const {
    const auto* const b = static_cast<const std::byte*>(p);
    return b >= data_ && b + bytes <= data_ + bytes_;
  }
  bool Overrun() const {
    return std::any_of(data_ + bytes_, data_ + padded_,
                       [](std::byte b) { return b != std::byte{0xff}; });
  }

 private:
  size_t bytes_;
  size_t padded_;
  size_t mapped_;
  std::byte* map_;
  std::byte* data_;
};

struct PendingCopy {
  void* to;
  const void* from;
  size_t bytes;
  size_t zeros;
};

enum class State { kReady, kAtBarrier, kInCollective, kDone };

struct Block;
struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint3 index{};
  int number = 0;  // in the block
  State state = State::kReady;
  int barrier = 0;
  std::vector<std::vector<PendingCopy>> groups;  // the last is the one not yet committed
};

struct Warp {
  int lanes = 0;
  int arrived = 0;
  Collective op = nullptr;
  void* brought[kWarpLanes] = {};
  Thread* waiting[kWarpLanes] = {};
};

struct Barrier {
  int expected = 0;
  std::vector<Thread*> waiting;
};

struct Static {
  const void* key;
  std::unique_ptr<GuardedBytes> bytes;
};

struct Block {
  uint3 index{};
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  std::unique_ptr<GuardedBytes> shared;
  std::vector<Static> statics;
  int running = 0;
};

std::mt19937 random_engine(1);
Thread* self = nullptr;
std::vector<Thread*> ready;
const std::function<void()>* kernel_running = nullptr;
std::vector<std::unique_ptr<Thread>> idle_threads;  // keep their stacks

enum class Manner { kRandom, kLastFirst, kFirstFirst, kOneLate };

// Takes a thread out of `ready`. `late`: the lane of each warp that kOneLate holds back.
Thread* Draw(Manner manner, int late) {
  size_t at = random_engine() % ready.size();
  if (manner == Manner::kOneLate) {
    for (int tries = 0; tries < 16 && ready[at]->number % kWarpLanes == late; ++tries) {
      at = random_engine() % ready.size();
    }
  } else if (manner != Manner::kRandom && random_engine() % 64 != 0) {
    // Even the one-sided manners are left now and then, or the same warp would always be ahead.
    at = manner == Manner::kLastFirst ? ready.size() - 1 : 0;
  }
  Thread* const thread = ready[at];
  if (manner == Manner::kFirstFirst) {
    ready.erase(ready.begin() + static_cast<ptrdiff_t>(at));
  } else {
    ready[at] = ready.back();
    ready.pop_back();
  }
  return thread;
}

void MakeReady(Thread* thread) {
  thread->state = State::kReady;
  ready.push_back(thread);
}

void ThreadBody(void*) {
  (*kernel_running)();
  self->state = State::kDone;
}

void Wait(State state) {
  self->state = state;
  Fiber::Yield();
}

std::unique_ptr<Block> StartBlock(uint3 index, size_t shared_bytes) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->shared = std::make_unique<GuardedBytes>(shared_bytes);
  const int count = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  block->warps.resize((count + kWarpLanes - 1) / kWarpLanes);
  block->running = count;
  for (int i = 0; i < count; ++i) {
    std::unique_ptr<Thread> thread;
    if (idle_threads.empty()) {
      thread = std::make_unique<Thread>();
    } else {
      thread = std::move(idle_threads.back());
      idle_threads.pop_back();
    }
    thread->block = block.get();
    thread->number = i;
    thread->index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    thread->groups.assign(1, {});
    thread->fiber.Start(&ThreadBody, nullptr);
    ++block->warps[i / kWarpLanes].lanes;
    MakeReady(thread.get());
    block->threads.push_back(std::move(thread));
  }
  return block;
}

void EndBlock(Block& block) {
  bool overrun = block.shared->Overrun();
  for (const Static& s : block.statics) overrun = overrun || s.bytes->Overrun();
  if (overrun) Fail("a write past the end of shared memory");
  for (auto& thread : block.threads) idle_threads.push_back(std::move(thread));
}

// Nobody can run, but not all are done.
[[noreturn]] void FailAllWait(const std::vector<std::unique_ptr<Block>>& resident) {
  for (const auto& block : resident) {
    for (const auto& t : block->threads) {
      std::fprintf(stderr, "emulation: block %u,%u,%u thread %d %s %d\n", block->index.x,
                   block->index.y, block->index.z, t->number,
                   t->state == State::kAtBarrier      ? "waits at barrier"
                   : t->state == State::kInCollective ? "waits in a collective of warp"
                                                      : "is done, warp",
                   t->state == State::kAtBarrier ? t->barrier : t->number / kWarpLanes);
    }
  }
  std::fprintf(stderr, "emulation: divergent barrier or collective: nobody can go on\n");
  std::abort();
}

}  // namespace

void SetSeed(uint32_t seed) { random_engine.seed(seed); }

void Fail(const char* what) {
  std::fprintf(stderr, "emulation: block %u,%u,%u thread %u,%u,%u: %s\n", blockIdx.x, blockIdx.y,
               blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
  std::abort();
}

void RunGrid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  gridDim = grid;
  blockDim = block;
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kBlockThreadsMax) Fail("threads a block must be in [1, 1024]");
  if (shared_bytes > kSharedBytesMax) Fail("shared memory a block must be at most 227 KiB");
  kernel_running = &kernel;
  std::vector<uint3> order;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) order.push_back({x, y, z});
    }
  }
  std::shuffle(order.begin(), order.end(), random_engine);
  const auto manner = static_cast<Manner>(random_engine() % 4);
  // Lane 0 often does something for the others.
  const int late = random_engine() % 2 == 0 ? 0 : static_cast<int>(random_engine() % kWarpLanes);
  const size_t fitting = std::max<size_t>(1, kResidentThreadsMax / threads);
  const size_t residents = 1 + random_engine() % std::min(kResidentBlocksMax, fitting);
  std::vector<std::unique_ptr<Block>> resident;
  while (!order.empty() || !resident.empty()) {
    while (!order.empty() && resident.size() < residents) {
      resident.push_back(StartBlock(order.back(), shared_bytes));
      order.pop_back();
    }
    if (ready.empty()) FailAllWait(resident);
    self = Draw(manner, late);
    threadIdx = self->index;
    blockIdx = self->block->index;
    self->fiber.Resume();
    if (self->state != State::kDone || --self->block->running > 0) continue;
    EndBlock(*self->block);
    std::erase_if(resident, [](const auto& b) { return b.get() == self->block; });
  }
}

std::byte* DynamicShared() { return self->block->shared->data(); }

std::byte* StaticShared(const void* key, size_t bytes) {
  for (const Static& s : self->block->statics) {
    if (s.key == key) return s.bytes->data();
  }
  self->block->statics.push_back({key, std::make_unique<GuardedBytes>(bytes)});
  return self->block->statics.back().bytes->data();
}

void CheckShared(const void* p, size_t bytes, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) Fail("a misaligned shared address");
  bool held = self->block->shared->Holds(p, bytes);
  for (const Static& s : self->block->statics) held = held || s.bytes->Holds(p, bytes);
  if (!held) Fail("an address outside of shared memory");
}

int Lane() { return self->number % kWarpLanes; }

void CheckMask(uint32_t mask) {
  if (mask != 0xffffffffu) Fail("only the mask of all lanes is emulated");
}

void BlockBarrier(int id, int threads) {
  const int all = static_cast<int>(self->block->threads.size());
  const int expected = threads == 0 ? all : threads;
  if (id < 0 || id >= kBarriers || expected > all) Fail("no such barrier");
  Barrier& barrier = self->block->barriers[id];
  if (barrier.waiting.empty()) barrier.expected = expected;
  if (barrier.expected != expected) Fail("a barrier with different numbers of threads");
  if (static_cast<int>(barrier.waiting.size()) + 1 == expected) {
    for (Thread* t : barrier.waiting) MakeReady(t);
    barrier.waiting.clear();
    MakeReady(self);
    Fiber::Yield();
    return;
  }
  barrier.waiting.push_back(self);
  self->barrier = id;
  Wait(State::kAtBarrier);
}

void RunCollective(void* mine, Collective op) {
  Warp& warp = self->block->warps[self->number / kWarpLanes];
  if (warp.lanes != kWarpLanes) Fail("a collective of a warp of fewer than 32 threads");
  if (warp.arrived > 0 && warp.op != op) Fail("lanes of a warp in different collectives");
  warp.op = op;
  warp.brought[Lane()] = mine;
  warp.waiting[Lane()] = self;
  if (++warp.arrived < kWarpLanes) return Wait(State::kInCollective);
  op(warp.brought);
  warp.arrived = 0;
  for (Thread* t : warp.waiting) MakeReady(t);
  Fiber::Yield();
}

uint32_t Ballot(uint32_t mask, bool x) {
  struct Vote {
    bool given;
    uint32_t got;
  };
  CheckMask(mask);
  Vote vote{x, 0};
  RunCollective(&vote, [](void* const* lanes) {
    uint32_t votes = 0;
    for (int i = 0; i < kWarpLanes; ++i) {
      votes |= static_cast<uint32_t>(static_cast<const Vote*>(lanes[i])->given) << i;
    }
    for (int i = 0; i < kWarpLanes; ++i) static_cast<Vote*>(lanes[i])->got = votes;
  });
  return vote.got;
}

void CopyAsync(void* to, const void* from, size_t bytes, size_t zeros) {
  CheckShared(to, bytes, bytes);
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0) Fail("a misaligned source of cp.async");
  std::memset(to, 0xff, bytes);
  self->groups.back().push_back({to, from, bytes, zeros});
}

void CopyAsyncCommit() { self->groups.emplace_back(); }

void CopyAsyncWait(int groups_pending) {
  auto& groups = self->groups;
  const size_t committed = groups.size() - 1;
  const size_t done = committed - std::min<size_t>(committed, groups_pending);
  for (size_t i = 0; i < done; ++i) {
    for (const PendingCopy& c : groups[i]) {
      if (c.bytes > c.zeros) std::memcpy(c.to, c.from, c.bytes - c.zeros);
      std::memset(static_cast<std::byte*>(c.to) + (c.bytes - c.zeros), 0, c.zeros);
    }
  }
  groups.erase(groups.begin(), groups.begin() + static_cast<ptrdiff_t>(done));
}

}  // namespace larder::emulation
