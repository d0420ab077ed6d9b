#include "kernels/cuda/plan.h"

#include <algorithm>
#include <cstddef>

namespace larder::kernels::cuda {
namespace {

// What a warp takes at a time, times the warps of a block: no piece is cut finer.
constexpr int32_t kAlignTokens = 64;

struct Range {
  int32_t begin = 0;
  int32_t end = 0;
  int32_t tokens() const { return end - begin; }
};

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The visible keys of a row: at most its sinks and its window, in this order. Both may be empty.
struct Visible {
  Range ranges[2];
};

Visible VisibleKeys(int32_t position, const DecodePlanOptions& o) {
  const int32_t all = position + 1;
  const int32_t window_begin = o.window > 0 ? std::max(0, all - o.window) : 0;
  const int32_t sinks_end = std::min(o.sinks, window_begin);
  const auto clipped = [&](int32_t begin, int32_t end) {
    begin = std::max(begin, o.key_begin);
    end = std::min(end, o.key_end);
    return Range{std::min(begin, std::max(end, 0)), std::max(end, 0)};
  };
  // A gap that a block would step over anyway is not worth a piece.
  if (window_begin - sinks_end < kAlignTokens) {
    return {{clipped(0, 0), clipped(sinks_end > 0 ? 0 : window_begin, all)}};
  }
  return {{clipped(0, sinks_end), clipped(window_begin, all)}};
}

int64_t PiecesOf(const Range& range, int32_t piece_tokens) {
  if (range.tokens() == 0) return 0;
  return (range.end - 1) / piece_tokens - range.begin / piece_tokens + 1;
}

// What no schedule of pieces of this length can beat, in keys. Few schedules of rule 3 are far off.
int64_t Makespan(std::span<const Visible> rows, const DecodePlanOptions& o, int32_t piece_tokens) {
  int64_t pieces = 0;
  int64_t full = 0;
  int64_t tokens = 0;
  int32_t longest = 0;
  for (const Visible& row : rows) {
    for (const Range& range : row.ranges) {
      pieces += PiecesOf(range, piece_tokens);
      full += range.tokens() / piece_tokens;
      tokens += range.tokens();
      longest = std::max(longest, range.tokens());
    }
  }
  const int64_t waves = CeilDiv(full * o.kv_heads, o.blocks_at_once);
  const int64_t even =
      CeilDiv((tokens + pieces * kPieceCostTokens) * o.kv_heads, o.blocks_at_once);
  return std::max({waves * (piece_tokens + kPieceCostTokens), even,
                   int64_t{std::min(longest, piece_tokens)} + kPieceCostTokens});
}

// `longest`: the most keys that a row sees. Each of its two ranges may be cut short at both ends.
int32_t ChoosePieceTokens(std::span<const Visible> rows, const DecodePlanOptions& o,
                          int32_t longest) {
  const auto least = static_cast<int32_t>(
      CeilDiv(CeilDiv(longest, kGroupPiecesMax - 4), kAlignTokens) * kAlignTokens);
  if (o.piece_tokens > 0) return std::max(o.piece_tokens, least);
  // One piece a row, unless a finer cut wins by more than it is likely to cost.
  int32_t best = static_cast<int32_t>(CeilDiv(longest, kAlignTokens) * kAlignTokens);
  best = std::max(best, kPieceTokensMin);
  int64_t best_cost = Makespan(rows, o, best);
  for (int32_t power = kPieceTokensMin; power < longest; power *= 2) {
    for (const int32_t tokens : {power, power / 2 * 3}) {
      if (tokens < least || tokens >= longest) continue;
      const int64_t cost = Makespan(rows, o, tokens);
      if (cost < best_cost || (cost == best_cost && tokens > best)) {
        best = tokens;
        best_cost = cost;
      }
    }
  }
  return best;
}

// Pieces of a row and kv head.
void Cut(const DecodeRow& row, int32_t kv_head, const Visible& visible, DecodePlan& plan) {
  DecodePiece piece{.chunk = row.chunk, .row = row.row, .position = row.position, .kv_head = kv_head};
  const size_t first = plan.pieces.size();
  for (const Range& range : visible.ranges) {
    for (int32_t begin = range.begin; begin < range.end; begin = piece.end) {
      piece.begin = begin;
      const int64_t next = (int64_t{begin} / plan.piece_tokens + 1) * plan.piece_tokens;
      piece.end = static_cast<int32_t>(std::min<int64_t>(next, range.end));
      plan.pieces.push_back(piece);
    }
  }
  const auto count = static_cast<int32_t>(plan.pieces.size() - first);
  if (count == 0) {
    piece.begin = piece.end = 0;
    plan.pieces.push_back(piece);
  }
  if (count < 2) return;
  for (size_t i = first; i < plan.pieces.size(); ++i) {
    plan.pieces[i].group = static_cast<int32_t>(plan.groups.size());
    plan.pieces[i].slot = plan.slots + static_cast<int32_t>(i - first);
  }
  plan.groups.push_back({plan.slots, count});
  plan.slots += count;
}

}  // namespace

DecodePlan PlanDecode(std::span<const DecodeRow> rows, const DecodePlanOptions& options) {
  std::vector<Visible> visible;
  visible.reserve(rows.size());
  int32_t longest = 1;
  for (const DecodeRow& row : rows) {
    visible.push_back(VisibleKeys(row.position, options));
    const Range(&ranges)[2] = visible.back().ranges;
    longest = std::max(longest, ranges[0].tokens() + ranges[1].tokens());
  }
  DecodePlan plan;
  plan.piece_tokens = ChoosePieceTokens(visible, options, longest);
  for (size_t i = 0; i < rows.size(); ++i) {
    for (int32_t head = 0; head < options.kv_heads; ++head) Cut(rows[i], head, visible[i], plan);
  }
  std::stable_sort(plan.pieces.begin(), plan.pieces.end(),
                   [](const DecodePiece& a, const DecodePiece& b) {
                     return a.end - a.begin > b.end - b.begin;
                   });
  return plan;
}

}  // namespace larder::kernels::cuda
