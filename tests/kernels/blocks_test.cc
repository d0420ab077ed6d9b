// Append against rounding in double precision, and CopyBlocks against memcpy.
#include "kernels/blocks.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "tests/kernels/paged_kv.h"
#include "tests/kernels/reference.h"

namespace larder::kernels::testing {
namespace {

class BlocksTest : public IsaTest {
 protected:
  ThreadPool pool{3};
  Cpu cpu{pool, GetParam()};
};
INSTANTIATE_TEST_SUITE_P(Isa, BlocksTest, ::testing::ValuesIn(kIsas), NameOf);

// Rows of 20 numbers go through Append and come back as storage.
std::vector<std::byte> Stored(const Cpu& cpu, DType dtype, const std::vector<float>& numbers) {
  const int32_t dim = 20;
  const auto tokens = static_cast<int32_t>(numbers.size() / dim);
  const LatentGeometry geometry{dtype, 1, dim, 0, tokens};
  std::vector<std::byte> block(BlockBytes(geometry));
  std::byte* const table[] = {block.data()};
  const SequenceChunk chunk{table, 0, tokens};
  Append(cpu, {LayerOf(geometry, 0), numbers.data(), dim, nullptr, 0, {&chunk, 1}});
  return block;
}

// Each stored number and its neighbours, what lies half way between, and both sides of that.
TEST_P(BlocksTest, RoundsToNearestEven) {
  for (const DType dtype : {DType::kF16, DType::kBf16}) {
    std::vector<float> numbers;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const auto half = static_cast<uint16_t>(bits);
      const auto x = static_cast<float>(Decoded(dtype, reinterpret_cast<const std::byte*>(&half)));
      const auto next = static_cast<uint16_t>(bits + 1);
      const auto y = static_cast<float>(Decoded(dtype, reinterpret_cast<const std::byte*>(&next)));
      const auto middle = static_cast<float>((double{x} + y) / 2);
      for (const float z : {x, middle, std::nextafter(middle, 0.f), std::nextafter(middle, y)}) {
        if (!std::isnan(z)) numbers.push_back(z);
      }
    }
    for (const float z :
         {65519.f, 65520.f, -65520.f, 1e-8f, 2e-8f, 2.9802322e-8f, 3e-8f, 3.4e38f}) {
      numbers.push_back(z);
    }
    numbers.resize((numbers.size() + 19) / 20 * 20);
    const std::vector<std::byte> stored = Stored(cpu, dtype, numbers);
    for (size_t i = 0; i < numbers.size(); ++i) {
      std::byte expected[2];
      Encode(dtype, numbers[i], expected);
      ASSERT_EQ(std::memcmp(&stored[2 * i], expected, 2), 0)
          << numbers[i] << " became " << Decoded(dtype, &stored[2 * i]);
    }
  }
}

TEST_P(BlocksTest, ANanStaysOne) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBf16}) {
    std::vector<float> numbers(20, std::numeric_limits<float>::quiet_NaN());
    const uint32_t low = 0x7f800001;  // whose upper half alone would be infinity
    std::memcpy(&numbers[1], &low, sizeof(low));
    const std::vector<std::byte> stored = Stored(cpu, dtype, numbers);
    for (size_t i = 0; i < 20; ++i) {
      ASSERT_TRUE(std::isnan(Decoded(dtype, &stored[i * BytesOf(dtype)]))) << i;
    }
  }
}

