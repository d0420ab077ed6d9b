// PackedModel: weights as the forward pass wants them, products packed and stacked.
//
// Thread safety: immutable.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "client/worker/matmul.h"
#include "client/worker/weights.h"

namespace larder::worker {

struct PackedLayer {
  std::vector<float> attention_norm;  // [hidden]
  PackedMatrix qkv;                   // queries, keys and values one below the other
  PackedMatrix attention_output;
  std::vector<float> ffn_norm;  // [hidden]
  PackedMatrix gate_up;         // gate, then up
  PackedMatrix down;
};

struct PackedModel {
  std::vector<PackedLayer> layers;
  std::vector<float> final_norm;  // [hidden]
  PackedMatrix output;            // [vocab][hidden]
};

// Gives the memory of what it packed back; the embedding stays, since tokens are looked up in
// it. Errors as Matmul::Pack.
absl::StatusOr<PackedModel> PackModel(Weights& weights, Matmul& matmul);

}  // namespace larder::worker
