#include "client/worker/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>

#include "gtest/gtest.h"
#include "tests/worker/test_models.h"

namespace larder::worker {
namespace {

constexpr size_t kTokens =
    700;  // more than two of the largest tiles and than two of attention's pieces

// What a sequence must give however it is computed.
struct Expected {
  std::vector<uint32_t> tokens;
  std::vector<float> logits;  // [tokens][vocab]
  std::vector<std::byte> kv;  // TestBlocks::Gather
};

// The whole sequence in as few calls as rows_max allows, alone.
Expected ComputeAlone(Transformer& transformer, std::vector<uint32_t> tokens) {
  std::mt19937 random(1);
  Expected expected{.tokens = std::move(tokens), .logits = {}, .kv = {}};
  const size_t vocab = transformer.config().vocab;
  TestBlocks blocks(transformer.geometry(), expected.tokens.size(), random);
  expected.logits.resize(expected.tokens.size() * vocab);
  const Chunk chunk{.tokens = expected.tokens, .blocks = blocks.table(), .logits = Logits::kAll};
  const absl::Status status = transformer.Forward({&chunk, 1}, expected.logits);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_TRUE(std::all_of(expected.logits.begin(), expected.logits.end(),
                          [](float logit) { return std::isfinite(logit); }));
  expected.kv = blocks.Gather(expected.tokens.size());
  return expected;
}

bool SameBits(std::span<const float> a, std::span<const float> b) {
  if (a.size() != b.size()) return false;
  return a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

// All sequences side by side, cut at random, some resting while others go on; every row of
// logits and every byte of K/V must be the expected one.
void ComputeTogether(Transformer& transformer, const std::vector<Expected>& sequences,
                     uint32_t seed) {
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const size_t vocab = transformer.config().vocab;
  std::deque<TestBlocks> blocks;
  std::vector<size_t> done(sequences.size());
  for (const Expected& sequence : sequences) {
    blocks.emplace_back(transformer.geometry(), sequence.tokens.size(), random);
  }
  for (size_t left = sequences.size(); left > 0;) {
    std::vector<Chunk> chunks;
    std::vector<size_t> who;
    size_t rows_left = transformer.options().rows_max;
    for (size_t i = 0; i < sequences.size(); ++i) {
      const size_t rest = sequences[i].tokens.size() - done[i];
      if (rest == 0 || rows_left == 0 || random() % 4 == 0) continue;
      constexpr size_t kLengths[] = {1, 1, 2, 3, 5, 17, 64, 100, 290};
      const size_t count = std::min({kLengths[random() % std::size(kLengths)], rest, rows_left});
      rows_left -= count;
      chunks.push_back({.tokens = std::span(sequences[i].tokens).subspan(done[i], count),
                        .position = static_cast<uint32_t>(done[i]),
                        .blocks = blocks[i].table(),
                        .logits = static_cast<Logits>(random() % 3)});
      who.push_back(i);
    }
    if (chunks.empty()) continue;
    std::vector<float> logits(LogitRows(chunks) * vocab);
    const absl::Status status = transformer.Forward(chunks, logits);
    ASSERT_TRUE(status.ok()) << status;
    size_t row = 0;
    for (size_t c = 0; c < chunks.size(); ++c) {
      const Expected& sequence = sequences[who[c]];
      const size_t count = chunks[c].tokens.size();
      const size_t rows =
          chunks[c].logits == Logits::kAll ? count : chunks[c].logits == Logits::kLast;
      const size_t first = chunks[c].position + count - rows;
      ASSERT_TRUE(SameBits(std::span(logits).subspan(row * vocab, rows * vocab),
                           std::span(sequence.logits).subspan(first * vocab, rows * vocab)))
          << "sequence " << who[c] << ", positions " << chunks[c].position << " to "
          << chunks[c].position + count;
      row += rows;
      done[who[c]] += count;
      ASSERT_TRUE(blocks[who[c]].Untouched(done[who[c]], sequence.tokens.size()));
      if (done[who[c]] == sequence.tokens.size()) --left;
    }
  }
  for (size_t i = 0; i < sequences.size(); ++i) {
    EXPECT_EQ(blocks[i].Gather(sequences[i].tokens.size()), sequences[i].kv) << "sequence " << i;
  }
}

std::vector<Expected> SomeSequences(Transformer& transformer) {
  std::mt19937 random(5);
  std::vector<Expected> sequences;
  for (const size_t tokens : {size_t{1}, size_t{40}, size_t{300}, kTokens}) {
    sequences.push_back(
        ComputeAlone(transformer, RandomTokens(random, tokens, transformer.config().vocab)));
  }
  return sequences;
}

struct Case {
  const char* name;
  TransformerOptions options;
};

class RowIsARow : public testing::TestWithParam<Case> {};

// Invariant 1 of transformer.h.
TEST_P(RowIsARow, HoweverCutAndBatched) {
  const std::unique_ptr<Transformer> transformer = SmallTransformer(GetParam().options);
  const std::vector<Expected> sequences = SomeSequences(*transformer);
  for (uint32_t seed = 1; seed <= 4; ++seed) ComputeTogether(*transformer, sequences, seed);
}

TEST_P(RowIsARow, WhateverThreadsAndBlockSize) {
  const std::unique_ptr<Transformer> transformer = SmallTransformer(GetParam().options);
  const std::vector<Expected> sequences = SomeSequences(*transformer);
  for (const auto& [threads, block_tokens] : {std::pair(1, 1), {3, 7}, {5, 64}, {2, 1'024}}) {
    SCOPED_TRACE(testing::Message() << threads << " threads, " << block_tokens << " a block");
    TransformerOptions options = GetParam().options;
    options.threads = static_cast<uint32_t>(threads);
    options.block_tokens = static_cast<uint32_t>(block_tokens);
    ComputeTogether(*SmallTransformer(options), sequences, 11);
  }
}

TEST_P(RowIsARow, TokenByToken) {
  const std::unique_ptr<Transformer> transformer = SmallTransformer(GetParam().options);
  std::mt19937 random(3);
  const size_t vocab = transformer->config().vocab;
  const Expected whole = ComputeAlone(*transformer, RandomTokens(random, 300, vocab));
  TestBlocks blocks(transformer->geometry(), whole.tokens.size(), random);
  std::vector<float> logits(vocab);
  for (size_t i = 0; i < whole.tokens.size(); ++i) {
    const Chunk chunk{.tokens = std::span(whole.tokens).subspan(i, 1),
                      .position = static_cast<uint32_t>(i),
                      .blocks = blocks.table()};
    ASSERT_TRUE(transformer->Forward({&chunk, 1}, logits).ok());
    ASSERT_TRUE(SameBits(logits, std::span(whole.logits).subspan(i * vocab, vocab))) << i;
  }
  EXPECT_EQ(blocks.Gather(whole.tokens.size()), whole.kv);
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, RowIsARow,
    testing::Values(Case{"Bf16", {.kv_dtype = Dtype::kBf16}},
                    Case{"F16", {.kv_dtype = Dtype::kF16}}, Case{"F32", {.kv_dtype = Dtype::kF32}},
                    Case{"ProductsF32", {.kv_dtype = Dtype::kF32, .arithmetic = Arithmetic::kF32}},
                    Case{"F8E4m3", {.kv_dtype = Dtype::kF8E4M3}},
                    Case{"I8", {.kv_dtype = Dtype::kI8, .keys_before_rope = true}},
                    Case{"Window",
                         {.window = AttentionWindow{.sink_tokens = 4, .window_tokens = 50}}},
                    Case{"KeysBeforeRope", {.keys_before_rope = true}}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace larder::worker
