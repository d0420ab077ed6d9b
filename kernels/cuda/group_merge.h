// Where a piece's result goes: to the caller if it is the row's only piece; else to a slot of the
// workspace, and the block that comes last merges the group's slots in the order of their keys.
//
//   workspace   counters  [groups][head tiles]           unsigned, zero between calls
//               log sums  [slots][heads a kv head]       float, base 2
//               outs      [slots][heads a kv head][dim]  float
//
// 1. A block writes its slot, makes it visible to the device (__threadfence), and then counts up.
// Who
//    counts last sees all slots.
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

  __device__ void Finish() {
    if (piece_.slot < 0) return;
    const DecodeGroup group = p_.plan.groups[piece_.group];
    auto& state = StaticShared<MergeState>();
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned* const counter = workspace_.counters + piece_.group * gridDim.y + blockIdx.y;
      state.last = atomicInc(counter, group.slot_count - 1) == group.slot_count - 1u;
    }
    __syncthreads();
    if (!state.last) return;
    __threadfence();
    const int dim = p_.layer.value_dim;
    for (int i = threadIdx.x; i < heads_ * dim; i += blockDim.x) Merge(group, i / dim, i % dim);
  }

 private:
  // Number i of a head over all slots. Slots are read past level 1, which may hold what lay there
  // before other blocks wrote.
  __device__ void Merge(const DecodeGroup& group, int head, int i) {
    RunningSoftmax total;
    total.Clear();
    for (int s = 0; s < group.slot_count; ++s) {
      total.most =
          fmaxf(total.most, __ldcg(&workspace_.log_sums[SlotHead(group.slot_begin + s, head)]));
    }
    float out = 0;
    for (int s = 0; s < group.slot_count; ++s) {
      const int64_t at = SlotHead(group.slot_begin + s, head);
      const float weight = Exp2(__ldcg(&workspace_.log_sums[at]) - total.Base());
      total.sum += weight;
      out += weight * __ldcg(&workspace_.outs[at * p_.layer.value_dim + i]);
    }
    Write(head, i, total.sum == 0 ? 0 : out / total.sum);
    if (i == 0) WriteLse(head, total.LogSum());
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
