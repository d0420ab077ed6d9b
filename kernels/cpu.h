// What a CPU kernel runs on: threads, and one of the instruction sets it was compiled for.
//
// A kernel is written once (piece_kernel.h, row_kernels.h) and compiled once a variant, each in
// a file of its own with its own flags; the rest of the program is plain x86-64. Within a variant
// the result of a row never depends on threads, batch, chunks or block size; between variants it
// may differ in the last bits, so all workers that compare results bit by bit must use one.
//
// Thread safety: values; the pool is used by one caller at a time.
#pragma once

#include <cstdint>

#include "kernels/thread_pool.h"

namespace larder::kernels {

enum class Isa : uint8_t {
  kPortable = 0,  // whatever the compiler may assume of the machine
  kAvx2 = 1,      // x86-64 with AVX2, FMA and F16C
  kAvx512 = 2,    // x86-64 with AVX-512 F, BW, DQ and VL besides
};

inline constexpr Isa kIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512};

// "portable", "avx2", "avx512".
const char* IsaName(Isa isa);

// Whether this build has the variant, and the processor and kernel run it.
bool IsSupported(Isa isa);

// The last of kIsas that is supported.
Isa BestIsa();

struct Cpu {
  ThreadPool& pool;
  Isa isa = BestIsa();  // must be supported
};

}  // namespace larder::kernels
