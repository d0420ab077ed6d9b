// How tiles of keys and values come to a prefill block: addresses two tiles ahead, copies one
// ahead. Internal.
//
// Thread safety: device code.
#pragma once

#include "kernels/cuda/device.h"
#include "kernels/cuda/key_rows.h"
#include "kernels/cuda/prefill.h"
#include "kernels/cuda/prefill_shape.h"
#include "kernels/cuda/prefill_sight.h"
#include "kernels/cuda/ptx.h"

namespace larder::kernels::cuda {

// Addresses of the keys of a tile and of their scales, two tiles at a time; 0: nobody sees it.
template <typename Shape>
struct PrefillAddresses {
  unsigned long long of[2][Shape::kKeys];
  unsigned long long scale_of[2][Shape::kQuantised ? Shape::kKeys : 1];
};

// Brings tiles to their stages.
template <typename Shape>
class PrefillFetcher {
 public:
  __device__ PrefillFetcher(const PrefillParams& p, const SequenceChunk& chunk, int kv_head,
                            const PrefillSight& sight, std::byte* stages)
      : layer_(p.layer),
        blocks_(chunk.blocks),
        head_offset_(p.layer.key_offset_bytes + kv_head * p.layer.head_stride_bytes),
        scale_offset_(p.layer.key_scale_offset_bytes + kv_head * p.layer.head_scale_stride_bytes),
        sight_(sight),
        stages_(stages),
        addresses_(StaticShared<PrefillAddresses<Shape>>()) {}

  // Where this thread's key of the next tile lies. Ends at the last key.
  __device__ KeyPlace LookUp() {
    looked_up_ = sight_.NextTile(looked_up_ + 1, Shape::kKeys);
    const int32_t key = looked_up_ * Shape::kKeys + static_cast<int32_t>(threadIdx.x);
    if (threadIdx.x >= Shape::kKeys || !sight_.SeenByAny(key)) return {};
    return LookUpPlace(blocks_, key, layer_.block_tokens);
  }

  // Its addresses, into the slot that is the tile's turn. Apart from LookUp, and as late as can be:
  // this waits for the table.
  __device__ void Store(const KeyPlace& place) {
    if (threadIdx.x < Shape::kKeys) {
      const bool seen = place.slot >= 0;
      addresses_.of[slot_][threadIdx.x] =
          seen ? place.block + head_offset_ + place.slot * layer_.token_stride_bytes : 0;
      if constexpr (Shape::kQuantised) {
        addresses_.scale_of[slot_][threadIdx.x] =
            seen ? place.block + scale_offset_ + place.slot * kScaleBytes : 0;
      }
    }
    slot_ ^= 1;
  }

  // Asks for the tile whose addresses lie in `slot`. What nobody sees becomes zero.
  __device__ void Fetch(int slot) {
    constexpr int kChunks = Shape::kStoredBytes / 16;
    const int64_t value_delta = layer_.value_offset_bytes - layer_.key_offset_bytes;
    std::byte* const stage = stages_ + slot * Shape::kStageBytes;
#pragma unroll
    for (int i = 0; i < Shape::kKeys * kChunks / Shape::kThreads; ++i) {
      const auto [key, chunk] = RowChunkOf<Shape::kThreads, kChunks>(i, threadIdx.x);
      const unsigned column = chunk * 16;
      const unsigned long long row = addresses_.of[slot][key];
      // Sums of integers: what is not visible has no address to add to.
      const unsigned long long from = row + column;
      std::byte* const to = stage + key * Shape::kStageRowBytes + column;
      CopyAsync16(to, reinterpret_cast<const std::byte*>(from), row != 0);
      CopyAsync16(to + Shape::kHalfStageBytes,
                  reinterpret_cast<const std::byte*>(from + value_delta), row != 0);
    }
    if constexpr (Shape::kQuantised) FetchScales(slot, stage + Shape::kScalesAt);
    CopyAsyncCommit();
  }

 private:
  static_assert(Shape::kKeys * (Shape::kStoredBytes / 16) % Shape::kThreads == 0);

  // A thread a scale: keys', then values'.
  __device__ void FetchScales(int slot, std::byte* to) {
    static_assert(2 * Shape::kKeys <= Shape::kThreads);
    const int i = static_cast<int>(threadIdx.x);
    if (i >= 2 * Shape::kKeys) return;
    const int key = i % Shape::kKeys;
    const unsigned long long scale = addresses_.scale_of[slot][key];
    const int64_t delta =
        i < Shape::kKeys ? 0 : layer_.value_scale_offset_bytes - layer_.key_scale_offset_bytes;
    CopyAsync4(to + i * kScaleBytes, reinterpret_cast<const std::byte*>(scale + delta), scale != 0);
  }

  const KvLayer& layer_;
  std::byte* const* const blocks_;
  const int64_t head_offset_;
  const int64_t scale_offset_;
  const PrefillSight& sight_;
  std::byte* const stages_;
  PrefillAddresses<Shape>& addresses_;
  int32_t looked_up_ = -1;
  int slot_ = 0;
};

}  // namespace larder::kernels::cuda
