#include "client/worker/weights.h"

#include <cmath>
#include <functional>

#include "client/worker/tensor_names.h"
#include "client/worker/transformer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/worker/model_files.h"
#include "tests/worker/test_models.h"

namespace larder::worker {
namespace {

using testing::HasSubstr;

absl::StatusOr<Weights> LoadChanged(const std::function<void(std::vector<FileTensor>&)>& change) {
  std::vector<FileTensor> tensors = ZeroTensors(SmallConfig());
  change(tensors);
  return Weights::Load(ModelDirectory(SmallConfigJson(), Safetensors(tensors)).path());
}

FileTensor& Named(std::vector<FileTensor>& tensors, const std::string& name) {
  return *std::find_if(tensors.begin(), tensors.end(),
                       [&](const FileTensor& tensor) { return tensor.name == name; });
}

TEST(WeightsTest, ReadsHalvesExactly) {
  const auto row = [](Dtype dtype, std::initializer_list<uint16_t> halves) {
    const std::vector<uint16_t> bits = halves;
    std::vector<float> out(bits.size());
    ReadRow({.dtype = dtype,
             .rows = 1,
             .columns = bits.size(),
             .bytes = std::as_bytes(std::span(bits))},
            0, out);
    return out;
  };
  // 1, -2, the largest, the smallest normal, the smallest subnormal, -0.
  EXPECT_EQ(row(Dtype::kF16, {0x3c00, 0xc000, 0x7bff, 0x0400, 0x0001, 0x8000}),
            (std::vector<float>{1, -2, 65'504, 0x1p-14f, 0x1p-24f, 0}));
  EXPECT_EQ(row(Dtype::kF16, {0x7c00, 0xfc00}), (std::vector<float>{INFINITY, -INFINITY}));
  EXPECT_TRUE(std::isnan(row(Dtype::kF16, {0x7e00})[0]));
  EXPECT_TRUE(std::signbit(row(Dtype::kF16, {0x8000})[0]));
  EXPECT_EQ(row(Dtype::kBf16, {0x3f80, 0xc040, 0x0001}), (std::vector<float>{1, -3, 0x1p-133f}));
}

TEST(WeightsTest, LoadsWhatTheConfigurationCallsFor) {
  const auto weights = LoadChanged([](std::vector<FileTensor>& tensors) {
    Named(tensors, "model.layers.1.mlp.up_proj.weight").bytes[2] = '\x01';
    // Of other trainers; says nothing of its own.
    tensors.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", "F32", {1}, "1234"});
    tensors.push_back({"lm_head.weight", "F16", {1, 1}, "12"});
  });
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(weights->config(), SmallConfig());
  const Tensor& tensor = weights->tensor("model.layers.1.mlp.up_proj.weight");
  EXPECT_EQ(tensor.rows, 150u);
  EXPECT_EQ(tensor.columns, 80u);
  std::vector<float> row(tensor.columns);
  ReadRow(tensor, 0, row);
  EXPECT_EQ(row[1], 0x1p-24f);
  EXPECT_TRUE(Transformer::Create(*LoadChanged([](auto&) {})).ok());
}

TEST(WeightsTest, RevisionIsOfEveryByteAndTheConfiguration) {
  const auto plain = LoadChanged([](auto&) {});
  ASSERT_TRUE(plain.ok());
  EXPECT_EQ(plain->revision(), LoadChanged([](auto&) {})->revision());
  EXPECT_EQ(plain->revision().size(), 5u + 32u);
  const auto changed = LoadChanged(
      [](std::vector<FileTensor>& tensors) { Named(tensors, kFinalNorm).bytes.back() = '\x01'; });
  EXPECT_NE(plain->revision(), changed->revision());
  std::string json = SmallConfigJson();
  json.replace(json.find("\"rms_norm_eps\":1e-06"), 20, "\"rms_norm_eps\":2e-06");
  const auto other_epsilon =
      Weights::Load(ModelDirectory(json, Safetensors(ZeroTensors(SmallConfig()))).path());
  ASSERT_TRUE(other_epsilon.ok()) << other_epsilon.status();
  EXPECT_NE(plain->revision(), other_epsilon->revision());
}

TEST(WeightsTest, RefusesFilesThatDoNotFitTheirConfiguration) {
  const auto missing = LoadChanged([](std::vector<FileTensor>& tensors) {
    std::erase_if(tensors, [](const FileTensor& t) { return t.name == kFinalNorm; });
  });
  EXPECT_THAT(std::string(missing.status().message()),
              HasSubstr("model.norm.weight: missing; config.json calls for it"));
  const auto transposed = LoadChanged([](std::vector<FileTensor>& tensors) {
    std::reverse(tensors[2].shape.begin(), tensors[2].shape.end());
  });
  EXPECT_THAT(std::string(transposed.status().message()),
              HasSubstr("q_proj.weight.shape: [80, 96]; allowed by config.json: [96, 80]"));
  const auto flat = LoadChanged([](std::vector<FileTensor>& tensors) {
    Named(tensors, kFinalNorm).shape = {1, 80};
  });
  EXPECT_THAT(std::string(flat.status().message()), HasSubstr("model.norm.weight.shape: [1, 80]"));
  const auto more = LoadChanged([](std::vector<FileTensor>& tensors) {
    tensors.push_back({"model.layers.3.mlp.up_proj.weight", "F16", {1}, "12"});
  });
  EXPECT_THAT(std::string(more.status().message()),
              HasSubstr("model.layers.3.mlp.up_proj.weight: config.json calls for no such"));
  EXPECT_EQ(Weights::Load("/nowhere").status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(Weights::Load(ModelDirectory(SmallConfigJson(), "").path()).ok());
}

TEST(WeightsTest, RandomIsOfConfigurationAndSeedAlone) {
  const auto first = Weights::Random(SmallConfig(), 1);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->revision(), Weights::Random(SmallConfig(), 1)->revision());
  EXPECT_NE(first->revision(), Weights::Random(SmallConfig(), 2)->revision());
  ModelConfig none = SmallConfig();
  none.kv_heads = 0;
  EXPECT_EQ(Weights::Random(none, 1).status().code(), absl::StatusCode::kInvalidArgument);

  const Tensor& tensor = first->tensor("model.layers.0.mlp.down_proj.weight");
  double sum = 0, squares = 0;
  std::vector<float> row(tensor.columns);
  for (uint64_t i = 0; i < tensor.rows; ++i) {
    ReadRow(tensor, i, row);
    for (const float value : row) sum += value, squares += value * value;
  }
  const double count = static_cast<double>(tensor.rows * tensor.columns);
  EXPECT_NEAR(sum / count, 0, 1e-2);
  EXPECT_NEAR(std::sqrt(squares / count * 150), 1, 2e-2);
}

TEST(WeightsTest, ReleasedTensorsLeaveTheirNeighboursAlone) {
  auto weights = Weights::Random(SmallConfig(), 1);
  ASSERT_TRUE(weights.ok());
  const auto read = [&](const std::string& name) {
    const Tensor& tensor = weights->tensor(name);
    return std::vector<std::byte>(tensor.bytes.begin(), tensor.bytes.end());
  };
  const auto gate = read("model.layers.0.mlp.gate_proj.weight");
  const auto down = read("model.layers.0.mlp.down_proj.weight");
  weights->Release("model.layers.0.mlp.up_proj.weight");
  EXPECT_EQ(read("model.layers.0.mlp.gate_proj.weight"), gate);
  EXPECT_EQ(read("model.layers.0.mlp.down_proj.weight"), down);
}

}  // namespace
}  // namespace larder::worker
