#include "kernels/cuda/plan.h"

#include <algorithm>
#include <cstddef>
#include <functional>

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

int32_t Aligned(int64_t tokens) {
  return static_cast<int32_t>(CeilDiv(tokens, kAlignTokens) * kAlignTokens);
}

// The visible keys of a row: at most its sinks and its window, in this order. Both may be empty.
struct Visible {
  Range ranges[2];

  int32_t tokens() const { return ranges[0].tokens() + ranges[1].tokens(); }
  // The shortest pieces that keep rule 4. Each of the two ranges may be cut short at both ends.
  int32_t PieceTokensLeast() const { return Aligned(CeilDiv(tokens(), kGroupPiecesMax - 4)); }
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

// The work of one kv head, cut to pieces of a length. Heads have the same, so each has its share of
// the blocks that run at once.
class Schedule {
 public:
  Schedule(std::span<const Visible> rows, const DecodePlanOptions& o)
      : rows_(rows), places_(std::max(1, o.blocks_at_once / std::max(1, o.kv_heads))) {}

  // No order of the pieces ends sooner. Grows as pieces get shorter.
  int64_t Least(int32_t piece_tokens) const {
    int64_t cost = 0;
    for (const Visible& row : rows_) {
      for (const Range& range : row.ranges) {
        cost += range.tokens() + PiecesOf(range, piece_tokens) * kPieceCostTokens;
      }
    }
    return CeilDiv(cost, places_);
  }

  // When the last block ends if each piece starts where one ends first, longest first (rule 3), in
  // keys.
  int64_t Makespan(int32_t piece_tokens) {
    rest_.clear();
    int64_t full = 0;
    for (const Visible& row : rows_) {
      for (const Range& range : row.ranges) full += CountFull(range, piece_tokens);
    }
    std::sort(rest_.begin(), rest_.end(), std::greater<>());
    // Full pieces go round; the others to whoever is free first.
    const int64_t each = piece_tokens + kPieceCostTokens;
    ends_.assign(places_, full / places_ * each);
    for (int64_t i = 0; i < full % places_; ++i) ends_[i] += each;
    int64_t last = *std::max_element(ends_.begin(), ends_.end());
    std::make_heap(ends_.begin(), ends_.end(), std::greater<>());
    for (const int32_t tokens : rest_) {
      std::pop_heap(ends_.begin(), ends_.end(), std::greater<>());
      ends_.back() += tokens + kPieceCostTokens;
      last = std::max(last, ends_.back());
      std::push_heap(ends_.begin(), ends_.end(), std::greater<>());
    }
    return last;
  }

 private:
  // Whole pieces of a range; those that are cut short go to rest_.
  int64_t CountFull(const Range& range, int32_t piece_tokens) {
    if (range.tokens() == 0) return 0;
    const int64_t first = CeilDiv(range.begin, piece_tokens) * piece_tokens;
    const int64_t last = range.end / piece_tokens * int64_t{piece_tokens};
    if (last < first) {
      rest_.push_back(range.tokens());
      return 0;
    }
    if (first > range.begin) rest_.push_back(static_cast<int32_t>(first - range.begin));
    if (range.end > last) rest_.push_back(static_cast<int32_t>(range.end - last));
    return (last - first) / piece_tokens;
  }

  const std::span<const Visible> rows_;
  const int64_t places_;
  std::vector<int32_t> rest_;
  std::vector<int64_t> ends_;
};

// The same for all rows. `longest`: the row that sees most.
int32_t ChoosePieceTokens(std::span<const Visible> rows, const DecodePlanOptions& o,
                          const Visible& longest) {
  if (o.piece_tokens > 0) return o.piece_tokens;
  const int32_t shortest = std::max(kPieceTokensMin, longest.PieceTokensLeast());
  Schedule schedule(rows, o);
  // From one piece a row down in steps of a sixteenth, while shorter pieces can still win.
  int32_t tokens = std::max(shortest, Aligned(longest.tokens()));
  int32_t best = tokens;
  int64_t best_cost = schedule.Makespan(tokens);
  while (tokens > shortest && schedule.Least(tokens) < best_cost) {
    tokens = std::max(shortest, Aligned(int64_t{tokens} * 15 / 16 - kAlignTokens));
    const int64_t cost = schedule.Makespan(tokens);
    if (cost >= best_cost) continue;
    best = tokens;
    best_cost = cost;
  }
  return best;
}

// Pieces of a row and kv head.
void Cut(const DecodeRow& row, int32_t kv_head, const Visible& visible, DecodePlan& plan) {
  DecodePiece piece{
      .chunk = row.chunk, .row = row.row, .position = row.position, .kv_head = kv_head};
  const size_t first = plan.pieces.size();
  // Longer for this row alone: other rows' pieces are none of its business (rule 2).
  const int64_t piece_tokens = std::max(plan.piece_tokens, visible.PieceTokensLeast());
  for (const Range& range : visible.ranges) {
    for (int32_t begin = range.begin; begin < range.end; begin = piece.end) {
      piece.begin = begin;
      const int64_t next = (begin / piece_tokens + 1) * piece_tokens;
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
  Visible longest = {};
  for (const DecodeRow& row : rows) {
    visible.push_back(VisibleKeys(row.position, options));
    if (visible.back().tokens() > longest.tokens()) longest = visible.back();
  }
  DecodePlan plan;
  plan.piece_tokens = ChoosePieceTokens(visible, options, longest);
  for (size_t i = 0; i < rows.size(); ++i) {
    for (int32_t head = 0; head < options.kv_heads; ++head) Cut(rows[i], head, visible[i], plan);
  }
  std::stable_sort(
      plan.pieces.begin(), plan.pieces.end(),
      [](const DecodePiece& a, const DecodePiece& b) { return a.end - a.begin > b.end - b.begin; });
  return plan;
}

}  // namespace larder::kernels::cuda
