// GpuModel: weights as the forward pass wants them, in a GPU's memory; the twin of packed_model.h.
//
// Thread safety: immutable.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "client/worker/gpu.h"
#include "client/worker/weights.h"
#include "kernels/kv_layout.h"

namespace larder::worker {

// Matrices are [outputs][inputs] of GpuModel::type, vectors float32.
struct GpuLayer {
  GpuBuffer attention_norm;  // [hidden]
  GpuBuffer qkv;             // queries, keys and values one below the other
  GpuBuffer qkv_bias;        // [queries, keys, values]; empty where the model has none
  GpuBuffer attention_output;
  GpuBuffer ffn_norm;  // [hidden]
  GpuBuffer gate_up;   // gate, then up
  GpuBuffer down;
};

struct GpuModel {
  kernels::DType type = kernels::DType::kBf16;  // kF16 where the embedding is, else kBf16
  GpuBuffer embedding;                          // [vocab][hidden]
  std::vector<GpuLayer> layers;
  GpuBuffer final_norm;  // [hidden]
  GpuBuffer output;      // [vocab][hidden]; empty: the embedding is the output, too
};

// Rounded to nearest where the file has another type. Errors as Gpu's.
absl::StatusOr<GpuModel> UploadModel(Weights weights, Gpu& gpu);

}  // namespace larder::worker
