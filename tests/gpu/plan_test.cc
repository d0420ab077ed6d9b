// PlanDecode against its numbered rules, on random batches.
#include "kernels/cuda/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <ostream>
#include <queue>
#include <random>
#include <tuple>
#include <vector>

namespace larder::kernels::cuda {

static std::ostream& operator<<(std::ostream& out, const DecodePlanOptions& o) {
  return out << "{" << o.kv_heads << ", " << o.window << ", " << o.sinks << ", " << o.key_begin
             << ", " << o.key_end << ", " << o.blocks_at_once << ", " << o.piece_tokens << "}";
}

namespace {

constexpr int32_t kNoEnd = std::numeric_limits<int32_t>::max();

std::vector<DecodeRow> RowsAt(const std::vector<int32_t>& positions) {
  std::vector<DecodeRow> rows;
  for (const int32_t position : positions) {
    const auto i = static_cast<int32_t>(rows.size());
    rows.push_back({i, i, position});
  }
  return rows;
}

// When blocks start in the plan's order, each where one ends first: when the last one ends, in
// keys.
int64_t Makespan(const DecodePlan& plan, int32_t blocks_at_once) {
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>> ends;
  int64_t last = 0;
  for (const DecodePiece& piece : plan.pieces) {
    int64_t start = 0;
    if (static_cast<int32_t>(ends.size()) == blocks_at_once) {
      start = ends.top();
      ends.pop();
    }
    ends.push(start + piece.end - piece.begin + kPieceCostTokens);
    last = std::max(last, start + piece.end - piece.begin + kPieceCostTokens);
  }
  return last;
}

void ExpectRules(const std::vector<DecodeRow>& rows, const DecodePlanOptions& o,
                 const DecodePlan& plan) {
  std::map<std::tuple<int32_t, int32_t>, std::vector<DecodePiece>> by_row;
  int32_t before = kNoEnd;
  for (const DecodePiece& piece : plan.pieces) {
    ASSERT_LE(piece.end - piece.begin, before) << "rule 3";
    before = piece.end - piece.begin;
    by_row[{piece.row, piece.kv_head}].push_back(piece);
  }
  ASSERT_EQ(by_row.size(), rows.size() * o.kv_heads);
  std::vector<int> slots(plan.slots);
  for (const DecodeRow& row : rows) {
    for (int32_t head = 0; head < o.kv_heads; ++head) {
      std::vector<DecodePiece>& pieces = by_row[{row.row, head}];
      std::sort(pieces.begin(), pieces.end(),
                [](const auto& a, const auto& b) { return a.begin < b.begin; });
      int32_t keys = 0;
      for (const DecodePiece& piece : pieces) keys += piece.end - piece.begin;
      // Rule 4: a row that would have more than 60 pieces has longer ones, multiples of 64.
      const int32_t piece_tokens =
          std::max(plan.piece_tokens, (keys + 60 * 64 - 1) / (60 * 64) * 64);
      std::vector<int> seen(row.position + 1);
      for (size_t i = 0; i < pieces.size(); ++i) {
        const DecodePiece& piece = pieces[i];
        ASSERT_EQ(std::tie(piece.chunk, piece.position), std::tie(row.chunk, row.position));
        ASSERT_TRUE(piece.begin < piece.end || pieces.size() == 1) << "an empty piece";
        if (pieces.size() == 1) {
          ASSERT_EQ(piece.group, -1);
          ASSERT_EQ(piece.slot, -1);
        } else {
          const DecodeGroup& group = plan.groups.at(piece.group);
          ASSERT_EQ(group.slot_count, static_cast<int32_t>(pieces.size()));
          ASSERT_EQ(piece.slot, group.slot_begin + static_cast<int32_t>(i))
              << "slots in the order of keys";
          ASSERT_EQ(++slots.at(piece.slot), 1);
        }
        ASSERT_EQ(piece.begin / piece_tokens, std::max(piece.begin, piece.end - 1) / piece_tokens)
            << "rule 2";
        if (i != 0 && piece.begin == pieces[i - 1].end) {
          ASSERT_EQ(piece.begin % piece_tokens, 0) << "rule 2";
        }
        for (int32_t t = piece.begin; t < piece.end; ++t) ++seen.at(t);
      }
      ASSERT_LE(static_cast<int32_t>(pieces.size()), kGroupPiecesMax);
      for (int32_t t = 0; t <= row.position; ++t) {
        const bool visible = t >= o.key_begin && t < o.key_end &&
                             (o.window == 0 || t > row.position - o.window || t < o.sinks);
        // A gap of less than 64 keys may lie inside a piece: the kernel leaves it out.
        ASSERT_LE(seen[t], 1);
        ASSERT_TRUE(!visible || seen[t] == 1) << "rule 1: key " << t << " of row " << row.row;
        ASSERT_TRUE(visible || seen[t] == 0 ||
                    (t >= o.sinks && row.position - o.window - o.sinks < 64));
      }
    }
  }
}

TEST(PlanDecode, RandomBatchesKeepTheRules) {
  for (uint32_t seed = 1; seed <= 400; ++seed) {
    std::mt19937 random(seed);
    DecodePlanOptions o{.kv_heads = static_cast<int32_t>(1 + random() % 8)};
    const int32_t longest = 1 << random() % 15;
    std::vector<int32_t> positions;
    for (uint32_t i = random() % 20; i > 0; --i)
      positions.push_back(static_cast<int32_t>(random() % longest));
    if (random() % 2 == 0) {
      o.window = static_cast<int32_t>(1 + random() % longest);
      o.sinks = static_cast<int32_t>(random() % 100);
    }
    if (random() % 3 == 0) {
      o.key_begin = static_cast<int32_t>(random() % longest);
      o.key_end = o.key_begin + static_cast<int32_t>(random() % longest);
    }
    o.blocks_at_once = static_cast<int32_t>(1 + random() % 300);
    if (random() % 3 == 0) o.piece_tokens = static_cast<int32_t>(64 * (1 + random() % 8));
    const std::vector<DecodeRow> rows = RowsAt(positions);
    const DecodePlan plan = PlanDecode(rows, o);
    ASSERT_NO_FATAL_FAILURE(ExpectRules(rows, o, plan)) << "seed " << seed << ": " << o;
    int64_t work = 0;
    int64_t most = 0;
    for (const DecodePiece& piece : plan.pieces) {
      work += piece.end - piece.begin + kPieceCostTokens;
      most = std::max<int64_t>(most, piece.end - piece.begin + kPieceCostTokens);
    }
    ASSERT_LE(Makespan(plan, o.blocks_at_once), work / o.blocks_at_once + most)
        << "rule 3, seed " << seed;
  }
}

// Shapes of the README's table on 132 SMs with two blocks each: within 7% of keys spread evenly
// with no cost a piece. What a single long row needs is in the last place: all SMs busy.
TEST(PlanDecode, ServingShapesFillTheGpu) {
  const auto ratio = [](int32_t rows, int32_t keys) {
    const DecodePlanOptions o{.kv_heads = 8, .blocks_at_once = 264};
    const DecodePlan plan = PlanDecode(RowsAt(std::vector<int32_t>(rows, keys - 1)), o);
    return static_cast<double>(Makespan(plan, 264)) / (double{8} * rows * keys / 264);
  };
  EXPECT_LT(ratio(8, 16'384), 1.07);
  EXPECT_LT(ratio(8, 32'768), 1.07);
  EXPECT_LT(ratio(32, 4'096), 1.12);
  EXPECT_LT(ratio(33, 4'096), 1.03);
  EXPECT_LT(ratio(1, 131'072), 1.15);
  const DecodePlan one = PlanDecode(RowsAt({4'095}), {.kv_heads = 8, .blocks_at_once = 264});
  EXPECT_EQ(one.pieces.size(), 8u * 4'096 / kPieceTokensMin);
}

// Of rows of all lengths: as good as the best length of pieces that trying each finds, within a
// tenth.
TEST(PlanDecode, ChoosesPiecesAlmostAsGoodAsAny) {
  for (uint32_t seed = 1; seed <= 24; ++seed) {
    std::mt19937 random(seed);
    std::vector<int32_t> positions(1u << random() % 6);
    const uint32_t longest = 1'000u << random() % 5;
    for (int32_t& p : positions) p = static_cast<int32_t>(longest / 4 + random() % longest);
    DecodePlanOptions o{.kv_heads = 8, .blocks_at_once = 264};
    const DecodePlan chosen = PlanDecode(RowsAt(positions), o);
    int64_t best = std::numeric_limits<int64_t>::max();
    for (o.piece_tokens = kPieceTokensMin; o.piece_tokens <= 20'480; o.piece_tokens += 64) {
      best = std::min(best, Makespan(PlanDecode(RowsAt(positions), o), o.blocks_at_once));
    }
    EXPECT_LE(static_cast<double>(Makespan(chosen, o.blocks_at_once)),
              1.1 * static_cast<double>(best))
        << "seed " << seed << ", " << positions.size() << " rows of " << longest << ", chosen "
        << chosen.piece_tokens;
  }
}

// The plan of a row is the same in any batch when the length of pieces is given.
TEST(PlanDecode, GivenPiecesDoNotDependOnTheBatch) {
  DecodePlanOptions o{.kv_heads = 1, .blocks_at_once = 264, .piece_tokens = 512};
  const auto cuts_of_first = [&](const std::vector<int32_t>& positions) {
    std::vector<std::pair<int32_t, int32_t>> cuts;
    for (const DecodePiece& p : PlanDecode(RowsAt(positions), o).pieces) {
      if (p.row == 0) cuts.emplace_back(p.begin, p.end);
    }
    std::sort(cuts.begin(), cuts.end());
    return cuts;
  };
  const auto alone = cuts_of_first({5'000});
  EXPECT_EQ(alone.size(), 10u);
  EXPECT_EQ(alone, cuts_of_first({5'000, 30'000, 7, 7, 7}));
  // Not even beside a row whose own pieces have to be longer: 60 of 512 are 30,720.
  EXPECT_EQ(alone, cuts_of_first({5'000, 40'000}));
  // A longer row is the same but for its end: prefixes have the same pieces.
  auto longer = cuts_of_first({5'300});
  longer.resize(9);
  EXPECT_TRUE(std::equal(longer.begin(), longer.end(), alone.begin()));

  for (uint32_t seed = 1; seed <= 200; ++seed) {
    std::mt19937 random(seed);
    o.piece_tokens = static_cast<int32_t>(64 * (1 + random() % 8));
    o.window = random() % 2 == 0 ? static_cast<int32_t>(1 + random() % 20'000) : 0;
    o.sinks = static_cast<int32_t>(random() % 100);
    std::vector<int32_t> positions(1 + random() % 5);
    for (int32_t& p : positions) p = static_cast<int32_t>(random() % (1u << random() % 17));
    ASSERT_EQ(cuts_of_first({positions[0]}), cuts_of_first(positions)) << "seed " << seed;
  }
}

}  // namespace
}  // namespace larder::kernels::cuda
