#include "client/worker/model_config.h"

#include <functional>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/worker/model_files.h"
#include "tests/worker/test_models.h"

namespace larder::worker {
namespace {

using Json = nlohmann::json;
using testing::HasSubstr;

absl::StatusOr<ModelConfig> ParseChanged(const std::function<void(Json&)>& change) {
  Json json = Json::parse(SmallConfigJson());
  change(json);
  return ParseModelConfig(json.dump());
}

TEST(ModelConfigTest, ReadsEveryField) {
  const absl::StatusOr<ModelConfig> config = ParseModelConfig(SmallConfigJson());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(*config, SmallConfig());
}

TEST(ModelConfigTest, WhatIsMissingHasTransformersDefault) {
  const auto config = ParseChanged([](Json& json) {
    json["architectures"] = {"LlamaForCausalLM"};
    json["hidden_size"] = 96;
    for (const char* key : {"head_dim", "num_key_value_heads", "rope_theta", "rope_scaling",
                            "tie_word_embeddings", "hidden_act"}) {
      json.erase(key);
    }
  });
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->head_dim, 16u);
  EXPECT_EQ(config->kv_heads, 6u);
  EXPECT_EQ(config->rope_theta, 10'000);
  EXPECT_EQ(config->rope_scaling, RopeScaling());
  EXPECT_FALSE(config->tied_embeddings);
  EXPECT_FALSE(config->qkv_bias);
}

TEST(ModelConfigTest, RopeScalingInEachSpelling) {
  const RopeScaling llama3 = {.type = RopeScalingType::kLlama3,
                              .factor = 8,
                              .low_freq_factor = 1,
                              .high_freq_factor = 4,
                              .original_max_positions = 64};
  const Json llama3_json = {{"rope_type", "llama3"},
                            {"factor", 8},
                            {"low_freq_factor", 1.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", 64}};
  const auto old_spelling = ParseChanged([&](Json& json) { json["rope_scaling"] = llama3_json; });
  ASSERT_TRUE(old_spelling.ok()) << old_spelling.status();
  EXPECT_EQ(old_spelling->rope_scaling, llama3);

  // transformers 5: everything about RoPE in one object.
  const auto new_spelling = ParseChanged([&](Json& json) {
    json.erase("rope_theta");
    json.erase("rope_scaling");
    json["rope_parameters"] = llama3_json;
    json["rope_parameters"]["rope_theta"] = 500'000.0;
  });
  ASSERT_TRUE(new_spelling.ok()) << new_spelling.status();
  EXPECT_EQ(new_spelling->rope_scaling, llama3);
  EXPECT_EQ(new_spelling->rope_theta, 500'000);

  const auto linear = ParseChanged([](Json& json) {
    json["rope_scaling"] = {{"type", "linear"}, {"factor", 2.5}};
  });
  ASSERT_TRUE(linear.ok()) << linear.status();
  EXPECT_EQ(linear->rope_scaling.type, RopeScalingType::kLinear);
  EXPECT_EQ(linear->rope_scaling.factor, 2.5);
}

struct Refusal {
  const char* key;
  Json value;  // discarded: the key is taken away
  absl::StatusCode code;
  const char* message;
};

// The message names the field, its value and the bound.
TEST(ModelConfigTest, RefusesWhatItCannotDo) {
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;
  const Json missing(Json::value_t::discarded);
  const Refusal refusals[] = {
      {"architectures", {"GPT2LMHeadModel"}, kUnimplemented, "architectures: \"GPT2LMHeadModel\""},
      {"architectures", missing, kUnimplemented, "allowed: exactly one of"},
      {"num_hidden_layers", missing, kInvalid, "num_hidden_layers: missing; allowed"},
      {"num_hidden_layers", 0, kInvalid, "num_hidden_layers: 0; allowed: a whole number from 1"},
      {"num_hidden_layers", 1'025, kInvalid, "1025; allowed: a whole number from 1 to 1024"},
      {"num_hidden_layers", -3, kInvalid, "num_hidden_layers: -3;"},
      {"num_hidden_layers", 2.5, kInvalid, "num_hidden_layers: 2.5;"},
      {"num_hidden_layers", "3", kInvalid, "num_hidden_layers: \"3\";"},
      {"num_hidden_layers", 1e300, kInvalid, "num_hidden_layers: 1e+300;"},
      {"hidden_size", 1 << 18, kInvalid, "hidden_size: 262144;"},
      {"hidden_size", Json::array(), kInvalid, "hidden_size: a list;"},
      {"num_key_value_heads", 4, kInvalid, "num_key_value_heads: 4; allowed: a divisor of"},
      {"num_key_value_heads", 0, kInvalid, "num_key_value_heads: 0;"},
      {"head_dim", 15, kInvalid, "head_dim: 15; allowed: even numbers"},
      {"head_dim", missing, kInvalid, "num_attention_heads: 6; allowed without head_dim"},
      {"vocab_size", uint64_t{1} << 40, kInvalid, "vocab_size: 1099511627776;"},
      {"rms_norm_eps", 0, kInvalid, "rms_norm_eps: 0;"},
      {"rms_norm_eps", missing, kInvalid, "rms_norm_eps: missing"},
      {"rope_theta", 0.5, kInvalid, "rope_theta: 0.5;"},
      {"tie_word_embeddings", 1, kInvalid, "tie_word_embeddings: 1; allowed: true or false"},
      {"hidden_act", "gelu", kUnimplemented, "hidden_act: allowed: \"silu\""},
      {"attention_bias", true, kUnimplemented, "attention_bias: allowed: false"},
      {"mlp_bias", true, kUnimplemented, "mlp_bias: allowed: false"},
      {"use_sliding_window", true, kUnimplemented, "use_sliding_window: allowed: false"},
      {"quantization_config", Json::object(), kUnimplemented, "quantization_config: allowed"},
      {"partial_rotary_factor", 0.5, kUnimplemented, "partial_rotary_factor: allowed: 1"},
      {"layer_types", {"full_attention", "sliding_attention"}, kUnimplemented, "layer_types"},
      {"rope_scaling", 8, kInvalid, "rope_scaling: allowed: an object or null"},
      {"rope_scaling",
       {{"rope_type", "yarn"}, {"factor", 4}},
       kUnimplemented,
       "rope_scaling.rope_type: \"yarn\"; allowed: default, linear, llama3"},
      {"rope_scaling", {{"rope_type", "linear"}}, kInvalid, "rope_scaling.factor: missing"},
      {"rope_scaling",
       {{"rope_type", "linear"}, {"factor", 0.5}},
       kInvalid,
       "rope_scaling.factor: 0.5;"},
      {"rope_scaling",
       {{"rope_type", "llama3"},
        {"factor", 8},
        {"low_freq_factor", 4},
        {"high_freq_factor", 4},
        {"original_max_position_embeddings", 64}},
       kInvalid,
       "rope_scaling.high_freq_factor: 4; allowed: above low_freq_factor"},
  };
  for (const Refusal& refusal : refusals) {
    const auto config = ParseChanged([&](Json& json) {
      if (refusal.value.is_discarded()) {
        json.erase(refusal.key);
      } else {
        json[refusal.key] = refusal.value;
      }
    });
    SCOPED_TRACE(testing::Message() << refusal.key << ", " << refusal.message);
    ASSERT_FALSE(config.ok());
    EXPECT_EQ(config.status().code(), refusal.code) << config.status();
    EXPECT_THAT(std::string(config.status().message()), HasSubstr(refusal.message));
  }
}

TEST(ModelConfigTest, RefusesWhatIsNotJson) {
  const std::string deep(100'000, '[');
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("[]"), std::string("\xff\xfe"), deep,
        std::string("{\"num_hidden_layers\": 1e999}"),
        std::string("{\"a\": 1, \"a\": 2, ") + SmallConfigJson().substr(1)}) {
    const auto config = ParseModelConfig(text);
    EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument) << text.substr(0, 40);
  }
  EXPECT_THAT(std::string(ParseModelConfig(deep).status().message()),
              HasSubstr("nested 100000 deep; allowed: at most 32"));
}

TEST(ModelConfigTest, FilesHaveABoundAndAreNamed) {
  EXPECT_EQ(ReadModelConfig("/nowhere/config.json").status().code(), absl::StatusCode::kNotFound);
  const ModelDirectory large(std::string(2 << 20, ' ') + SmallConfigJson(), "");
  EXPECT_THAT(std::string(ReadModelConfig(large.path() + "/config.json").status().message()),
              HasSubstr("config.json: above 1048576 bytes"));
}

}  // namespace
}  // namespace larder::worker
