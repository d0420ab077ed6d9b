// Where the keys of one piece lie: a lane's token to the address of its row in a block.
//
// Thread safety: device code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device.h"
#include "kernels/cuda/plan.h"
#include "kernels/kv_layout.h"

namespace larder::kernels::cuda {

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

  // The first byte of a token's key; null: not visible, and its block is not even looked up.
  __device__ const std::byte* Key(int32_t token) const {
    if (!Visible(token)) return nullptr;
    const int32_t block = token / block_tokens_;
    return blocks_[block] + offset_ + (token - block * block_tokens_) * token_stride_;
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
