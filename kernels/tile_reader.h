// What a tile of rows sees of its sequence, and how it gets there: masks, addresses, conversion,
// prefetching. Internal to kernels/, over a vector type V (vector_math.h).
//
// Thread safety: one thread's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/variant.h"
#include "kernels/vector_math.h"

namespace larder::kernels {

inline constexpr int32_t kLineBytes = 64;

// Keys or values of the tile that starts at `token`, of those tokens that a bit of `seen` is set
// for.
struct TileRead {
  int64_t token = 0;
  uint32_t seen = 0;
  int32_t kv_head = 0;
  bool value = false;
};

template <typename V>
class TileReader {
 public:
  // `stage` is scratch: [kTileTokens][stage_stride].
  TileReader(const AttendTile& tile, float* stage, int64_t stage_stride)
      : tile_(tile),
        params_(*tile.params),
        layer_(tile.params->layer),
        quantised_(layer_.dtype == DType::kF8E4M3 || layer_.dtype == DType::kI8),
        bytes_(layer_.dtype == DType::kF32 ? 4
               : quantised_                ? 1
                                           : 2),
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

  // Turns to a tile, of which something is seen; `then` is the one to turn to next, and may be of
  // nothing.
  void Turn(const TileRead& tile, const TileRead& then) {
    const bool foreseen = next_.token == tile.token && next_.seen == tile.seen &&
                          next_.kv_head == tile.kv_head && next_.value == tile.value;
    rows_ = foreseen ? next_rows_ : rows_;
    if (!foreseen) Addresses(tile, rows_);
    next_ = then;
    next_rows_ = then.seen == 0 ? rows_ : rows_ == tables_[0] ? tables_[1] : tables_[0];
    if (then.seen != 0) Addresses(then, next_rows_);
    next_bytes_ = (then.value ? layer_.value_dim : layer_.key_dim) * bytes_;
  }

  // The rows of the tile turned to, by token. Of tokens that nobody sees, rows of one that somebody
  // does: their memory is never touched.
  const std::byte* const* rows() const { return rows_; }

  bool quantised() const { return quantised_; }

  // Converts the keys to float32 in stage_ and rotates them; rows() then lie there.
  void Rotate(const TileRead& tile) {
    const KeyRotation& rotation = params_.rotation;
    Stage(tile, layer_.key_dim, false);
    for (uint32_t left = tile.seen; left != 0; left &= left - 1) {
      const int32_t i = __builtin_ctz(left);
      RotateHalves<V>(stage_ + i * stage_stride_ + rotation.begin,
                      rotation.cos_sin + (tile.token + i) * rotation.dim, rotation.dim);
    }
  }

  // Converts `count` numbers of each row that is seen to stage_, in the order of their storage type
  // (split) or in their own, with zeros up to a whole vector; rows() then lie there.
  void Stage(const TileRead& tile, int32_t count, bool split) {
    for (uint32_t left = tile.seen; left != 0; left &= left - 1) {
      const int32_t i = __builtin_ctz(left);
      StageRow<V>(layer_.dtype, split, rows_[i], stage_ + i * stage_stride_, count);
    }
    const int32_t first = __builtin_ctz(tile.seen);
    for (int32_t i = 0; i < kTileTokens; ++i) {
      const int32_t at = (tile.seen >> i & 1) != 0 ? i : first;
      rows_[i] = reinterpret_cast<const std::byte*>(stage_ + at * stage_stride_);
    }
  }

  // Of quantised storage: the scales of `tiles` tiles, the first of which is `first` but for its
  // `seen`; of those tokens that a bit of `seen` [tiles] is set for, and zeros for the others. Turn
  // has asked for them when it turned to the tiles' keys.
  void Scales(const TileRead& first, int32_t tiles, const uint32_t* seen, float* to) const {
    const int64_t scales = ScalesOf(first.kv_head, first.value);
    int64_t token = first.token;
    for (int32_t tile = 0; tile < tiles; ++tile, token += kTileTokens, to += kTileTokens) {
      const uint32_t bits = seen[tile];
      if (bits != kAllTokens) std::memset(to, 0, sizeof(float) * kTileTokens);
      if (bits == 0) continue;
      ForEachBlock(token, bits, [&](uintptr_t block, int64_t slot, int32_t begin, int32_t end) {
        const auto* const from = reinterpret_cast<const std::byte*>(
            block + static_cast<uintptr_t>(scales + slot * kScaleBytes));
        const int32_t count = end - begin;
        uint32_t left = bits >> begin & kAllTokens >> (kTileTokens - count);
        if (left == kAllTokens >> (kTileTokens - count)) {
          for (int32_t i = 0; i < count; i += V::kLanes) {
            StoreFloats<V>(to + begin + i,
                           LoadSome<V, DType::kF32>(from + i * kScaleBytes, count - i), count - i);
          }
          return;
        }
        for (; left != 0; left &= left - 1) {
          const int32_t i = __builtin_ctz(left);
          std::memcpy(to + begin + i, from + i * kScaleBytes, kScaleBytes);
        }
      });
    }
  }

