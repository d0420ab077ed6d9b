// Runs a grid of CUDA blocks on the calling thread, each CUDA thread as a fiber.
//
//   thread   runs until it waits: at a barrier, in a collective of its warp, or at its end. Who
//   runs
//            next among those who can is drawn from the seed, in one of several manners a launch:
//            at random, the last to become ready (one warp runs ahead as far as it can), the first,
//            or one lane of each warp after all others.
//   block    up to four are resident at once and take turns; which come next is drawn, too
//
// So a missing barrier shows up as wrong numbers, in some launch if not in each.
//
// Thread safety: none.
//
// 1. Shared memory is all ones (NaN in f32, f16 and bf16) when a block starts, has guard pages on
//    both sides, and is checked for writes past its end when the block ends.
// 2. What cp.async copies arrives when the thread that asked waits for it, and not before; until
//    then its destination is all ones. A missing wait and a destination that somebody still reads
//    are both seen.
// 3. A barrier or collective that not all of its threads reach, lanes of a warp in different
//    collectives, and misaligned or foreign addresses end the process with a message.
// 4. The same seed and launches give the same order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}  // NOLINT
};

// Of the thread that runs.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace larder::emulation {

inline constexpr int kWarpLanes = 32;

void SetSeed(uint32_t seed);

// Runs kernel() once a thread.
void RunGrid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// ---- For the thread that runs.
[[noreturn]] void Fail(const char* what);  // names the thread

std::byte* DynamicShared();
// `bytes` of the block, one place for each `key`.
std::byte* StaticShared(const void* key, size_t bytes);
// Ends the process unless [p, p + bytes) lies in the block's shared memory, aligned.
void CheckShared(const void* p, size_t bytes, size_t alignment);

// Waits for `threads` threads of the block at barrier `id` in [0, 16); 0 threads: for all.
void BlockBarrier(int id, int threads);

// op(lanes) runs once, when all 32 lanes of the warp have come, with what each has brought.
using Collective = void (*)(void* const* lanes);
void RunCollective(void* mine, Collective op);
void CheckMask(uint32_t mask);
int Lane();

void CopyAsync(void* to, const void* from, size_t bytes, size_t zeros);
void CopyAsyncCommit();
void CopyAsyncWait(int groups_pending);

inline void WarpBarrier(uint32_t mask) {
  CheckMask(mask);
  RunCollective(nullptr, [](void* const*) {});
}

template <typename T, typename From>
T Shuffle(uint32_t mask, T x, int width, From from) {
  struct Lane {
    T given;
    T got;
    int from;
  };
  CheckMask(mask);
  Lane lane{x, x, from(larder::emulation::Lane(), width)};
  RunCollective(&lane, [](void* const* lanes) {
    for (int i = 0; i < kWarpLanes; ++i) {
      auto* const self = static_cast<Lane*>(lanes[i]);
      self->got = static_cast<const Lane*>(lanes[self->from])->given;
    }
  });
  return lane.got;
}

uint32_t Ballot(uint32_t mask, bool x);

}  // namespace larder::emulation
