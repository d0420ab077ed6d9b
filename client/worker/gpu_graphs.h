// GpuGraphs: a step that is launched as an earlier one was, launched at once.
//
//   key           all that launches are told: pointers, counts, strides. Not what lies in memory
//   first time    launched one by one; this also loads kernels and lets the library prepare itself
//   second time   captured as a CUDA graph, and launched as that
//   later         one launch
//
// A decode step is some 13 launches a layer, each 2 to 3 us of the host, and kernels of a small
// model take less. Steps of equally many sequences are launched alike (gpu_step.h), as tokens,
// positions, tables and plans are read from memory.
//
// Thread safety: one thread at a time.
//
// Invariants:
//   1. A graph does what its launches do one by one: the same kernels in the same order with the
//      same arguments, and so the same bits.
//   2. At most kGraphsMax graphs are kept; the one that was used longest ago goes.
//   3. Whatever CUDA says of a capture fails no step: it is said once on stderr, and from then on
//      all steps are launched one by one.
#pragma once

#include <cstddef>
#include <vector>

#include "absl/functional/function_ref.h"
#include "client/worker/gpu.h"
#include "client/worker/gpu_step.h"

namespace larder::worker {

// What launches of a step are told that may differ from step to step.
struct GpuGraphKey {
  GpuStepArguments step;
  const void* workspace = nullptr;
  const void* logits = nullptr;
  friend bool operator==(const GpuGraphKey&, const GpuGraphKey&) = default;
};

class GpuGraphs {
 public:
  static constexpr size_t kGraphsMax = 32;

  explicit GpuGraphs(Gpu& gpu) : gpu_(gpu) {}

  // Has done on the stream what `launch` launches there, which must depend on `key` only. Errors go
  // to the Gpu.
  void Run(const GpuGraphKey& key, absl::FunctionRef<void()> launch);

 private:
  struct Known {
    GpuGraphKey key;
    GpuGraph graph{nullptr, nullptr};  // null: seen once
  };

  Gpu& gpu_;
  bool broken_ = false;
  std::vector<Known> known_;  // last used last
};

}  // namespace larder::worker
