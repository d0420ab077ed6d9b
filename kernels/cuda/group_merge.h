// Where a piece's result goes: to the caller if it is the row's only piece; else to a slot of the
// workspace, and the block that comes last merges the group's slots in the order of their keys.
//
//   workspace   counters  [groups][head tiles]           unsigned, zero between calls
//               log sums  [slots][heads a kv head]       float, base 2
//               outs      [slots][heads a kv head][dim]  float
//
// 1. A block writes its slot; behind a barrier its first thread makes that visible to the device
//    (__threadfence: what the barrier orders before it is included) and counts up. Who counts last
//    sees, behind another fence and barrier, all slots.
// 2. The counter wraps to zero by itself, so no launch has to clear it.
//
// Thread safety: device code; every thread of a block calls Finish.
#pragma once

#include "kernels/cuda/decode.h"
#include "kernels/cuda/numbers.h"
#include "kernels/cuda/softmax.h"

namespace larder::kernels::cuda {

struct DecodeWorkspace {
  unsigned* counters = nullptr;
  float* log_sums = nullptr;
  float* outs = nullptr;
  size_t counter_bytes = 0;
  size_t bytes = 0;
};

__host__ __device__ inline DecodeWorkspace WorkspaceOf(const DecodeParams& p) {
  const auto rounded = [](size_t bytes) { return (bytes + 15) / 16 * 16; };
  const size_t heads = p.q_heads / p.layer.kv_heads;
  DecodeWorkspace w;
  // A tile is 8 heads at least.
  w.counter_bytes = rounded(p.plan.group_count * ((heads + 7) / 8) * sizeof(unsigned));
  const size_t log_sum_bytes = rounded(p.plan.slots * heads * sizeof(float));
  w.bytes =
      w.counter_bytes + log_sum_bytes + p.plan.slots * heads * p.layer.value_dim * sizeof(float);
  // Whoever asks for the size has no workspace yet.
  const auto base = reinterpret_cast<unsigned long long>(p.workspace);
  w.counters = reinterpret_cast<unsigned*>(base);
  w.log_sums = reinterpret_cast<float*>(base + w.counter_bytes);
  w.outs = reinterpret_cast<float*>(base + w.counter_bytes + log_sum_bytes);
  return w;
}

struct MergeState {
  bool last;
};

// What the slots of a group are worth to one head.
struct MergeWeights {
  float of[kGroupPiecesMax];
  float sum;
};

template <typename T>
class PieceResult {
 public:
  // `heads` heads from `head_in_group` on, counted among the q heads of the piece's kv head.
  __device__ PieceResult(const DecodeParams& p, const DecodePiece& piece, int head_in_group,
                         int heads)
      : p_(p),
        piece_(piece),
        workspace_(WorkspaceOf(p)),
        group_heads_(p.q_heads / p.layer.kv_heads),
        head_in_group_(head_in_group),
        heads_(heads) {}

  __device__ void Set(int head, int i, float x) {
    if (piece_.slot < 0) return Write(head, i, x);
    workspace_.outs[SlotHead(piece_.slot, head) * p_.layer.value_dim + i] = x;
  }
  __device__ void SetLogSum(int head, float log_sum) {
    if (piece_.slot < 0) return WriteLse(head, log_sum);
    workspace_.log_sums[SlotHead(piece_.slot, head)] = log_sum;
  }

  // Nobody may need the block's dynamic shared memory any more.
  __device__ void Finish() {
    if (piece_.slot < 0) return;
    const DecodeGroup group = p_.plan.groups[piece_.group];
    auto& state = StaticShared<MergeState>();
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned* const counter = workspace_.counters + piece_.group * gridDim.y + blockIdx.y;
      __threadfence();
      state.last = atomicInc(counter, group.slot_count - 1) == group.slot_count - 1u;
      __threadfence();
    }
    __syncthreads();
    if (!state.last) return;
    auto* const weights = reinterpret_cast<MergeWeights*>(DynamicShared());
    const int warps = static_cast<int>(blockDim.x) / kWarpLanes;
    for (int h = static_cast<int>(threadIdx.x) / kWarpLanes; h < heads_; h += warps) {
      Weigh(group, h, weights[h]);
    }
    __syncthreads();
    const int dim = p_.layer.value_dim;
    for (int i = 4 * static_cast<int>(threadIdx.x); i < heads_ * dim;
         i += 4 * static_cast<int>(blockDim.x)) {
      Merge(group, i / dim, i % dim, weights[i / dim]);
    }
  }

