// The engine against logits that another implementation computed: plain torch, no K/V, float32
// (tests/model/README.md).

#include <algorithm>
#include <cmath>
#include <fstream>
#include <string>

#include "client/worker/perplexity.h"
#include "client/worker/sampler.h"
#include "client/worker/transformer.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/worker/test_models.h"

namespace larder::worker {
namespace {

std::string ModelDirectory(const std::string& name) {
  return std::string(LARDER_TEST_MODELS) + "/" + name;
}

nlohmann::json Reference(const std::string& name) {
  std::ifstream file(ModelDirectory(name) + "/reference.json");
  return nlohmann::json::parse(file);
}

std::unique_ptr<Transformer> LoadModel(const std::string& name, Arithmetic arithmetic,
                                       Dtype kv_dtype) {
  absl::StatusOr<Weights> weights = Weights::Load(ModelDirectory(name));
  EXPECT_TRUE(weights.ok()) << weights.status();
  auto transformer = Transformer::Create(
      *std::move(weights), {.kv_dtype = kv_dtype, .arithmetic = arithmetic, .rows_max = 2'048});
  EXPECT_TRUE(transformer.ok()) << transformer.status();
  return *std::move(transformer);
}

std::vector<float> AllLogits(Transformer& transformer, const std::vector<uint32_t>& tokens) {
  std::mt19937 random(1);
  TestBlocks blocks(transformer.geometry(), tokens.size(), random);
  std::vector<float> logits(tokens.size() * transformer.config().vocab);
  const Chunk chunk{.tokens = tokens, .blocks = blocks.table(), .logits = Logits::kAll};
  const absl::Status status = transformer.Forward({&chunk, 1}, logits);
  EXPECT_TRUE(status.ok()) << status;
  return logits;
}

// The largest difference of any logit of any case.
double LargestDifference(Transformer& transformer, const nlohmann::json& reference) {
  double largest = 0;
  for (const nlohmann::json& item : reference["cases"]) {
    const std::vector<float> logits =
        AllLogits(transformer, item["tokens"].get<std::vector<uint32_t>>());
    for (size_t i = 0; i < item["rows"].size(); ++i) {
      const auto expected = item["logits"][i].get<std::vector<double>>();
      const size_t first = item["rows"][i].get<size_t>() * expected.size();
      for (size_t j = 0; j < expected.size(); ++j) {
        largest = std::max(largest, std::abs(expected[j] - logits[first + j]));
      }
    }
  }
  return largest;
}

class ReferenceTest : public testing::TestWithParam<const char*> {};

// float32 throughout: what is left is the order of sums and the reference's four decimals.
TEST_P(ReferenceTest, SameFormulas) {
  const auto transformer = LoadModel(GetParam(), Arithmetic::kF32, Dtype::kF32);
  EXPECT_LT(LargestDifference(*transformer, Reference(GetParam())), 2e-3);
}

// As close as torch is to itself in bfloat16.
TEST_P(ReferenceTest, Bf16IsAsCloseAsTorchs) {
  const auto transformer = LoadModel(GetParam(), Arithmetic::kAuto, Dtype::kBf16);
  const nlohmann::json reference = Reference(GetParam());
  EXPECT_LT(LargestDifference(*transformer, reference), reference["bf16_difference"].get<double>());
}

// Greedy, token by token from K/V, as torch does without any.
TEST_P(ReferenceTest, SameContinuation) {
  const auto transformer = LoadModel(GetParam(), Arithmetic::kF32, Dtype::kF32);
  const nlohmann::json reference = Reference(GetParam());
  size_t compared = 0;
  for (const nlohmann::json& item : reference["cases"]) {
    const auto prompt = item["tokens"].get<std::vector<uint32_t>>();
    const auto expected = item["continuation"].get<std::vector<uint32_t>>();
    std::mt19937 random(1);
    TestBlocks blocks(transformer->geometry(), prompt.size() + expected.size(), random);
    std::vector<float> logits(transformer->config().vocab);
    std::vector<uint32_t> next = prompt;
    uint32_t position = 0;
    for (size_t i = 0; i < expected.size(); ++i, ++compared) {
      const Chunk chunk{.tokens = next, .position = position, .blocks = blocks.table()};
      ASSERT_TRUE(transformer->Forward({&chunk, 1}, logits).ok());
      position += static_cast<uint32_t>(next.size());
      next = {Greedy(logits)};
      constexpr double kUndecided = 4e-3;  // twice what SameFormulas allows
      if (item["margins"][i].get<double>() < kUndecided) break;
      ASSERT_EQ(next.front(), expected[i]) << item["name"] << ", token " << i;
    }
  }
  EXPECT_GE(compared, 16u);
}

double PerplexityWith(Dtype kv_dtype) {
  const auto transformer = LoadModel("austen", Arithmetic::kF32, kv_dtype);
  const nlohmann::json reference = Reference("austen");
  Likelihood all;
  for (const nlohmann::json& item : reference["cases"]) {
    const auto tokens = item["tokens"].get<std::vector<uint32_t>>();
    std::mt19937 random(1);
    TestBlocks blocks(transformer->geometry(), tokens.size(), random);
    const auto likelihood = Score(*transformer, tokens, 0, blocks.table(), 512);
    EXPECT_TRUE(likelihood.ok()) << likelihood.status();
    all.nats += likelihood->nats;
    all.tokens += likelihood->tokens;
  }
  return all.Perplexity();
}

// README, "What K/V are kept as". A scale or a code of another row would cost far more.
TEST(CodesTest, OneByteKvForetellsNearlyAsWell) {
  const double exact = PerplexityWith(Dtype::kF32);
  EXPECT_NEAR(PerplexityWith(Dtype::kBf16) / exact, 1, 0.001);
  EXPECT_NEAR(PerplexityWith(Dtype::kI8) / exact, 1, 0.005);
  EXPECT_NEAR(PerplexityWith(Dtype::kF8E4M3) / exact, 1, 0.01);
}

INSTANTIATE_TEST_SUITE_P(Models, ReferenceTest,
                         testing::Values("tiny_qwen2", "tiny_llama3", "austen"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace larder::worker
