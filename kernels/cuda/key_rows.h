// Where keys lie: a token to its place in a block, and to the address of its row.
//
// Thread safety: device code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device.h"
#include "kernels/cuda/plan.h"
#include "kernels/kv_layout.h"

namespace larder::kernels::cuda {

// Where a token lies. Carried as it was looked up: an address made of it at once would wait for the
// table.
struct KeyPlace {
  unsigned long long block = 0;  // first byte
  int32_t slot = -1;             // token in the block; -1: not visible, and not even looked up
};

// Tables are not written while a kernel reads them.
__device__ inline KeyPlace LookUpPlace(std::byte* const* blocks, int32_t token,
                                       int32_t block_tokens) {
  const int32_t block = token / block_tokens;
  return {__ldg(reinterpret_cast<const unsigned long long*>(blocks) + block),
          token - block * block_tokens};
}

class KeyRows {
 public:
  __device__ KeyRows(const KvLayer& layer, const SequenceChunk& chunk, const DecodePiece& piece,
                     int32_t window, int32_t sinks)
      : blocks_(chunk.blocks),
        offset_(layer.key_offset_bytes + piece.kv_head * layer.head_stride_bytes),
        token_stride_(layer.token_stride_bytes),
        block_tokens_(layer.block_tokens),
        begin_(piece.begin),
        end_(piece.end),
        sinks_end_(window > 0 ? sinks : 0),
        window_begin_(window > 0 ? piece.position - window + 1 : 0) {}

  __device__ bool Visible(int32_t token) const {
    return token >= begin_ && token < end_ && (token >= window_begin_ || token < sinks_end_);
  }

  __device__ KeyPlace Place(int32_t token) const {
    return Visible(token) ? LookUpPlace(blocks_, token, block_tokens_) : KeyPlace();
  }
  // The first byte of the token's key; 0: not visible.
  __device__ unsigned long long Key(const KeyPlace& place) const {
    return place.slot < 0 ? 0 : place.block + offset_ + place.slot * token_stride_;
  }

 private:
  std::byte* const* blocks_;
  int64_t offset_;
  int64_t token_stride_;
  int32_t block_tokens_;
  int32_t begin_;
  int32_t end_;
  int32_t sinks_end_;
  int32_t window_begin_;
};

}  // namespace larder::kernels::cuda