 private:
  // A warp: lanes have two slots each. Slots are read past level 1, which may hold what lay there
  // before other blocks wrote.
  __device__ void Weigh(const DecodeGroup& group, int head, MergeWeights& weights) {
    static_assert(kGroupPiecesMax == 2 * kWarpLanes);
    const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
    float log_sums[2];
    for (int i = 0; i < 2; ++i) {
      const int slot = lane + i * kWarpLanes;
      log_sums[i] = slot < group.slot_count
                        ? __ldcg(&workspace_.log_sums[SlotHead(group.slot_begin + slot, head)])
                        : NegativeInfinity();
    }
    RunningSoftmax total;
    total.most = fmaxf(log_sums[0], log_sums[1]);
    for (int apart = 1; apart < kWarpLanes; apart *= 2) {
      total.most = fmaxf(total.most, __shfl_xor_sync(kAllLanes, total.most, apart));
    }
    for (int i = 0; i < 2; ++i) {
      const float weight = Exp2(log_sums[i] - total.Base());
      weights.of[lane + i * kWarpLanes] = weight;
      total.sum += weight;
    }
    for (int apart = 1; apart < kWarpLanes; apart *= 2) {
      total.sum += __shfl_xor_sync(kAllLanes, total.sum, apart);
    }
    if (lane != 0) return;
    weights.sum = total.sum;
    WriteLse(head, total.LogSum());
  }

  // Numbers i to i + 3 of a head over all slots, in their order.
  __device__ void Merge(const DecodeGroup& group, int head, int i, const MergeWeights& weights) {
    const float* const from =
        workspace_.outs + SlotHead(group.slot_begin, head) * p_.layer.value_dim + i;
    const int64_t stride = int64_t{group_heads_} * p_.layer.value_dim;
    float4 out = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int s = 0; s < group.slot_count; ++s) {
      const float4 x = __ldcg(reinterpret_cast<const float4*>(from + s * stride));
      const float weight = weights.of[s];
      out = make_float4(fmaf(weight, x.x, out.x), fmaf(weight, x.y, out.y),
                        fmaf(weight, x.z, out.z), fmaf(weight, x.w, out.w));
    }
    const float numbers[4] = {out.x, out.y, out.z, out.w};
    for (int n = 0; n < 4; ++n) {
      Write(head, i + n, weights.sum == 0 ? 0 : numbers[n] / weights.sum);
    }
  }

  __device__ int64_t SlotHead(int slot, int head) const {
    return int64_t{slot} * group_heads_ + head_in_group_ + head;
  }
  __device__ int64_t QHead(int head) const {
    return piece_.kv_head * group_heads_ + head_in_group_ + head;
  }
  __device__ void Write(int head, int i, float x) {
    const int64_t at = piece_.row * p_.out_stride + QHead(head) * p_.layer.value_dim + i;
    if (p_.out_dtype == DType::kF32) {
      static_cast<float*>(p_.out)[at] = x;
    } else {
      static_cast<T*>(p_.out)[at] = FromFloat<T>(x);
    }
  }
  __device__ void WriteLse(int head, float log_sum) {
    if (p_.lse != nullptr) p_.lse[int64_t{piece_.row} * p_.q_heads + QHead(head)] = log_sum * kLn2;
  }

  const DecodeParams& p_;
  const DecodePiece& piece_;
  const DecodeWorkspace workspace_;
  const int group_heads_;
  const int head_in_group_;
  const int heads_;
};

}  // namespace larder::kernels::cuda
