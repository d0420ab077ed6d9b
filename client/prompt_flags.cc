#include "client/prompt_flags.h"

#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "client/connect.h"
#include "client/flags.h"
#include "client/read_file.h"

namespace larder::cli {
namespace {

// 1,048,576 tokens, the longest prompt, of ten digits and a few separators.
constexpr uint64_t kTokensBytesMax = 16 << 20;

absl::StatusOr<std::vector<uint32_t>> ReadTokensFile(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile("--tokens-file", path, kTokensBytesMax);
  if (!text.ok()) return text.status();
  return ParseTokens(*text, path, /*lines=*/true);
}

}  // namespace

ModelFlags::ModelFlags() = default;

void ModelFlags::AddTo(CLI::App& app) {
  constexpr char kGroup[] = "Model";
  CLI::Option* const name =
      app.add_option("--model", *spec_.mutable_name(), "Name of the model's weights")
          ->type_name("NAME")
          ->group(kGroup);
  AddId(app, "--model-id", model_id_, "An open model, instead of --model and what follows")
      ->group(kGroup)
      ->excludes(name);
  const auto text = [&](const char* flag, std::string* value, const char* help) {
    app.add_option(flag, *value, help)->type_name("TEXT")->group(kGroup);
  };
  text("--revision", spec_.mutable_weights_revision(), "Revision of the weights");
  text("--lora", spec_.mutable_lora(), "LoRA adapter and its revision");
  text("--salt", spec_.mutable_salt(), "Keeps tenants apart");
  const auto number = [&](const char* flag, uint64_t& value, uint64_t min, uint64_t max,
                          const std::string& help) {
    AddNumber(app, flag, value, min, max, absl::StrCat(help, " (default ", value, ")"))
        ->group(kGroup);
  };
  number("--layers", layers_, 1, 1024, "Layers");
  number("--kv-heads", kv_heads_, 0, 1024, "K/V heads; 0 for MLA");
  number("--head-dim", head_dim_, 0, 4096, "Elements of a head; 0 for MLA");
  number("--mla-latent-dim", mla_latent_dim_, 0, 8192, "MLA's latent elements");
  number("--mla-rope-dim", mla_rope_dim_, 0, 8192, "MLA's rope elements");
  number("--block-tokens", block_tokens_, 1, 1024, "Tokens in a block");
  number("--shards", shards_, 1, 16, "Tensor-parallel ranks; divide the K/V heads");
  AddDType(app, "--dtype", dtype_, "f32, f16, bf16, f8_e4m3 or i8 (default bf16)")->group(kGroup);
}

absl::StatusOr<v1::Model> ModelFlags::Resolve(const Client& client) const {
  if (model_id_ != 0) return client.FindModel(model_id_);
  if (spec_.name().empty()) {
    return absl::InvalidArgumentError("one of --model and --model-id is required");
  }
  v1::ModelSpec spec = spec_;
  spec.set_layers(static_cast<uint32_t>(layers_));
  spec.set_kv_heads(static_cast<uint32_t>(kv_heads_));
  spec.set_head_dim(static_cast<uint32_t>(head_dim_));
  spec.set_mla_latent_dim(static_cast<uint32_t>(mla_latent_dim_));
  spec.set_mla_rope_dim(static_cast<uint32_t>(mla_rope_dim_));
  spec.set_block_tokens(static_cast<uint32_t>(block_tokens_));
  spec.set_shards(static_cast<uint32_t>(shards_));
  spec.set_dtype(dtype_);
  return client.OpenModel(spec);
}

void TokenFlags::AddTo(CLI::App& app) {
  CLI::Option_group* const group = app.add_option_group("Prompt", "Exactly one of");
  group->add_option("--tokens", tokens_, "Token ids: 1,2,3")->type_name("LIST");
  group->add_option("--tokens-file", file_, "A file of token ids, apart by commas or space")
      ->type_name("FILE");
  group->add_option("--text", text_, "A text, each byte one token")->type_name("TEXT");
  group->require_option(1);
}

absl::StatusOr<std::vector<uint32_t>> TokenFlags::Read() const {
  if (!file_.empty()) return ReadTokensFile(file_);
  if (!tokens_.empty()) return ParseTokens(tokens_, "--tokens", /*lines=*/false);
  if (text_.size() > kTokensMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("--text: ", text_.size(), " bytes, must be at most ", kTokensMax));
  }
  std::vector<uint32_t> tokens;
  tokens.reserve(text_.size());
  for (const char c : text_) tokens.push_back(static_cast<uint8_t>(c));
  return tokens;
}

void PromptFlags::AddTo(CLI::App& app) {
  tokens.AddTo(app);
  model.AddTo(app);
}

uint32_t Prompt::blocks() const {
  return static_cast<uint32_t>(tokens.size() / model.block_tokens());
}

absl::StatusOr<Prompt> OpenPrompt(const Invocation& invocation, const PromptFlags& flags) {
  absl::StatusOr<std::vector<uint32_t>> tokens = flags.tokens.Read();
  if (!tokens.ok()) return tokens.status();
  absl::StatusOr<Client> client = ConnectTo(invocation);
  if (!client.ok()) return client.status();
  absl::StatusOr<v1::Model> model = flags.model.Resolve(*client);
  if (!model.ok()) return model.status();
  if (tokens->size() < model->block_tokens()) {
    return absl::InvalidArgumentError(absl::StrCat("the prompt has ", tokens->size(),
                                                   " tokens, must have at least one block of ",
                                                   model->block_tokens()));
  }
  return Prompt{*std::move(client), *std::move(model), *std::move(tokens)};
}

}  // namespace larder::cli
