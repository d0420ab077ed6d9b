#include "client/worker/forward_pass_cuda.h"

namespace larder::worker {

absl::StatusOr<std::unique_ptr<ForwardPass>> CreateCudaForwardPass(Weights,
                                                                   const TransformerOptions&) {
  return absl::UnimplementedError(
      "device: cuda; larder-worker was built without CUDA, which takes nvcc and cuBLAS");
}

}  // namespace larder::worker
