// One-byte numbers: codes and scales against the formats' definitions, where scales lie in a block,
// and Append of rows that are quantised.
#include "kernels/quantise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/blocks.h"
#include "tests/kernels/paged_kv.h"
#include "tests/kernels/reference.h"

namespace larder::kernels::testing {
namespace {

constexpr DType kQuantised[] = {DType::kF8E4M3, DType::kI8};
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

double CodeOf(DType dtype, float x) {
  const std::byte code{FloatToCode(dtype, x)};
  return Decoded(dtype, &code);
}

TEST(QuantiseTest, EveryCodeMeansWhatTheFormatSays) {
  for (const DType dtype : kQuantised) {
    for (int code = 0; code < 256; ++code) {
      const std::byte stored{static_cast<uint8_t>(code)};
      const double expected = Decoded(dtype, &stored);
      const float got = CodeToFloat(dtype, static_cast<uint8_t>(code));
      if (std::isnan(expected)) {
        EXPECT_TRUE(std::isnan(got)) << code;
        continue;
      }
      EXPECT_EQ(got, expected) << code;
      EXPECT_EQ(std::signbit(got), std::signbit(expected)) << code;
      // And back: a code is its own nearest. int8's -128 is read but never written.
      const bool written = dtype == DType::kF8E4M3 || code != 0x80;
      EXPECT_EQ(FloatToCode(dtype, got), written ? code : 0x81) << code;
    }
  }
  // Published values of the format: smallest, smallest normal, one, largest.
  EXPECT_EQ(FromE4m3(0x01), 0x1p-9f);
  EXPECT_EQ(FromE4m3(0x08), 0x1p-6f);
  EXPECT_EQ(FromE4m3(0x38), 1.0f);
  EXPECT_EQ(FromE4m3(0x7e), 448.0f);
}

// Each code and its neighbour, what lies half way between, and both sides of that.
TEST(QuantiseTest, RoundsToNearestEven) {
  for (const DType dtype : kQuantised) {
    for (int code = 0; code < 256; ++code) {
      const float x = CodeToFloat(dtype, static_cast<uint8_t>(code));
      const float y = CodeToFloat(dtype, static_cast<uint8_t>(code + 1));
      const float middle = (x + y) / 2;
      for (const float z : {x, middle, std::nextafter(middle, 0.f), std::nextafter(middle, y)}) {
        if (std::isnan(z)) continue;
        ASSERT_EQ(CodeOf(dtype, z), Rounded(dtype, z)) << z;
      }
    }
  }
}

TEST(QuantiseTest, FloatsOfEverySizeRoundAsTheFormatSays) {
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 9973) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(bits));
    if (std::isnan(x)) continue;
    for (const DType dtype : kQuantised) {
      ASSERT_EQ(CodeOf(dtype, x), Rounded(dtype, x)) << x;
      ASSERT_EQ(std::signbit(CodeOf(DType::kF8E4M3, x)), std::signbit(x)) << x;
    }
  }
}

TEST(QuantiseTest, WhatIsTooLargeIsTheLargestAndANanIsNan) {
  for (const float sign : {1.f, -1.f}) {
    for (const float x : {464.f, 480.f, 1e30f, kInfinity}) {
      EXPECT_EQ(FromE4m3(ToE4m3(sign * x)), sign * 448);
      EXPECT_EQ(ToInt8(sign * x), sign * 127);
    }
  }
  EXPECT_EQ(ToE4m3(kNan) & 0x7f, 0x7f);
  EXPECT_EQ(ToInt8(kNan), 0);
}

TEST(QuantiseTest, AScaleMakesTheLargestNumberTheLargestCode) {
  std::mt19937 random(1);
  for (const DType dtype : kQuantised) {
    for (const double spread : {1e-30, 1e-3, 1.0, 1e4, 1e37}) {
      const std::vector<float> row = RandomFloats(random, 100, spread);
      std::vector<std::byte> codes(100);
      const float scale = QuantiseRow(dtype, row.data(), codes.data(), 100);
      ASSERT_EQ(scale, RowScale(dtype, row));
      double largest = 0;
      for (size_t i = 0; i < row.size(); ++i) {
        const double code = Decoded(dtype, &codes[i]);
        ASSERT_EQ(code, RowCode(dtype, row[i], scale)) << row[i];
        largest = std::max(largest, std::abs(code));
        // Half a step: of int8 one code, of e4m3 a sixteenth of the number or 2^-10.
        const double step = dtype == DType::kI8 ? 0.5 : std::max(std::abs(code) / 16, 0x1p-10);
        ASSERT_NEAR(code * scale, row[i], step * scale * (1 + 1e-6)) << row[i];
      }
      ASSERT_EQ(largest, LargestCode(dtype));
    }
  }
}

