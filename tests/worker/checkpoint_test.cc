#include "client/worker/checkpoint.h"

#include <functional>
#include <map>
#include <utility>

#include "client/worker/weights.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/worker/model_files.h"
#include "tests/worker/test_models.h"

namespace larder::worker {
namespace {

using testing::HasSubstr;

constexpr char kFirst[] = "model-00001-of-00002.safetensors";
constexpr char kSecond[] = "model-00002-of-00002.safetensors";
constexpr char kIndex[] = "model.safetensors.index.json";

// A small model whose tensors lie by turns in two files.
struct Sharded {
  std::map<std::string, std::vector<FileTensor>> files;
  nlohmann::json index;

  Sharded() {
    bool second = false;
    for (FileTensor& tensor : ZeroTensors(SmallConfig())) {
      const std::string file = second ? kSecond : kFirst;
      tensor.bytes[1] = second ? '\x3c' : '\x40';  // 1 or 2
      index["weight_map"][tensor.name] = file;
      files[file].push_back(std::move(tensor));
      second = !second;
    }
  }

  std::map<std::string, std::string> Bytes() const {
    std::map<std::string, std::string> bytes = {{"config.json", SmallConfigJson()},
                                                {kIndex, index.dump()}};
    for (const auto& [name, tensors] : files) bytes[name] = Safetensors(tensors);
    return bytes;
  }
};

absl::StatusOr<Weights> Load(const std::map<std::string, std::string>& files) {
  return Weights::Load(ModelDirectory(files).path());
}

TEST(CheckpointTest, SeveralFilesAreTheModelThatOneIs) {
  const Sharded model;
  const auto sharded = Load(model.Bytes());
  ASSERT_TRUE(sharded.ok()) << sharded.status();
  std::vector<FileTensor> all;
  for (const auto& [name, tensors] : model.files) {
    all.insert(all.end(), tensors.begin(), tensors.end());
  }
  const auto whole =
      Load({{"config.json", SmallConfigJson()}, {"model.safetensors", Safetensors(all)}});
  ASSERT_TRUE(whole.ok()) << whole.status();
  // So their blocks are shared, too.
  EXPECT_EQ(sharded->revision(), whole->revision());
  const std::string& name = model.files.at(kSecond).back().name;
  std::vector<float> row(sharded->tensor(name).columns);
  ReadRow(sharded->tensor(name), 0, row);
  EXPECT_EQ(row[0], 1);
}

TEST(CheckpointTest, OneFileCountsWhereBothAreThere) {
  auto files = Sharded().Bytes();
  files["model.safetensors"] = Safetensors(ZeroTensors(SmallConfig()));
  files[kIndex] = "nonsense";
  EXPECT_TRUE(Load(files).ok());
}

struct Damage {
  std::function<void(Sharded&)> model;
  std::function<void(std::map<std::string, std::string>&)> bytes;
  absl::StatusCode code;
  std::string message;
};

TEST(CheckpointTest, RefusesFilesThatDoNotFitTheirIndex) {
  const auto no_model = [](Sharded&) {};
  const auto no_bytes = [](std::map<std::string, std::string>&) {};
  const std::string first = Sharded().files[kFirst].front().name;
  const Damage damages[] = {
      {no_model, [](auto& files) { files.erase(kSecond); }, absl::StatusCode::kNotFound, kSecond},
      {no_model, [](auto& files) { files.erase(kIndex); }, absl::StatusCode::kNotFound,
       "/model.safetensors"},
      {no_model, [](auto& files) { files[kIndex] = "{"; }, absl::StatusCode::kInvalidArgument,
       std::string(kIndex) + ": index: not JSON"},
      {no_model, [](auto& files) { files[kSecond].resize(40); }, absl::StatusCode::kInvalidArgument,
       std::string(kSecond) + ": header"},
      {[](Sharded& model) { model.index.erase("weight_map"); }, no_bytes,
       absl::StatusCode::kInvalidArgument, "weight_map: allowed: an object"},
      {[&](Sharded& model) { model.index["weight_map"].erase(first); }, no_bytes,
       absl::StatusCode::kInvalidArgument, first + ": " + kIndex + " names no such tensor"},
      {[&](Sharded& model) { model.index["weight_map"][first] = kSecond; }, no_bytes,
       absl::StatusCode::kInvalidArgument, first + ": " + kIndex + " has it in " + kSecond},
      {[&](Sharded& model) { model.files[kFirst].erase(model.files[kFirst].begin()); }, no_bytes,
       absl::StatusCode::kInvalidArgument, first + ": missing; " + kIndex + " has it there"},
      {[&](Sharded& model) { model.files[kSecond].push_back(model.files[kFirst].front()); },
       no_bytes, absl::StatusCode::kInvalidArgument,
       first + ": " + kIndex + " has it in " + kFirst},
      {[&](Sharded& model) { model.index["weight_map"][first] = "../model.safetensors"; }, no_bytes,
       absl::StatusCode::kInvalidArgument,
       "\"../model.safetensors\"; allowed: a file of this directory"},
      {[&](Sharded& model) { model.index["weight_map"][first] = "weights.bin"; }, no_bytes,
       absl::StatusCode::kInvalidArgument, "\"weights.bin\"; allowed: a file of this directory"},
      {[&](Sharded& model) { model.index["weight_map"][first] = 7; }, no_bytes,
       absl::StatusCode::kInvalidArgument, first + ": allowed: a file of this directory"},
  };
  for (const Damage& damage : damages) {
    Sharded model;
    damage.model(model);
    auto files = model.Bytes();
    damage.bytes(files);
    const auto weights = Load(files);
    EXPECT_EQ(weights.status().code(), damage.code) << damage.message;
    EXPECT_THAT(std::string(weights.status().message()), HasSubstr(damage.message));
  }
}

}  // namespace
}  // namespace larder::worker
