// Attend over one-byte storage: every code, and what is not a number. Random shapes of it are in
// attention_test.cc.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "kernels/attention.h"
#include "tests/kernels/paged_kv.h"

namespace larder::kernels::testing {
namespace {

class CodesTest : public IsaTest {};
INSTANTIATE_TEST_SUITE_P(Isa, CodesTest, ::testing::ValuesIn(kIsas), NameOf);

// Every code there is, NaN among them, as a value that is all that its token's row sees.
TEST_P(CodesTest, EveryCodeIsItsNumber) {
  for (const DType dtype : {DType::kF8E4M3, DType::kI8}) {
    const TestLayer layer = HeadsLayer(dtype, 1, 256, 16);
    const PagedKv kv(layer, 1, 1);
    const float scale = 0.37f;
    for (int code = 0; code < 256; ++code) *(kv.At(0, 0, true) + code) = std::byte(code);
    std::memcpy(kv.ScaleAt(0, 0, true), &scale, sizeof(scale));
    AttentionCase c;
    c.params.layer = layer.layer;
    c.params.q_heads = 1;
    c.params.scale = 1;
    c.chunks = {{kv.table(), 0, 1}};
    c.q.resize(256);
    const AttentionResult result = RunAttention(c, GetParam(), 1);
    for (int code = 0; code < 256; ++code) {
      const auto stored = static_cast<std::byte>(code);
      const auto expected = static_cast<float>(Decoded(dtype, &stored) * double{scale});
      ASSERT_TRUE(result.out[code] == expected ||
                  (std::isnan(result.out[code]) && std::isnan(expected)))
          << code;
    }
  }
}

// Every code but NaN as a number of the only key there is, each by itself: its score is the log of
// the sum of weights. Four q heads read codes, 256 what they are staged as.
TEST_P(CodesTest, EveryCodeIsItsNumberInAKey) {
  for (const DType dtype : {DType::kF8E4M3, DType::kI8}) {
    const TestLayer layer = HeadsLayer(dtype, 1, 256, 16);
    const PagedKv kv(layer, 1, 1);
    const float scale = 0.37f;
    for (int code = 0; code < 256; ++code) {
      const bool nan = dtype == DType::kF8E4M3 && (code & 0x7f) == 0x7f;
      *(kv.At(0, 0, false) + code) = std::byte(nan ? 0 : code);
    }
    std::memcpy(kv.ScaleAt(0, 0, false), &scale, sizeof(scale));
    for (const int heads : {4, 256}) {
      AttentionCase c;
      c.params.layer = layer.layer;
      c.params.q_heads = heads;
      c.params.scale = 1;
      c.chunks = {{kv.table(), 0, 1}};
      for (int first = 0; first < 256; first += heads) {
        c.q.assign(int64_t{heads} * 256, 0);
        for (int head = 0; head < heads; ++head) c.q[head * 256 + first + head] = 1;
        const AttentionResult result = RunAttention(c, GetParam(), 1);
        for (int head = 0; head < heads; ++head) {
          const double number = Decoded(dtype, kv.At(0, 0, false) + first + head);
          ASSERT_EQ(result.lse[head], static_cast<float>(number * double{scale})) << first + head;
        }
      }
    }
  }
}

// A NaN among codes: of a key for every number of who sees it, of a value for its own.
TEST_P(CodesTest, AVisibleCodeThatIsNanIsNotHidden) {
  const TestLayer layer = HeadsLayer(DType::kF8E4M3, 1, 64, 16);
  const PagedKv kv(layer, 104, 1);
  for (const int32_t tokens : {1, 4}) {  // 4 rows read codes, 16 what they are staged as
    for (const bool value : {false, true}) {
      for (const uint8_t code : {0x7f, 0xff}) {
        AttentionCase c;
        c.params.layer = layer.layer;
        c.params.q_heads = 4;
        c.params.scale = 1;
        c.chunks = {{kv.table(), 100, tokens}, {kv.table(), 99, 1}};
        std::mt19937 random(1);
        c.q = RandomFloats(random, RowsOf(c) * 4 * 64);
        std::byte* const at = kv.At(100, 0, value) + 37;
        const std::byte before = *at;
        *at = std::byte{code};
        const AttentionResult result = RunAttention(c, GetParam(), 1);
        *at = before;
        for (int64_t i = 0; i < static_cast<int64_t>(result.out.size()); ++i) {
          const bool sees = i < int64_t{tokens} * 4 * 64;
          ASSERT_EQ(std::isnan(result.out[i]), sees && (!value || i % 64 == 37)) << i;
        }
        ASSERT_EQ(std::isnan(result.lse[0]), !value);
      }
    }
  }
}

// A row that could not be quantised is NaN for whoever sees it (quantise.h, rule 2).
TEST_P(CodesTest, AVisibleScaleThatIsNanIsNotHidden) {
  const TestLayer layer = HeadsLayer(DType::kI8, 1, 64, 16);
  for (const bool value : {false, true}) {
    const PagedKv kv(layer, 300, 1);
    AttentionCase c;
    c.params.layer = layer.layer;
    c.params.q_heads = 1;
    c.params.scale = 1;
    c.chunks = {{kv.table(), 99, 1}, {kv.table(), 100, 1}, {kv.table(), 99, 2}};
    std::mt19937 random(1);
    c.q = RandomFloats(random, 4 * 64);
    std::memset(kv.ScaleAt(100, 0, value), 0xff, kScaleBytes);
    const AttentionResult result = RunAttention(c, GetParam(), 1);
    for (const int row : {0, 1, 2, 3}) {
      const bool sees = row % 2 != 0;
      EXPECT_EQ(std::isnan(result.out[row * 64]), sees) << row;
      EXPECT_EQ(std::isnan(result.lse[row]), sees && !value) << row;
    }
  }
}

// A key that is NaN where nothing else of its piece is seen, or nothing else of its tile: its row is
// NaN, alone and beside another.
TEST_P(CodesTest, ANanThatIsAllOfAPieceIsNotHidden) {
  struct Place {
    int32_t token;
    int32_t window;  // 0: none
  };
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF8E4M3, DType::kI8}) {
    const TestLayer layer = HeadsLayer(dtype, 1, 64, 16);
    for (const auto [token, window] : {Place{0, 0}, Place{31, 1}, Place{31, 0}, Place{256, 0}}) {
      const PagedKv kv(layer, 300, 1);
      std::memset(kv.At(token, 0, false), 0xff, IsQuantised(dtype) ? 64 : 64 * BytesOf(dtype));
      if (IsQuantised(dtype)) std::memset(kv.ScaleAt(token, 0, false), 0xff, kScaleBytes);
      AttentionCase c;
      c.params.layer = layer.layer;
      c.params.q_heads = 1;
      c.params.scale = 1;
      c.params.window = window;
      c.chunks = {{kv.table(), token, 1}, {kv.table(), token, 2}};
      std::mt19937 random(1);
      c.q = RandomFloats(random, 3 * 64);
      const AttentionResult result = RunAttention(c, GetParam(), 1);
      for (const int row : {0, 1}) {
        EXPECT_TRUE(std::isnan(result.out[row * 64]) && std::isnan(result.lse[row]))
            << "dtype " << static_cast<int>(dtype) << ", token " << token << ", row " << row;
      }
      EXPECT_EQ(std::isnan(result.out[2 * 64]), window != 1);
    }
  }
}

}  // namespace
}  // namespace larder::kernels::testing
