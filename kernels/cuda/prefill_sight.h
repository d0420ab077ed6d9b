// Which keys the rows of a prefill tile see. Internal.
//
// Thread safety: device code; values.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.h"
#include "kernels/cuda/prefill.h"

namespace larder::kernels::cuda {

struct PrefillSight {
  int32_t first = 0;  // position of the tile's first row
  int32_t last = 0;   // and of its last
  int32_t begin = 0;  // keys [begin, end) that any row may see
  int32_t end = 0;
  int32_t sinks_end = 0;  // keys before this one are visible whatever the window
  int32_t window = 0;     // 0: none

  __device__ PrefillSight(const PrefillParams& p, int32_t first_position, int32_t last_position)
      : first(first_position),
        last(last_position),
        begin(p.key_begin),
        end(min(last_position + 1, p.key_end)),
        sinks_end(p.window > 0 ? p.sinks : 0),
        window(p.window) {}

  // First key in the window of a row.
  __device__ int32_t WindowBegin(int32_t position) const {
    return window > 0 ? position - window + 1 : 0;
  }
  __device__ bool SeenByAny(int32_t key) const {
    return key >= begin && key < end && (key >= WindowBegin(first) || key < sinks_end);
  }
  // Without a branch, hence & and |, and with nothing to keep for a row but its position.
  __device__ bool Seen(int32_t key, int32_t position) const {
    const uint32_t reach = window > 0 ? static_cast<uint32_t>(window) : 1u << 31;
    const bool in_window = static_cast<uint32_t>(position - key) < reach;  // and not past position
    const bool in_sinks = (key < sinks_end) & (key <= position);
    return (key >= begin) & (key < end) & (in_window | in_sinks);
  }
  // Whether every row sees all of [key, key + count).
  __device__ bool AllSeen(int32_t key, int32_t count) const {
    return key >= begin && key + count <= end && key + count <= first + 1 &&
           key >= WindowBegin(last);
  }
  // The tile from `tile` on that has a key which some row sees; they end at `end`.
  __device__ int32_t NextTile(int32_t tile, int32_t keys) const {
    const int32_t key = max(tile * keys, begin);
    if (key < sinks_end || key >= WindowBegin(first)) return max(tile, begin / keys);
    return WindowBegin(first) / keys;
  }
};

}  // namespace larder::kernels::cuda
