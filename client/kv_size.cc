#include "client/kv_size.h"

#include <limits>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "storage/slab_size.h"
#include "storage/slot_allocator.h"

namespace larder::cli {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kLayersMax = 1024;
constexpr uint64_t kHeadsMax = 1024;
constexpr uint64_t kHeadDimMax = 4096;
constexpr uint64_t kMlaDimMax = 8192;
constexpr uint64_t kWidthMax = uint64_t{1} << 24;  // of hidden and MLP layers, and of vocabularies
constexpr uint64_t kSeqLenMax = uint64_t{1} << 40;
constexpr uint64_t kDeepSeekLatentDim = 512;
constexpr uint64_t kDeepSeekRopeDim = 64;

absl::Status OutOfRange(std::string_view field, std::string_view value, uint64_t min,
                        uint64_t max) {
  return absl::InvalidArgumentError(absl::StrCat(std::string(field), ": ", std::string(value),
                                                 " given, allowed are ", min, " to ", max));
}

absl::Status CheckRange(const char* field, uint64_t value, uint64_t min, uint64_t max) {
  if (value >= min && value <= max) return absl::OkStatus();
  return OutOfRange(field, absl::StrCat(value), min, max);
}

// Reads whole numbers of a config; the first that is not allowed is kept as the error.
class Fields {
 public:
  explicit Fields(const Json& object) : object_(object) {}

  // `missing` where the key is not there or null.
  uint64_t Number(const char* key, uint64_t missing, uint64_t min, uint64_t max) {
    const auto found = object_.find(key);
    if (found == object_.end() || found->is_null()) return missing;
    if (found->is_number_unsigned() && found->get<uint64_t>() >= min &&
        found->get<uint64_t>() <= max) {
      return found->get<uint64_t>();
    }
    Refuse(OutOfRange(key, found->dump(-1, ' ', false, Json::error_handler_t::replace), min, max));
    return missing;
  }

  uint64_t Required(const char* key, uint64_t max) {
    if (!object_.contains(key)) {
      Refuse(absl::InvalidArgumentError(absl::StrCat(key, " is missing")));
      return 1;
    }
    return Number(key, 1, 1, max);
  }

  bool Has(const char* key) const { return object_.contains(key) && !object_[key].is_null(); }
  const absl::Status& status() const { return status_; }