TEST_P(BlocksTest, AppendWritesTheChunkAndNothingElse) {
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    std::mt19937 random(seed);
    const auto dtype = static_cast<DType>(random() % 3);
    const auto block_tokens = static_cast<int32_t>(1 + random() % 9);
    const auto dim = static_cast<int32_t>(2 + random() % 40);
    const bool latent = random() % 3 == 0;
    const TestLayer test_layer = latent ? LatentLayer(dtype, dim, 6, block_tokens)
                                        : HeadsLayer(dtype, 1 + seed % 3, dim, block_tokens);
    const KvLayer& layer = test_layer.layer;
    // Two sequences that have nothing yet: all NaN.
    PagedKv sequences[2] = {{test_layer, 30, 1}, {test_layer, 30, 2}};
    std::vector<SequenceChunk> chunks;
    int64_t rows = 0;
    for (PagedKv& kv : sequences) {
      const std::vector<std::byte*> table(kv.table(), kv.table() + (30 - 1) / block_tokens + 1);
      for (std::byte* block : table) std::memset(block, 0xff, test_layer.block_bytes);
      chunks.push_back(
          {kv.table(), static_cast<int32_t>(random() % 15), static_cast<int32_t>(random() % 15)});
      rows += chunks.back().tokens;
    }
    const int64_t k_stride = int64_t{layer.kv_heads} * layer.key_dim + 5;
    const int64_t v_stride = int64_t{layer.kv_heads} * layer.value_dim + 1;
    const std::vector<float> k = RandomFloats(random, rows * k_stride);
    const std::vector<float> v = RandomFloats(random, rows * v_stride);
    Append(cpu, {layer, k.data(), k_stride, latent ? nullptr : v.data(), v_stride, chunks});
    int64_t first_row = 0;
    for (int i = 0; i < 2; ++i) {
      const SequenceChunk& chunk = chunks[i];
      int64_t written = 0;
      for (int32_t token = chunk.position; token < chunk.position + chunk.tokens; ++token) {
        const int64_t row = first_row + token - chunk.position;
        for (int32_t head = 0; head < layer.kv_heads; ++head) {
          for (int32_t j = 0; j < layer.key_dim; ++j, ++written) {
            ASSERT_EQ(Decoded(dtype, sequences[i].At(token, head, false) + j * BytesOf(dtype)),
                      Rounded(dtype, k[row * k_stride + head * layer.key_dim + j]))
                << "seed " << seed;
          }
          for (int32_t j = 0; j < layer.value_dim && !latent; ++j, ++written) {
            ASSERT_EQ(Decoded(dtype, sequences[i].At(token, head, true) + j * BytesOf(dtype)),
                      Rounded(dtype, v[row * v_stride + head * layer.value_dim + j]))
                << "seed " << seed;
          }
        }
      }
      int64_t numbers = 0;
      for (int32_t block = 0; block <= (30 - 1) / block_tokens; ++block) {
        for (int64_t at = 0; at < test_layer.block_bytes; at += BytesOf(dtype)) {
          numbers += !std::isnan(Decoded(dtype, chunk.blocks[block] + at));
        }
      }
      ASSERT_EQ(numbers, written) << "seed " << seed;
      first_row += chunk.tokens;
    }
  }
}

TEST_P(BlocksTest, CopiesOfAnySizeAndAlignment) {
  std::mt19937 random(1);
  for (const int64_t bytes : {1, 63, 4096, 32 << 10, (32 << 10) + 1, 700'001}) {
    for (const int64_t shift : {0, 1, 64}) {
      std::vector<std::byte> from(bytes + 128);
      for (std::byte& b : from) b = static_cast<std::byte>(random());
      std::vector<std::byte> to(2 * bytes + 256, std::byte{7});
      // Two copies, one from an odd address.
      std::byte* const first = to.data() + shift;
      std::byte* const second = first + bytes + 64;
      const BlockCopy copies[] = {{first, from.data()}, {second, from.data() + 1}};
      CopyBlocks(cpu, copies, bytes);
      ASSERT_EQ(std::memcmp(first, from.data(), bytes), 0);
      ASSERT_EQ(std::memcmp(second, from.data() + 1, bytes), 0);
      for (int64_t i = 0; i < 64; ++i) {
        ASSERT_EQ(first[bytes + i], std::byte{7});
        ASSERT_EQ(second[bytes + i], std::byte{7});
      }
    }
  }
}

}  // namespace
}  // namespace larder::kernels::testing
