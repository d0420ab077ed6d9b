#include "tests/worker/model_files.h"

#include <stdlib.h>

#include <fstream>
#include <numeric>

#include "client/worker/tensor_names.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/worker/test_models.h"

namespace larder::worker {

std::string SmallConfigJson() {
  const ModelConfig c = SmallConfig();
  return nlohmann::json{{"architectures", {"Qwen2ForCausalLM"}},
                        {"hidden_act", "silu"},
                        {"num_hidden_layers", c.layers},
                        {"hidden_size", c.hidden},
                        {"num_attention_heads", c.heads},
                        {"num_key_value_heads", c.kv_heads},
                        {"head_dim", c.head_dim},
                        {"intermediate_size", c.ffn},
                        {"vocab_size", c.vocab},
                        {"max_position_embeddings", c.max_positions},
                        {"tie_word_embeddings", c.tied_embeddings},
                        {"rope_theta", c.rope_theta},
                        {"rope_scaling", nullptr},
                        {"use_sliding_window", false},
                        {"rms_norm_eps", c.rms_norm_eps}}
      .dump();
}

std::vector<FileTensor> ZeroTensors(const ModelConfig& config) {
  std::vector<FileTensor> tensors;
  for (const WantedTensor& wanted : WantedTensors(config)) {
    const uint64_t elements =
        std::accumulate(wanted.shape.begin(), wanted.shape.end(), uint64_t{1}, std::multiplies<>());
    tensors.push_back({wanted.name, "F16", wanted.shape, std::string(elements * 2, '\0')});
  }
  return tensors;
}

std::string RawSafetensors(std::string_view header, std::string_view data) {
  std::string file(8, '\0');
  for (int i = 0; i < 8; ++i) {
    file[static_cast<size_t>(i)] = static_cast<char>(uint64_t{header.size()} >> (8 * i));
  }
  return file.append(header).append(data);
}

std::string Safetensors(const std::vector<FileTensor>& tensors) {
  nlohmann::ordered_json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const FileTensor& tensor : tensors) {
    header[tensor.name] = {{"dtype", tensor.dtype},
                           {"shape", tensor.shape},
                           {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
    data += tensor.bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return RawSafetensors(text, data);
}

ModelDirectory::ModelDirectory(const std::map<std::string, std::string>& files) {
  std::string path = testing::TempDir() + "larder_model_XXXXXX";
  EXPECT_NE(::mkdtemp(path.data()), nullptr);
  path_ = path;
  for (const auto& [name, bytes] : files) {
    std::ofstream(path_ / name, std::ios::binary) << bytes;
  }
}

ModelDirectory::ModelDirectory(std::string_view config_json, std::string_view safetensors)
    : ModelDirectory({{"config.json", std::string(config_json)},
                      {"model.safetensors", std::string(safetensors)}}) {}

ModelDirectory::~ModelDirectory() { std::filesystem::remove_all(path_); }

}  // namespace larder::worker
