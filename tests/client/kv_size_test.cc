#include "client/kv_size.h"

#include <gtest/gtest.h>

#include <string>

namespace larder::cli {
namespace {

constexpr uint64_t kKiB = 1024;
constexpr uint64_t kMiB = 1024 * kKiB;

KvShape Llama3_8B() {
  KvShape shape;
  shape.layers = 32;
  shape.kv_heads = 8;
  shape.head_dim = 128;
  return shape;
}

constexpr char kLlama3Config[] = R"({
  "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
  "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32,
  "num_key_value_heads": 8, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "vocab_size": 128256})";

constexpr char kQwen2Config[] = R"({
  "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
  "max_position_embeddings": 32768, "num_attention_heads": 14, "num_hidden_layers": 24,
  "num_key_value_heads": 2, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "vocab_size": 151936})";

TEST(KvShape, CountsLlama3AsPublished) {
  EXPECT_EQ(Llama3_8B().TokenLayerBytes(), 4 * kKiB);
  EXPECT_EQ(Llama3_8B().TokenBytes(), 131'072u);
  EXPECT_EQ(16 * Llama3_8B().TokenBytes(), 2 * kMiB);
}

TEST(KvShape, CountsMlaOnce) {
  KvShape shape;
  shape.layers = 61;
  shape.mla_latent_dim = 512;
  shape.mla_rope_dim = 64;
  EXPECT_EQ(shape.TokenLayerBytes(), 1152u);  // DeepSeek-V3 in bf16
  EXPECT_EQ(shape.TokenBytes(), 61u * 1152);
}

// As larderd counts (BlocksOfOneByteElementsEndInTheirScales).
TEST(KvShape, CountsTheScalesOfOneByteElements) {
  for (const v1::DType dtype : {v1::DTYPE_F8_E4M3, v1::DTYPE_I8}) {
    KvShape shape = Llama3_8B();
    shape.dtype = dtype;
    EXPECT_EQ(16 * shape.TokenBytes(), kMiB + 32 * kKiB);
    shape.kv_heads = shape.head_dim = 0;
    shape.mla_latent_dim = 512;
    shape.mla_rope_dim = 64;
    EXPECT_EQ(shape.TokenLayerBytes(), 580u);
  }
}

TEST(KvShape, IsCheckedFieldByField) {
  EXPECT_TRUE(Check(Llama3_8B()).ok());
  KvShape shape = Llama3_8B();
  shape.layers = 0;
  EXPECT_EQ(Check(shape).message(), "layers: 0 given, allowed are 1 to 1024");
  shape = Llama3_8B();
  shape.kv_heads = 0;
  EXPECT_EQ(Check(shape).message(), "kv-heads: 0 given, allowed are 1 to 1024");
  shape = Llama3_8B();
  shape.mla_rope_dim = 64;
  EXPECT_EQ(Check(shape).message(), "mla-rope-dim: 64 given, allowed are 0 to 0");
}

TEST(ParseModelShape, CountsParametersAsPublished) {
  absl::StatusOr<ModelShape> llama = ParseModelShape(kLlama3Config);
  ASSERT_TRUE(llama.ok()) << llama.status();
  EXPECT_EQ(llama->params, 8'030'261'248u);
  EXPECT_EQ(llama->kv.TokenBytes(), 131'072u);
  EXPECT_EQ(llama->query_heads, 32u);
  EXPECT_EQ(llama->seq_len_max, 8192u);

  absl::StatusOr<ModelShape> qwen = ParseModelShape(kQwen2Config);
  ASSERT_TRUE(qwen.ok()) << qwen.status();
  EXPECT_EQ(qwen->params, 494'032'768u);
  EXPECT_EQ(qwen->kv.TokenBytes(), 12 * kKiB);
}

TEST(ParseModelShape, KnowsMlaAndDoesNotGuessItsParameters) {
  absl::StatusOr<ModelShape> model = ParseModelShape(R"({
    "hidden_size": 7168, "num_attention_heads": 128, "num_hidden_layers": 61, "v_head_dim": 128,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "intermediate_size": 18432, "vocab_size": 129280,
    "n_routed_experts": 256})");
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE(model->kv.mla());
  EXPECT_EQ(model->kv.TokenLayerBytes(), 1152u);
  EXPECT_EQ(model->kv.head_dim, 128u);
  EXPECT_EQ(model->params, 0u);
}

TEST(ParseModelShape, RefusesWithKeyValueAndBound) {
  const auto message = [](const std::string& config) {
    return std::string(ParseModelShape(config).status().message());
  };
  EXPECT_EQ(message("nonsense"), "not a JSON object");
  EXPECT_EQ(message("[]"), "not a JSON object");
  EXPECT_EQ(message("{}"), "num_hidden_layers is missing");
  EXPECT_EQ(message(R"({"num_hidden_layers": 0, "num_attention_heads": 1, "hidden_size": 8})"),
            "num_hidden_layers: 0 given, allowed are 1 to 1024");
  EXPECT_EQ(message(R"({"num_hidden_layers": 1, "num_attention_heads": -4, "hidden_size": 8})"),
            "num_attention_heads: -4 given, allowed are 1 to 1024");
  EXPECT_EQ(message(R"({"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": "8"})"),
            "hidden_size: \"8\" given, allowed are 1 to 16777216");
  // 1 / 4 heads leaves no element for a head.
  EXPECT_EQ(message(R"({"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 1})"),
            "head-dim: 0 given, allowed are 1 to 4096");
  EXPECT_EQ(message(R"({"torch_dtype": "int3"})"),
            "torch_dtype: \"int3\" given, allowed are \"bfloat16\", \"float16\" and \"float32\"");
}

TEST(ParseParams, TakesSuffixes) {
  EXPECT_EQ(ParseParams("8030261248"), 8'030'261'248u);
  EXPECT_EQ(ParseParams("8B"), 8'000'000'000u);
  EXPECT_EQ(ParseParams("8.03B"), 8'030'000'000u);
  EXPECT_EQ(ParseParams("494M"), 494'000'000u);
  for (const char* bad : {"", "B", "-1", "1e9", "8b", "0", "2000T", "1..2"}) {
    EXPECT_EQ(ParseParams(bad), std::nullopt) << bad;
  }
}

TEST(TokensToOutgrow, IsTheFirstTokenTooMany) {
  const uint64_t token = Llama3_8B().TokenBytes();
  EXPECT_EQ(TokensToOutgrow(10 * token, Llama3_8B()), 11u);
  EXPECT_EQ(TokensToOutgrow(10 * token - 1, Llama3_8B()), 10u);
}

TEST(BlocksInTier, IsWhatLarderdWouldFit) {
  EXPECT_EQ(BlocksInTier(1024 * kMiB, 2 * kMiB), 512u);
  // 32 slabs of 32 MiB, and 3 MiB do not divide them.
  EXPECT_EQ(BlocksInTier(1024 * kMiB, 3 * kMiB), 32u * 10);
  // A slot is a multiple of 4 KiB.
  EXPECT_EQ(BlocksInTier(64 * kMiB, 4097), 64 * kMiB / 8192);
  EXPECT_EQ(BlocksInTier(1 * kMiB, 2 * kMiB), 0u);
  EXPECT_EQ(BlocksInTier(100, 4096), 0u);
}

TEST(HeadsVariants, ComparesAtEqualWidth) {
  const std::vector<HeadsVariant> variants = HeadsVariants(Llama3_8B(), 32);
  ASSERT_EQ(variants.size(), 4u);
  const auto expect = [&](int i, const char* name, uint64_t token_layer_bytes) {
    EXPECT_EQ(variants[i].name, name);
    EXPECT_EQ(variants[i].kv.TokenLayerBytes(), token_layer_bytes) << name;
  };
  expect(0, "MHA", 16 * kKiB);
  expect(1, "GQA", 4 * kKiB);
  expect(2, "MQA", 512);
  expect(3, "MLA", 1152);
}

TEST(HeadsVariants, LeavesOutWhatIsNotKnown) {
  EXPECT_EQ(HeadsVariants(Llama3_8B(), 0).front().name, "GQA");
  KvShape mla;
  mla.layers = 1;
  mla.mla_latent_dim = 256;
  const std::vector<HeadsVariant> variants = HeadsVariants(mla, 16);
  ASSERT_EQ(variants.size(), 1u);
  EXPECT_EQ(variants[0].kv.TokenLayerBytes(), 512u);
}

}  // namespace
}  // namespace larder::cli