 private:
  void Refuse(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

  const Json& object_;
  absl::Status status_;
};

absl::StatusOr<v1::DType> DTypeOf(const Json& config) {
  for (const char* key : {"torch_dtype", "dtype"}) {
    const auto found = config.find(key);
    if (found == config.end() || found->is_null()) continue;
    if (*found == "bfloat16") return v1::DTYPE_BF16;
    if (*found == "float16") return v1::DTYPE_F16;
    if (*found == "float32") return v1::DTYPE_F32;
    return absl::InvalidArgumentError(
        absl::StrCat(key, ": ", found->dump(-1, ' ', false, Json::error_handler_t::replace),
                     " given, allowed are \"bfloat16\", \"float16\" and \"float32\""));
  }
  return v1::DTYPE_BF16;
}

// Of a dense model of Llama's or Qwen2's kind; 0 where the config is of another kind or does not
// say enough.
uint64_t CountParams(Fields& fields, const Json& config, const ModelShape& model, uint64_t width) {
  for (const char* key : {"num_experts", "num_local_experts", "n_routed_experts"}) {
    if (fields.Has(key)) return 0;
  }
  if (model.kv.mla() || !fields.Has("intermediate_size") || !fields.Has("vocab_size")) return 0;
  const uint64_t mlp = fields.Required("intermediate_size", kWidthMax);
  const uint64_t vocab = fields.Required("vocab_size", kWidthMax);
  const bool tied = config.value("tie_word_embeddings", Json(false)) == true;
  const bool bias = model.architecture == "Qwen2ForCausalLM";
  const uint64_t q = model.query_heads * model.kv.head_dim;
  const uint64_t kv = model.kv.kv_heads * model.kv.head_dim;
  const uint64_t attention = 2 * width * q + 2 * width * kv + (bias ? q + 2 * kv : 0);
  const uint64_t layer = attention + 3 * width * mlp + 2 * width;
  return (tied ? 1 : 2) * vocab * width + model.kv.layers * layer + width;
}

std::string ArchitectureOf(const Json& config) {
  const auto found = config.find("architectures");
  if (found == config.end() || !found->is_array() || found->empty()) return {};
  return found->front().is_string() ? found->front().get<std::string>() : std::string();
}

}  // namespace

uint64_t ElementBytes(v1::DType dtype) {
  switch (dtype) {
    case v1::DTYPE_F32: return 4;
    case v1::DTYPE_F16:
    case v1::DTYPE_BF16: return 2;
    default: return 1;
  }
}

uint64_t KvShape::TokenLayerBytes() const {
  const uint64_t elements = mla() ? mla_latent_dim + mla_rope_dim : 2 * kv_heads * head_dim;
  const uint64_t scales = mla() ? 1 : 2 * kv_heads;
  const uint64_t element_bytes = ElementBytes(dtype);
  return elements * element_bytes + (element_bytes == 1 ? scales * sizeof(float) : 0);
}

absl::Status Check(const KvShape& shape) {
  const bool heads = !shape.mla();
  for (absl::Status status :
       {CheckRange("layers", shape.layers, 1, kLayersMax),
        CheckRange("kv-heads", shape.kv_heads, heads ? 1 : 0, kHeadsMax),
        CheckRange("head-dim", shape.head_dim, heads ? 1 : 0, kHeadDimMax),
        CheckRange("mla-latent-dim", shape.mla_latent_dim, 0, kMlaDimMax),
        CheckRange("mla-rope-dim", shape.mla_rope_dim, 0, heads ? 0 : kMlaDimMax)}) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelShape> ParseModelShape(std::string_view config_json) {
  const Json config = Json::parse(config_json, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) return absl::InvalidArgumentError("not a JSON object");
  absl::StatusOr<v1::DType> dtype = DTypeOf(config);
  if (!dtype.ok()) return dtype.status();
  Fields fields(config);
  ModelShape model;
  model.architecture = ArchitectureOf(config);
  model.kv.dtype = *dtype;
  model.kv.layers = fields.Required("num_hidden_layers", kLayersMax);
  model.query_heads = fields.Required("num_attention_heads", kHeadsMax);
  const uint64_t width = fields.Required("hidden_size", kWidthMax);
  model.kv.kv_heads = fields.Number("num_key_value_heads", model.query_heads, 1, kHeadsMax);
  model.kv.mla_latent_dim = fields.Number("kv_lora_rank", 0, 1, kMlaDimMax);
  const uint64_t head_dim = fields.Number("v_head_dim", width / model.query_heads, 1, kHeadDimMax);
  model.kv.head_dim = fields.Number("head_dim", head_dim, 1, kHeadDimMax);
  if (model.kv.mla()) {
    model.kv.mla_rope_dim = fields.Number("qk_rope_head_dim", 0, 0, kMlaDimMax);
  }
  model.seq_len_max = fields.Number("max_position_embeddings", 0, 1, kSeqLenMax);
  model.params = CountParams(fields, config, model, width);
  if (!fields.status().ok()) return fields.status();
  if (absl::Status status = Check(model.kv); !status.ok()) return status;
  return model;
}

std::optional<uint64_t> ParseParams(std::string_view given) {
  constexpr double kMost = 1e15;
  absl::string_view text(given.data(), given.size());
  double scale = 1;
  if (!text.empty() && (text.back() == 'M' || text.back() == 'B' || text.back() == 'T')) {
    scale = text.back() == 'M' ? 1e6 : text.back() == 'B' ? 1e9 : 1e12;
    text.remove_suffix(1);
  }
  double number = 0;
  const bool digits = !text.empty() && text.find_first_not_of("0123456789.") == text.npos;
  if (!digits || !absl::SimpleAtod(text, &number)) return std::nullopt;
  if (number * scale < 1 || number * scale > kMost) return std::nullopt;
  return static_cast<uint64_t>(number * scale + 0.5);
}

uint64_t TokensToOutgrow(uint64_t weights_bytes, const KvShape& shape) {
  return weights_bytes / shape.TokenBytes() + 1;
}

uint64_t BlocksInTier(uint64_t tier_bytes, uint32_t block_bytes) {
  tier_bytes -= tier_bytes % kSlotGranule;
  if (tier_bytes == 0) return 0;
  SlotAllocator slots(tier_bytes, SlabSize(tier_bytes));
  return slots.slots_max(slots.AddPool(block_bytes));
}

std::vector<HeadsVariant> HeadsVariants(const KvShape& shape, uint64_t query_heads) {
  const auto with_heads = [&](uint64_t kv_heads) {
    KvShape other = shape;
    other.kv_heads = kv_heads;
    other.mla_latent_dim = other.mla_rope_dim = 0;
    return other;
  };
  KvShape latent = shape;
  if (!shape.mla()) {
    latent.mla_latent_dim = kDeepSeekLatentDim;
    latent.mla_rope_dim = kDeepSeekRopeDim;
  }
  std::vector<HeadsVariant> variants;
  if (shape.head_dim != 0) {
    if (query_heads != 0) variants.push_back({"MHA", with_heads(query_heads)});
    if (!shape.mla() && shape.kv_heads != 1 && shape.kv_heads != query_heads) {
      variants.push_back({"GQA", with_heads(shape.kv_heads)});
    }
    variants.push_back({"MQA", with_heads(1)});
  }
  variants.push_back({"MLA", latent});
  return variants;
}

}  // namespace larder::cli
