// A Hugging Face model directory as bytes that a test can damage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "client/worker/model_config.h"

namespace larder::worker {

// A config.json that ParseModelConfig reads back as SmallConfig().
std::string SmallConfigJson();

struct FileTensor {
  std::string name;
  std::string dtype;  // as in the file, e.g. "BF16"
  std::vector<uint64_t> shape;
  std::string bytes;
};

// All tensors that `config` calls for, zero, in F16.
std::vector<FileTensor> ZeroTensors(const ModelConfig& config);

// A .safetensors file around any header text, which need not be true.
std::string RawSafetensors(std::string_view header, std::string_view data);
// A valid file of these tensors, one after the other.
std::string Safetensors(const std::vector<FileTensor>& tensors);

// A directory with these files, removed with the object.
class ModelDirectory {
 public:
  explicit ModelDirectory(const std::map<std::string, std::string>& files);
  ModelDirectory(std::string_view config_json, std::string_view safetensors);
  ModelDirectory(const ModelDirectory&) = delete;
  ModelDirectory& operator=(const ModelDirectory&) = delete;
  ~ModelDirectory();

  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

}  // namespace larder::worker
