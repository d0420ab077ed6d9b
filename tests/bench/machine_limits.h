// What the machine can do at most: reading memory, and multiplying.
//
// Thread safety: as the pool's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/thread_pool.h"

namespace larder::bench {

// Reads every byte once on all threads with the widest loads there are, in stretches of 256 KiB,
// and keeps nothing. Seconds.
double ReadSeconds(kernels::ThreadPool& pool, std::span<const std::byte> memory);

// GFLOP/s of independent float32 multiply-adds in registers, all threads, the widest there are.
double FmaGflops(kernels::ThreadPool& pool);

}  // namespace larder::bench
