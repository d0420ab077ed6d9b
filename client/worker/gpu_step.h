// GpuStep: what kernels must know of one step besides its rows' numbers: tokens, angles, block
// tables, and who works on what. Made on the host, brought to the device by one copy.
//
//   pinned   | tokens | angles | row begins | chunks | wanted | groups | pieces | tiles | tables |
//      └─────────────────────────── the same bytes, the same places ──────────────────────────┐
//   device   | tokens | ...                                                                   |
//
// Plans depend on lengths only and serve all layers of the step.
//
// Steps that decode equally many sequences are launched alike, and so may share a graph
// (gpu_graphs.h): plans are filled up to whole waves of the GPU's blocks, and what is as long as
// the sequences are, their tables, lies last.
//
// Thread safety: one thread at a time. The step before must be finished when Prepare is called.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "client/worker/gpu.h"
#include "client/worker/transformer.h"
#include "kernels/cpu.h"
#include "kernels/cuda/batch.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/prefill.h"
#include "kernels/thread_pool.h"

namespace larder::worker {

// What stays the same from step to step.
struct GpuStepOptions {
  int32_t q_heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t window = 0;  // as in AttentionParams
  int32_t sinks = 0;
  bool quantised = false;       // K/V are codes
  int32_t decode_blocks = 0;    // kernels::cuda::DecodeBlocksAtOnce, at least 1
  int32_t multiprocessors = 0;  // of the GPU
  std::vector<float> frequencies;
};

// All that launches are told of a step. Steps of equal arguments are the same launches.
struct GpuStepArguments {
  const int32_t* tokens = nullptr;       // device [batch.rows]
  const float* angles = nullptr;         // device [batch.rows][head_dim]
  const int32_t* wanted_rows = nullptr;  // device [wanted]
  int32_t wanted = 0;                    // rows whose logits are asked for
  kernels::cuda::DeviceBatch batch = {};
  kernels::cuda::DevicePlan decode = {};
  kernels::cuda::DevicePrefillPlan prefill = {};
  friend bool operator==(const GpuStepArguments&, const GpuStepArguments&) = default;
};

class GpuStep {
 public:
  GpuStep(Gpu& gpu, GpuStepOptions options);

  // Starts the copy; what is pointed at is there for whatever is launched after it on the stream.
  // RESOURCE_EXHAUSTED where memory does not suffice.
  absl::Status Prepare(std::span<const Chunk> chunks);

  const GpuStepOptions& options() const { return options_; }
  const GpuStepArguments& arguments() const { return arguments_; }

 private:
  void Describe(std::span<const Chunk> chunks);
  void Plan();
  void PlanDecode(const std::vector<kernels::cuda::DecodeRow>& rows);
  absl::Status Upload();

  Gpu& gpu_;
  const GpuStepOptions options_;
  kernels::ThreadPool pool_;  // for angles
  const kernels::Cpu cpu_;

  // On the host. Chunks' tables are offsets in `table_` until they are brought over.
  std::vector<int32_t> tokens_, positions_, row_begins_, wanted_;
  std::vector<float> angles_;
  std::vector<kernels::SequenceChunk> chunks_;
  std::vector<size_t> table_begins_;
  std::vector<std::byte*> table_;
  kernels::cuda::DecodePlan decode_plan_;
  kernels::cuda::PrefillPlan prefill_plan_;

  GpuBuffer pinned_, device_;
  GpuStepArguments arguments_;
};

}  // namespace larder::worker
