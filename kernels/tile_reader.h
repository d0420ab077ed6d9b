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

// Where the keys or values of kTileTokens tokens lie.
struct TokenRows {
  const std::byte* numbers[kTileTokens];
  const std::byte* scales[kTileTokens];  // of quantised storage only
};

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
    if (!foreseen) Addresses(tile, *rows_);
    next_ = then;
    next_rows_ = then.seen == 0 ? rows_ : rows_ == &tables_[0] ? &tables_[1] : &tables_[0];
    if (then.seen != 0) Addresses(then, *next_rows_);
    next_bytes_ = (then.value ? layer_.value_dim : layer_.key_dim) * bytes_;
  }

  // The rows of the tile turned to, by token. Of tokens that nobody sees, rows of one that somebody
  // does: their memory is never touched.
  const std::byte* const* rows() const { return rows_->numbers; }

  // Whether rows are codes, which only Stage makes numbers of.
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

  // Converts `count` numbers of each row that is seen to stage_, split or as they are, with zeros
  // up to a whole vector; rows() then lie there. Codes are never split.
  void Stage(const TileRead& tile, int32_t count, bool split) {
    for (uint32_t left = tile.seen; left != 0; left &= left - 1) {
      const int32_t i = __builtin_ctz(left);
      StageToken(i, count, split);
    }
    const int32_t first = __builtin_ctz(tile.seen);
    for (int32_t i = 0; i < kTileTokens; ++i) {
      const int32_t at = (tile.seen >> i & 1) != 0 ? i : first;
      rows_->numbers[i] = reinterpret_cast<const std::byte*>(stage_ + at * stage_stride_);
    }
  }

  // The hardware sees no pattern across blocks and heads. So each tile's memory is asked for while
  // the one before it is worked on, at the pace of that work: level 1 can wait for 24 lines only,
  // and waits for none longer than it takes to find them if level 2 is what they are asked into.
  // Inlined always: GCC takes a function that only asks for lines for one without effect, and drops
  // its calls.
  [[gnu::always_inline]] void FetchLine(int32_t i, int32_t offset_bytes) const {
    __builtin_prefetch(next_rows_->numbers[i] + offset_bytes, 0, 2);
  }
  [[gnu::always_inline]] void FetchRow(int32_t i) const {
    if (next_.seen == 0) return;
    for (int32_t at = 0; at < next_bytes_; at += 64) FetchLine(i, at);
    if (quantised_) __builtin_prefetch(next_rows_->scales[i], 0, 2);
  }

 private:
  void StageToken(int32_t i, int32_t count, bool split) {
    const std::byte* const from = rows_->numbers[i];
    float* const to = stage_ + i * stage_stride_;
    if (!quantised_) return StageRow<V>(layer_.dtype, split, from, to, count);
    float scale;
    std::memcpy(&scale, rows_->scales[i], sizeof(scale));
    if (layer_.dtype == DType::kI8) return StageCodes<V, DType::kI8>(from, scale, to, count);
    StageCodes<V, DType::kF8E4M3>(from, scale, to, count);
  }

  void Addresses(const TileRead& tile, TokenRows& rows) const {
    const uint32_t seen = tile.seen;
    const int32_t first = __builtin_ctz(seen);
    const int32_t end = kTileTokens - __builtin_clz(seen);
    const int64_t head = (tile.value ? layer_.value_offset_bytes : layer_.key_offset_bytes) +
                         tile.kv_head * layer_.head_stride_bytes;
    const int64_t scales =
        (tile.value ? layer_.value_scale_offset_bytes : layer_.key_scale_offset_bytes) +
        tile.kv_head * layer_.head_scale_stride_bytes;
    int64_t block = (tile.token + first) / layer_.block_tokens;
    int64_t slot = (tile.token + first) % layer_.block_tokens;
    for (int32_t i = first; i < end; ++block, slot = 0) {
      // As a number, since the address may be of a block that is gone.
      const auto base = reinterpret_cast<uintptr_t>(tile_.chunk->blocks[block]);
      auto at = base + static_cast<uintptr_t>(head + slot * layer_.token_stride_bytes);
      const int64_t left = layer_.block_tokens - slot;
      const int32_t run_end = left < end - i ? i + static_cast<int32_t>(left) : end;
      if (quantised_) ScaleAddresses(base + static_cast<uintptr_t>(scales), slot, i, run_end, rows);
      for (; i < run_end; ++i, at += static_cast<uintptr_t>(layer_.token_stride_bytes)) {
        rows.numbers[i] = reinterpret_cast<const std::byte*>(at);
      }
    }
    if (seen == kAllTokens) return;
    for (uint32_t left = ~seen; left != 0; left &= left - 1) {
      rows.numbers[__builtin_ctz(left)] = rows.numbers[first];
      rows.scales[__builtin_ctz(left)] = rows.scales[first];
    }
  }

  // Of tokens [begin, end) of the tile, the first of which is the block's token `slot`.
  void ScaleAddresses(uintptr_t scales, int64_t slot, int32_t begin, int32_t end,
                      TokenRows& rows) const {
    for (int32_t i = begin; i < end; ++i, ++slot) {
      rows.scales[i] =
          reinterpret_cast<const std::byte*>(scales + static_cast<uintptr_t>(slot * kScaleBytes));
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
  TokenRows tables_[2] = {};
  TokenRows* rows_ = &tables_[0];
  TileRead next_;
  TokenRows* next_rows_ = &tables_[1];  // rows_ where nothing of it is seen
  int32_t next_bytes_ = 0;              // of each row
};

}  // namespace larder::kernels