  // The hardware sees no pattern across blocks and heads. So each tile's memory is asked for while
  // the one before it is worked on, at the pace of that work: level 1 can wait for 24 lines only,
  // and waits for none longer than it takes to find them if level 2 is what they are asked into.
  // Inlined always: GCC takes a function that only asks for lines for one without effect, and drops
  // its calls.
  [[gnu::always_inline]] void FetchLine(int32_t i, int32_t offset_bytes) const {
    __builtin_prefetch(next_rows_[i] + offset_bytes, 0, 2);
  }
  [[gnu::always_inline]] void FetchRow(int32_t i) const {
    if (next_.seen == 0) return;
    for (int32_t at = 0; at < next_bytes_; at += kLineBytes) FetchLine(i, at);
  }

 private:
  // Block's start to the scale of its first key or value of a kv head.
  int64_t ScalesOf(int32_t kv_head, bool value) const {
    return (value ? layer_.value_scale_offset_bytes : layer_.key_scale_offset_bytes) +
           kv_head * layer_.head_scale_stride_bytes;
  }

  void Addresses(const TileRead& tile, const std::byte** rows) const {
    const int64_t head = (tile.value ? layer_.value_offset_bytes : layer_.key_offset_bytes) +
                         tile.kv_head * layer_.head_stride_bytes;
    ForEachBlock(
        tile.token, tile.seen, [&](uintptr_t block, int64_t slot, int32_t begin, int32_t end) {
          auto at = block + static_cast<uintptr_t>(head + slot * layer_.token_stride_bytes);
          for (int32_t i = begin; i < end; ++i) {
            rows[i] = reinterpret_cast<const std::byte*>(at);
            at += static_cast<uintptr_t>(layer_.token_stride_bytes);
          }
          if (quantised_ && !tile.value) FetchScales(tile.kv_head, block, slot, end - begin);
        });
    if (tile.seen == kAllTokens) return;
    const int32_t first = __builtin_ctz(tile.seen);
    for (uint32_t left = ~tile.seen; left != 0; left &= left - 1) {
      rows[__builtin_ctz(left)] = rows[first];
    }
  }

  // Of keys and of values, for the softmax between the two.
  [[gnu::always_inline]] void FetchScales(int32_t kv_head, uintptr_t block, int64_t slot,
                                          int32_t count) const {
    for (const bool value : {false, true}) {
      const auto* const at = reinterpret_cast<const std::byte*>(
          block + static_cast<uintptr_t>(ScalesOf(kv_head, value) + slot * kScaleBytes));
      for (int32_t i = 0; i < count * kScaleBytes; i += kLineBytes) {
        __builtin_prefetch(at + i, 0, 2);
      }
    }
  }

  // Calls f(address of block, first slot, begin, end) for tokens [begin, end) of a tile that lie in
  // one block, from the first one seen to the last.
  template <typename F>
  void ForEachBlock(int64_t token, uint32_t seen, const F& f) const {
    const int32_t first = __builtin_ctz(seen);
    const int32_t end = kTileTokens - __builtin_clz(seen);
    int64_t block = (token + first) / layer_.block_tokens;
    int64_t slot = (token + first) % layer_.block_tokens;
    for (int32_t i = first; i < end; ++block, slot = 0) {
      const int64_t left = layer_.block_tokens - slot;
      const int32_t run_end = left < end - i ? i + static_cast<int32_t>(left) : end;
      // As a number, since the address may be of a block that is gone.
      f(reinterpret_cast<uintptr_t>(tile_.chunk->blocks[block]), slot, i, run_end);
      i = run_end;
    }
  }

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
  const bool quantised_;
  const int32_t bytes_;  // of a stored number
  float* const stage_;
  const int64_t stage_stride_;
  const std::byte* tables_[2][kTileTokens] = {};
  const std::byte** rows_ = tables_[0];
  TileRead next_;
  const std::byte** next_rows_ = tables_[1];  // rows_ where nothing of it is seen
  int32_t next_bytes_ = 0;                    // of each row
};

}  // namespace larder::kernels
