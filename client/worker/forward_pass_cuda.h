// CudaForwardPass: the forward pass on a CUDA device: kernels/cuda, and cuBLAS for products.
//
//   host      tables, plans, angles of a step ── one copy from pinned memory ──┐
//   stream    ... ─────────────────────────────────────────────────────────────┴ layers ─ logits ─
//   host
//
// Chunks of one token go to Decode, longer ones to Prefill; both may be in one step. A step that
// only decodes is launched as a CUDA graph where an earlier one was launched alike (gpu_graphs.h).
// This header names no CUDA type: builds without nvcc or cuBLAS have forward_pass_cuda_absent.cc.
//
// Thread safety: as ForwardPass. One stream; Run waits for it at its end.
//
// Invariants:
//   1. A row's K/V and logits depend on that row, the weights and the sequence's blocks, and in
//      their last bits on the step around it: cuBLAS chooses its order of sums by the number of
//      rows, Decode by the number of sequences, and Prefill's order is another than Decode's.
//   2. Bits differ between libraries and devices; arithmetic() names both.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "client/worker/forward_pass.h"
#include "client/worker/weights.h"

namespace larder::worker {

// Brings the weights to the device, in 16 bits: f16 where the model's embedding is, else bf16; and
// gives their memory here back. `options`: valid, for Device::kCuda. UNIMPLEMENTED: built without
// CUDA, a kv_dtype without a kernel for this head_dim, keys_before_rope. FAILED_PRECONDITION: no
// device. RESOURCE_EXHAUSTED: not enough of its memory. INTERNAL: anything else that CUDA says.
absl::StatusOr<std::unique_ptr<ForwardPass>> CreateCudaForwardPass(
    Weights weights, const TransformerOptions& options);

}  // namespace larder::worker