TEST(QuantiseTest, RowsWithoutAUsableScale) {
  for (const DType dtype : kQuantised) {
    std::byte codes[3];
    const float zeros[] = {0, -0.f, 0};
    EXPECT_EQ(QuantiseRow(dtype, zeros, codes, 3), 0);
    EXPECT_EQ(CodeToFloat(dtype, static_cast<uint8_t>(codes[1])), 0);
    const float tiny[] = {1e-38f, 0, 0};
    EXPECT_EQ(QuantiseRow(dtype, tiny, codes, 3), 0);
    EXPECT_EQ(CodeToFloat(dtype, static_cast<uint8_t>(codes[0])), 0);
    for (const float bad : {kNan, kInfinity, -kInfinity}) {
      for (const int at : {0, 2}) {
        float row[] = {1, 2, 3};
        row[at] = bad;
        EXPECT_TRUE(std::isnan(QuantiseRow(dtype, row, codes, 3))) << bad << " at " << at;
      }
    }
  }
}

// Llama-3-8B at 16 tokens: a MiB of codes, and 32 KiB of scales behind them.
TEST(QuantiseTest, ScalesLieBehindAllNumbers) {
  for (const DType dtype : kQuantised) {
    const HeadGeometry heads{dtype, 32, 8, 128, 16};
    EXPECT_EQ(BlockBytes(heads), (1 << 20) + (32 << 10));
    const KvLayer first = LayerOf(heads, 0);
    EXPECT_EQ(first.key_scale_offset_bytes, 1 << 20);
    EXPECT_EQ(first.head_scale_stride_bytes, 64);
    EXPECT_EQ(first.value_scale_offset_bytes, (1 << 20) + 512);
    const KvLayer last = LayerOf(heads, 31);
    EXPECT_EQ(last.key_offset_bytes, 31 * (32 << 10));
    EXPECT_EQ(last.value_scale_offset_bytes + 8 * 64, BlockBytes(heads));
    // DeepSeek-V3's rows have one scale each.
    const LatentGeometry latent{dtype, 61, 512, 64, 16};
    EXPECT_EQ(BlockBytes(latent), 61 * 16 * (576 + 4));
    const KvLayer row = LayerOf(latent, 60);
    EXPECT_EQ(row.key_scale_offset_bytes, 61 * 16 * 576 + 60 * 64);
    EXPECT_EQ(row.value_scale_offset_bytes, row.key_scale_offset_bytes);
  }
  const KvLayer plain = LayerOf(HeadGeometry{DType::kBf16, 32, 8, 128, 16}, 5);
  EXPECT_EQ(plain.key_scale_offset_bytes, 0);
  EXPECT_EQ(plain.head_scale_stride_bytes, 0);
}

// Appended in chunks, blocks are byte for byte those that the reference writes; the rest of their
// memory stays what it was.
TEST(QuantiseTest, AppendQuantisesEachKeyAndValue) {
  ThreadPool pool(3);
  const Cpu cpu{pool, Isa::kPortable};
  for (uint32_t seed = 1; seed <= 40; ++seed) {
    std::mt19937 random(seed);
    const DType dtype = kQuantised[seed % 2];
    const auto dim = static_cast<int32_t>(2 + random() % 40);
    const auto block_tokens = static_cast<int32_t>(1 + random() % 9);
    const bool latent = random() % 3 == 0;
    const TestLayer test_layer = latent ? LatentLayer(dtype, dim, 6, block_tokens)
                                        : HeadsLayer(dtype, 1 + seed % 3, dim, block_tokens);
    const KvLayer& layer = test_layer.layer;
    const auto position = static_cast<int32_t>(random() % 15);
    const auto tokens = static_cast<int32_t>(1 + random() % 15);
    PagedKv got(test_layer, 30, 1);
    PagedKv expected(test_layer, 30, 1);
    const std::vector<float> k =
        RandomFloats(random, int64_t{tokens} * layer.kv_heads * layer.key_dim);
    const std::vector<float> v =
        RandomFloats(random, int64_t{tokens} * layer.kv_heads * layer.value_dim);
    const SequenceChunk chunk{got.table(), position, tokens};
    Append(cpu, {layer,
                 k.data(),
                 int64_t{layer.kv_heads} * layer.key_dim,
                 v.data(),
                 int64_t{layer.kv_heads} * layer.value_dim,
                 {&chunk, 1}});
    for (int32_t i = 0; i < tokens * layer.kv_heads; ++i) {
      const int32_t token = position + i / layer.kv_heads;
      const int32_t head = i % layer.kv_heads;
      expected.Write(token, head, false, {&k[i * layer.key_dim], &k[(i + 1) * layer.key_dim]});
      if (latent) continue;
      expected.Write(token, head, true, {&v[i * layer.value_dim], &v[(i + 1) * layer.value_dim]});
    }
    for (int32_t block = 0; block * block_tokens < 30; ++block) {
      ASSERT_EQ(std::memcmp(got.table()[block], expected.table()[block], test_layer.block_bytes), 0)
          << "seed " << seed << ", block " << block;
    }
  }
}

}  // namespace
}  // namespace larder::kernels::testing
