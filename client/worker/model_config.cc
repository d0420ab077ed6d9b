#include "client/worker/model_config.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "client/worker/json_reader.h"

namespace larder::worker {
namespace {

constexpr double kThetaMax = 1e12;
constexpr double kFactorMax = 1e6;
constexpr double kEpsMin = 1e-12;
constexpr double kEpsMax = 1;
constexpr size_t kFileBytesMax = 1 << 20;

absl::Status OutOfBounds(absl::string_view field, double value, double min, double max) {
  if (value >= min && value <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", value, "; allowed: ", min, " to ", max));
}

absl::Status ValidateScaling(const RopeScaling& scaling) {
  absl::Status status = OutOfBounds("rope_scaling.factor", scaling.factor, 1, kFactorMax);
  if (scaling.type != RopeScalingType::kLlama3) return status;
  status.Update(
      OutOfBounds("rope_scaling.low_freq_factor", scaling.low_freq_factor, 1e-3, kFactorMax));
  status.Update(
      OutOfBounds("rope_scaling.high_freq_factor", scaling.high_freq_factor, 1e-3, kFactorMax));
  status.Update(OutOfBounds("rope_scaling.original_max_position_embeddings",
                            scaling.original_max_positions, 1, kPositionsMax));
  if (status.ok() && scaling.high_freq_factor <= scaling.low_freq_factor) {
    return absl::InvalidArgumentError(
        absl::StrCat("rope_scaling.high_freq_factor: ", scaling.high_freq_factor,
                     "; allowed: above low_freq_factor, which is ", scaling.low_freq_factor));
  }
  return status;
}

// One of our architectures, and nothing that changes its arithmetic.
Architecture ReadArchitecture(JsonReader& reader) {
  const nlohmann::json* const names = reader.Find("architectures");
  std::string name;
  if (names != nullptr && names->is_array() && names->size() == 1 && (*names)[0].is_string()) {
    name = (*names)[0].get<std::string>();
  }
  for (const Architecture known : {Architecture::kLlama, Architecture::kQwen2}) {
    if (name == ArchitectureName(known)) return known;
  }
  reader.Fail(absl::UnimplementedError(absl::StrCat("architectures: \"", name.substr(0, 64),
                                                    "\"; allowed: exactly one of LlamaForCausalLM, "
                                                    "Qwen2ForCausalLM")));
  return Architecture::kLlama;
}

void RefuseWhatWeDoNot(JsonReader& reader) {
  const auto refuse = [&](absl::string_view key, absl::string_view wanted) {
    reader.Fail(absl::UnimplementedError(absl::StrCat(key, ": allowed: ", wanted)));
  };
  if (reader.Text("hidden_act", "silu") != "silu") refuse("hidden_act", "\"silu\"");
  for (const absl::string_view key : {"attention_bias", "mlp_bias", "use_sliding_window"}) {
    if (reader.Flag(key, false)) refuse(key, "false");
  }
  if (reader.Find("quantization_config") != nullptr) refuse("quantization_config", "none");
  if (reader.Real("partial_rotary_factor", 0, 1, 1) != 1) refuse("partial_rotary_factor", "1");
  if (const nlohmann::json* const types = reader.Find("layer_types"); types != nullptr) {
    bool all_full = types->is_array();
    for (const nlohmann::json& type : *types) all_full = all_full && type == "full_attention";
    if (!all_full) refuse("layer_types", "\"full_attention\" for each layer");
  }
}

// `reader` reads rope_scaling (transformers 4) or rope_parameters (5).
RopeScaling ReadScaling(JsonReader& reader, absl::string_view path) {
  RopeScaling scaling;
  // "type" is the older name of the field.
  const std::string type = reader.Text("rope_type", reader.Text("type", "default"));
  if (type == "default") return scaling;
  if (type == "linear") {
    scaling.type = RopeScalingType::kLinear;
    scaling.factor = reader.Real("factor", 1, kFactorMax);
  } else if (type == "llama3") {
    scaling.type = RopeScalingType::kLlama3;
    scaling.factor = reader.Real("factor", 1, kFactorMax);
    scaling.low_freq_factor = reader.Real("low_freq_factor", 1e-3, kFactorMax);
    scaling.high_freq_factor = reader.Real("high_freq_factor", 1e-3, kFactorMax);
    scaling.original_max_positions =
        static_cast<uint32_t>(reader.Integer("original_max_position_embeddings", 1, kPositionsMax));
  } else {
    reader.Fail(absl::UnimplementedError(absl::StrCat(path, "rope_type: \"", type.substr(0, 64),
                                                      "\"; allowed: default, linear, llama3")));
  }
  return scaling;
}

void ReadRope(JsonReader& reader, ModelConfig& config) {
  config.rope_theta = reader.Real("rope_theta", 1, kThetaMax, config.rope_theta);
  for (const absl::string_view key : {"rope_scaling", "rope_parameters"}) {
    const nlohmann::json* const object = reader.Find(key);
    if (object == nullptr) continue;
    if (!object->is_object()) {
      reader.Fail(absl::InvalidArgumentError(absl::StrCat(key, ": allowed: an object or null")));
      continue;
    }
    const std::string path = absl::StrCat(key, ".");
    JsonReader rope(*object, path);
    config.rope_theta = rope.Real("rope_theta", 1, kThetaMax, config.rope_theta);
    config.rope_scaling = ReadScaling(rope, path);
    reader.Fail(rope.status());
  }
}

}  // namespace

std::string_view ArchitectureName(Architecture architecture) {
  return architecture == Architecture::kLlama ? "LlamaForCausalLM" : "Qwen2ForCausalLM";
}

absl::Status Validate(const ModelConfig& config) {
  absl::Status status;
  const auto in = [&](absl::string_view field, uint64_t value, uint64_t max) {
    status.Update(OutOfBounds(field, static_cast<double>(value), 1, static_cast<double>(max)));
  };
  in("num_hidden_layers", config.layers, kLayersMax);
  in("hidden_size", config.hidden, kWidthMax);
  in("num_attention_heads", config.heads, kHeadsMax);
  in("num_key_value_heads", config.kv_heads, kHeadsMax);
  in("head_dim", config.head_dim, kHeadDimMax);
  in("intermediate_size", config.ffn, kWidthMax);
  in("vocab_size", config.vocab, kVocabMax);
  in("max_position_embeddings", config.max_positions, kPositionsMax);
  status.Update(OutOfBounds("rope_theta", config.rope_theta, 1, kThetaMax));
  status.Update(OutOfBounds("rms_norm_eps", config.rms_norm_eps, kEpsMin, kEpsMax));
  status.Update(ValidateScaling(config.rope_scaling));
  if (!status.ok()) return status;
  if (config.heads % config.kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat("num_key_value_heads: ", config.kv_heads,
                                                   "; allowed: a divisor of num_attention_heads, "
                                                   "which is ",
                                                   config.heads));
  }
  if (config.head_dim % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("head_dim: ", config.head_dim, "; allowed: even numbers"));
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view text) {
  const absl::StatusOr<nlohmann::json> json =
      ParseJson(absl::string_view(text.data(), text.size()), "config.json");
  if (!json.ok()) return json.status();
  JsonReader reader(*json);
  const auto integer = [&](absl::string_view key, uint32_t max,
                           std::optional<uint64_t> fallback = std::nullopt) {
    return static_cast<uint32_t>(reader.Integer(key, 1, max, fallback));
  };
  ModelConfig config;
  config.architecture = ReadArchitecture(reader);
  config.layers = integer("num_hidden_layers", kLayersMax);
  config.hidden = integer("hidden_size", kWidthMax);
  config.heads = integer("num_attention_heads", kHeadsMax);
  config.kv_heads = integer("num_key_value_heads", kHeadsMax, config.heads);
  if (reader.status().ok() && reader.Find("head_dim") == nullptr &&
      config.hidden % config.heads != 0) {
    reader.Fail(absl::InvalidArgumentError(absl::StrCat(
        "num_attention_heads: ", config.heads,
        "; allowed without head_dim: a divisor of hidden_size, which is ", config.hidden)));
  }
  config.head_dim = integer("head_dim", kHeadDimMax, config.hidden / config.heads);
  config.ffn = integer("intermediate_size", kWidthMax);
  config.vocab = integer("vocab_size", kVocabMax);
  config.max_positions = integer("max_position_embeddings", kPositionsMax);
  config.tied_embeddings = reader.Flag("tie_word_embeddings", false);
  config.qkv_bias = config.architecture == Architecture::kQwen2;
  config.rms_norm_eps = reader.Real("rms_norm_eps", kEpsMin, kEpsMax);
  ReadRope(reader, config);
  RefuseWhatWeDoNot(reader);
  if (!reader.status().ok()) return reader.status();
  const absl::Status valid = Validate(config);
  if (!valid.ok()) return valid;
  return config;
}

absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  std::string text(kFileBytesMax + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.size() > kFileBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": above ", kFileBytesMax, " bytes, the most that is read"));
  }
  absl::StatusOr<ModelConfig> config = ParseModelConfig(text);
  if (config.ok()) return config;
  return absl::Status(config.status().code(), absl::StrCat(path, ": ", config.status().message()));
}

}  // namespace larder::worker
