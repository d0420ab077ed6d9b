// What Transformer refuses, what its geometry says, and what windows mean.

#include <algorithm>
#include <cmath>
#include <functional>

#include "client/worker/transformer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/worker/test_models.h"

namespace larder::worker {
namespace {

using testing::HasSubstr;

std::vector<float> LastLogits(Transformer& transformer, std::span<const uint32_t> tokens,
                              uint32_t position, std::span<std::byte* const> blocks) {
  std::vector<float> logits(transformer.config().vocab);
  const Chunk chunk{.tokens = tokens, .position = position, .blocks = blocks};
  const absl::Status status = transformer.Forward({&chunk, 1}, logits);
  EXPECT_TRUE(status.ok()) << status;
  return logits;
}

TEST(TransformerOptionsTest, OptionsHaveBounds) {
  const auto refused = [](const TransformerOptions& options) {
    auto weights = Weights::Random(SmallConfig(), 7);
    return std::string(Transformer::Create(*std::move(weights), options).status().message());
  };
  EXPECT_THAT(refused({.block_tokens = 0}), HasSubstr("block_tokens: 0; allowed: 1 to 1024"));
  EXPECT_THAT(refused({.block_tokens = 1'025}), HasSubstr("block_tokens: 1025;"));
  EXPECT_THAT(refused({.rows_max = 0}), HasSubstr("rows_max: 0;"));
  EXPECT_THAT(refused({.threads = 5'000}), HasSubstr("threads: 5000;"));
  EXPECT_THAT(refused({.window = AttentionWindow{}}), HasSubstr("window.window_tokens: 0;"));
}

TEST(TransformerOptionsTest, GeometryIsWhatTheWireAsksFor) {
  const auto transformer = SmallTransformer({.kv_dtype = Dtype::kF16, .block_tokens = 8});
  const KvGeometry& geometry = transformer->geometry();
  EXPECT_EQ(geometry.layers, 3u);
  EXPECT_EQ(geometry.kv_heads, 2u);
  EXPECT_EQ(geometry.head_dim, 16u);
  EXPECT_EQ(geometry.dtype, Dtype::kF16);
  EXPECT_EQ(geometry.BlockBytes(), 3u * 2 * 2 * 8 * 16 * 2);
  EXPECT_EQ(SmallTransformer({.kv_dtype = Dtype::kI8, .block_tokens = 8})->geometry().BlockBytes(),
            3u * 2 * 2 * 8 * (16 + 4));
  EXPECT_GT(transformer->options().threads, 0u);
  EXPECT_NE(transformer->options().arithmetic, Arithmetic::kAuto);
}

// Whatever changes K/V changes the revision.
TEST(TransformerOptionsTest, RevisionsAreOfAllThatKvDependOn) {
  const auto revision = [](const TransformerOptions& options) {
    return SmallTransformer(options)->geometry().weights_revision;
  };
  const std::string plain = revision({.arithmetic = Arithmetic::kF32});
  EXPECT_EQ(plain, revision({.block_tokens = 4, .arithmetic = Arithmetic::kF32, .threads = 1}));
  EXPECT_LE(plain.size(), 256u);
  std::vector<std::string> all = {
      plain, revision({.keys_before_rope = true, .arithmetic = Arithmetic::kF32}),
      revision({.window = AttentionWindow{4, 8}, .arithmetic = Arithmetic::kF32}),
      revision({.window = AttentionWindow{4, 9}, .arithmetic = Arithmetic::kF32}),
      revision({.window = AttentionWindow{3, 8}, .arithmetic = Arithmetic::kF32})};
  std::sort(all.begin(), all.end());
  EXPECT_EQ(std::unique(all.begin(), all.end()), all.end());
}

TEST(TransformerOptionsTest, RefusesChunksAndChangesNothing) {
  const auto transformer = SmallTransformer({.rows_max = 32});
  std::mt19937 random(1);
  const std::vector<uint32_t> tokens = RandomTokens(random, 40, transformer->config().vocab);
  const std::vector<uint32_t> outside = {5, 261};
  TestBlocks blocks(transformer->geometry(), 40, random);
  std::vector<std::byte*> hole(blocks.table().begin(), blocks.table().end());
  hole[1] = nullptr;
  std::vector<std::byte*> crooked(blocks.table().begin(), blocks.table().end());
  crooked[0] += 4;
  const Chunk good{.tokens = std::span(tokens).first(20), .blocks = blocks.table()};
  struct Refusal {
    std::function<void(Chunk&)> change;
    const char* message;
  };
  const Refusal refusals[] = {
      {[&](Chunk& c) { c.tokens = {}; }, "chunks[1].tokens: 0; allowed: 1 to 32"},
      {[&](Chunk& c) { c.tokens = tokens; }, "chunks[1].tokens: 40; allowed: 1 to 32"},
      {[&](Chunk& c) { c.tokens = outside; }, "chunks[1].tokens: 261; allowed: 0 to 260"},
      {[&](Chunk& c) { c.position = 0xffff'ffff; }, "chunks[1].position: 4294967295;"},
      {[&](Chunk& c) { c.position = 29; }, "chunks[1].blocks: 3; allowed: at least 4"},
      {[&](Chunk& c) { c.blocks = hole; }, "chunks[1].blocks[1]: 0; allowed: an address"},
      {[&](Chunk& c) { c.blocks = crooked; }, "chunks[1].blocks[0]: "},
      {[&](Chunk&) {}, "chunks: rows: 40; allowed: 1 to 32"},
  };
  std::vector<float> logits(2 * size_t{transformer->config().vocab});
  for (const Refusal& refusal : refusals) {
    Chunk chunks[] = {good, good};
    refusal.change(chunks[1]);
    EXPECT_THAT(std::string(transformer->Forward(chunks, logits).message()),
                HasSubstr(refusal.message));
  }
  EXPECT_THAT(std::string(transformer->Forward({&good, 1}, logits).message()),
              HasSubstr("logits: 522 floats; allowed: exactly 261"));
  EXPECT_THAT(std::string(transformer->Forward({}, {}).message()), HasSubstr("chunks: rows: 0;"));
  EXPECT_TRUE(blocks.Untouched(0, 40));
}

// A token that no layer's window reaches has no effect; a sink has.
TEST(TransformerOptionsTest, AWindowForgetsWhatItPasses) {
  const AttentionWindow window{.sink_tokens = 2, .window_tokens = 8};
  const auto transformer = SmallTransformer({.window = window});
  std::mt19937 random(1);
  std::vector<uint32_t> tokens = RandomTokens(random, 60, transformer->config().vocab);
  const auto compute = [&] {
    TestBlocks blocks(transformer->geometry(), tokens.size(), random);
    return LastLogits(*transformer, tokens, 0, blocks.table());
  };
  const std::vector<float> before = compute();
  tokens[30] ^= 1;  // 29 tokens back; three layers reach 3 * 7
  EXPECT_EQ(compute(), before);
  tokens[50] ^= 1;
  EXPECT_NE(compute(), before);
  tokens[50] ^= 1;
  tokens[1] ^= 1;
  EXPECT_NE(compute(), before);
}

// Keys before RoPE: without a gap nothing but rounding differs, and blocks taken out of the
// middle leave a shorter sequence at lower positions.
TEST(TransformerOptionsTest, KeysBeforeRopeAreRotatedByTheirPlaceInTheTable) {
  const TransformerOptions plain_options = {.kv_dtype = Dtype::kF32, .block_tokens = 4};
  TransformerOptions options = plain_options;
  options.keys_before_rope = true;
  const auto plain = SmallTransformer(plain_options);
  const auto transformer = SmallTransformer(options);
  std::mt19937 random(1);
  const std::vector<uint32_t> tokens = RandomTokens(random, 33, plain->config().vocab);
  TestBlocks plain_blocks(plain->geometry(), 40, random),
      blocks(transformer->geometry(), 40, random);
  const std::vector<float> expected = LastLogits(*plain, tokens, 0, plain_blocks.table());
  const std::vector<float> logits = LastLogits(*transformer, tokens, 0, blocks.table());
  for (size_t i = 0; i < logits.size(); ++i) EXPECT_NEAR(logits[i], expected[i], 2e-2);

  // Two layers' worth of the first layer's keys know nothing of the tokens before them, so the
  // cut is compared in a model of one layer, where it is exact.
  ModelConfig one_layer = SmallConfig();
  one_layer.layers = 1;
  const auto shallow = SmallTransformer(options, one_layer);
  TestBlocks cut(shallow->geometry(), 40, random), whole(shallow->geometry(), 40, random);
  const std::span<const uint32_t> all(tokens);
  LastLogits(*shallow, all.first(32), 0, cut.table());
  std::vector<std::byte*> kept(cut.table().begin(), cut.table().end());
  kept.erase(kept.begin() + 1, kept.begin() + 3);  // tokens 4 to 11
  std::vector<uint32_t> short_tokens(tokens.begin(), tokens.begin() + 4);
  short_tokens.insert(short_tokens.end(), tokens.begin() + 12, tokens.end());
  EXPECT_EQ(LastLogits(*shallow, all.subspan(32), 24, kept),
            LastLogits(*shallow, short_tokens, 0, whole.table()));
}

}  // namespace
}  // namespace larder::worker
