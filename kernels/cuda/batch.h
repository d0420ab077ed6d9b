// A batch as kernels see it: kv_layout.h's KvLayer and SequenceChunk, with everything they point at
// in device memory. A block's address is a device pointer, so a table may mix arenas (GPU memory
// and mapped host memory) as on the CPU, and costs 8 bytes for a block's 4 KiB row and more. Blocks
// are aligned to 16 bytes here, or as a kernel's own header says; on the CPU 4 are enough.
//
// Thread safety: values.
#pragma once

#include <cstdint>

#include "kernels/kv_layout.h"

namespace larder::kernels::cuda {

struct DeviceBatch {
  const SequenceChunk* chunks = nullptr;  // device [chunk_count], `blocks` device pointers
  const int32_t* row_begins = nullptr;    // device [chunk_count + 1]: chunk i has the rows
                                          // [row_begins[i], row_begins[i + 1]) of q, k, v and out
  int32_t chunk_count = 0;
  int32_t rows = 0;  // row_begins[chunk_count]
  friend bool operator==(const DeviceBatch&, const DeviceBatch&) = default;
};

}  // namespace larder::kernels::cuda
