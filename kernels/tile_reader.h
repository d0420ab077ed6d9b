// What a tile of rows sees of its sequence, and how it gets there: masks, addresses, conversion,
// prefetching. Internal to kernels/, over a vector type V (vector_math.h).
//
// Thread safety: one thread's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/variant.h"
#include "kernels/vector_math.h"

namespace larder::kernels {

// Addresses of the keys or values of kTileTokens tokens.
using TokenRows = const std::byte* [kTileTokens];

template <typename V>
class TileReader {
 public:
  // `stage` is scratch: [kTileTokens][stage_stride].
  TileReader(const AttendTile& tile, float* stage, int64_t stage_stride)
      : tile_(tile),
        params_(*tile.params),
        layer_(tile.params->layer),
        bytes_(layer_.dtype == DType::kF32 ? 4 : 2),
        stage_(stage),
        stage_stride_(stage_stride) {}

  // Which tokens of the tile that starts at `token` are visible at `position`, a bit each.
  uint32_t Visible(int32_t position, int64_t token) const {
    const int64_t end = int64_t{position} + 1;
    uint32_t bits = Bits(token, params_.key_begin, end < params_.key_end ? end : params_.key_end);
    if (params_.window > 0) {
      bits &= Bits(token, 0, params_.sinks) | Bits(token, end - params_.window, end);
    }
    return bits;
  }

  // Addresses of a tile's rows of K or V. Tokens that nobody sees get the address of one that
  // somebody does: their memory is never touched.
  void Addresses(int64_t token, uint32_t seen, bool value, TokenRows& rows) const {
    const int32_t first = __builtin_ctz(seen);
    const int32_t end = kTileTokens - __builtin_clz(seen);
    const int64_t head = (value ? layer_.value_offset_bytes : layer_.key_offset_bytes) +
                         tile_.kv_head * layer_.head_stride_bytes;
    int64_t block = (token + first) / layer_.block_tokens;
    int64_t slot = (token + first) % layer_.block_tokens;
    for (int32_t i = first; i < end; ++i) {
      const bool touched = (seen >> i & 1) != 0;
      rows[i] = touched ? tile_.chunk->blocks[block] + head + slot * layer_.token_stride_bytes
                        : rows[first];
      if (++slot == layer_.block_tokens) {
        slot = 0;
        ++block;
      }
    }
    for (int32_t i = 0; i < first; ++i) rows[i] = rows[first];
    for (int32_t i = end; i < kTileTokens; ++i) rows[i] = rows[first];
  }

  // Converts the keys of `rows` to float32 in stage_ and rotates them; `rows` then lie there.
  void Rotate(int64_t token, uint32_t seen, TokenRows& rows) {
    const KeyRotation& rotation = params_.rotation;
    Stage(seen, rows, layer_.key_dim);
    for (uint32_t left = seen; left != 0; left &= left - 1) {
      const int32_t i = __builtin_ctz(left);
      RotateHalves<V>(stage_ + i * stage_stride_ + rotation.begin,
                      rotation.cos_sin + (token + i) * rotation.dim, rotation.dim);
    }
  }

  // Converts `count` numbers of each row that is seen to stage_; `rows` then lie there.
  void Stage(uint32_t seen, TokenRows& rows, int32_t count) {
    for (uint32_t left = seen; left != 0; left &= left - 1) {
      const int32_t i = __builtin_ctz(left);
      LoadRow<V>(layer_.dtype, rows[i], stage_ + i * stage_stride_, count);
    }
    const int32_t first = __builtin_ctz(seen);
    for (int32_t i = 0; i < kTileTokens; ++i) {
      const int32_t at = (seen >> i & 1) != 0 ? i : first;
      rows[i] = reinterpret_cast<const std::byte*>(stage_ + at * stage_stride_);
    }
  }

  // The hardware sees no pattern across blocks and heads, and none in the order in which keys are
  // packed. So each tile's memory is asked for while the one before it is worked on, row by row
  // in the order of addresses, which is what the hardware's own streams then follow. Into the level
  // 2 cache: level 1 can wait for 24 lines only, and at 100 ns a line that is half of what one
  // thread can read.
  void LookAhead(int64_t token, uint32_t seen, bool value) {
    ahead_ = seen != 0;
    if (!ahead_) return;
    Addresses(token, seen, value, next_);
    next_bytes_ = (value ? layer_.value_dim : layer_.key_dim) * bytes_;
  }

  // Whether LookAhead found a tile. Its row i is then asked for by FetchRow(i).
  bool ahead() const { return ahead_; }
  void FetchRow(int32_t i) const {
    for (int32_t at = 0; at < next_bytes_; at += 64) __builtin_prefetch(next_[i] + at, 0, 2);
  }

 private:
  static constexpr uint32_t kAllTokens = ~uint32_t{0};
  static_assert(kTileTokens == 32, "a mask has a bit a token");

  // Bits of the tokens of [begin, end) in the tile that starts at `token`.
  static uint32_t Bits(int64_t token, int64_t begin, int64_t end) {
    begin = begin < token ? 0 : begin - token;
    end = end > token + kTileTokens ? kTileTokens : end - token;
    if (begin >= end) return 0;
    return (kAllTokens >> (kTileTokens - (end - begin))) << begin;
  }

  const AttendTile& tile_;
  const AttentionParams& params_;
  const KvLayer& layer_;
  const int32_t bytes_;  // of a stored number
  float* const stage_;
  const int64_t stage_stride_;
  bool ahead_ = false;      // next_ is set
  TokenRows next_;          // of the tile that is read next
  int32_t next_bytes_ = 0;  // of each row
};

}  // namespace larder::kernels
