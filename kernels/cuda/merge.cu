#include "kernels/cuda/merge.h"
#include "kernels/cuda/softmax.h"

namespace larder::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpLanes;

// A warp a row. Its lanes compute the same few weights, each for itself.
__global__ void __launch_bounds__(kThreads) MergeKernel(const MergeParams p) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpLanes;
  if (row >= p.rows) return;
  const int lane = threadIdx.x % kWarpLanes;
  RunningSoftmax total;
  total.Clear();
  for (int i = 0; i < p.parts; ++i) total.most = fmaxf(total.most, p.lses[i][row] * kLog2E);
  for (int i = 0; i < p.parts; ++i) total.sum += Exp2(p.lses[i][row] * kLog2E - total.Base());
  for (int at = lane; at < p.dim; at += kWarpLanes) {
    float out = 0;
    for (int i = 0; i < p.parts; ++i) {
      const float lse = p.lses[i][row];
      if (lse == NegativeInfinity()) continue;
      out = fmaf(Exp2(lse * kLog2E - total.Base()), p.outs[i][row * p.dim + at], out);
    }
    p.out[row * p.dim + at] = total.sum == 0 ? 0 : out / total.sum;
  }
  // `lse` may be one of `lses`, which other lanes still read.
  __syncwarp();
  if (lane == 0 && p.lse != nullptr) p.lse[row] = total.LogSum() * kLn2;
}

}  // namespace

cudaError_t MergeAttention(const MergeParams& p, cudaStream_t stream) {
  if (p.parts < 1 || p.parts > kMergePartsMax || p.dim < 1) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>((p.rows + kWarps - 1) / kWarps);
  return Launch(MergeKernel, {blocks, kThreads}, stream, p);
}

}  // namespace larder::kernels::cuda
