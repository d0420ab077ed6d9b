// Prompt flags: which model, and which tokens.
//
// Thread safety: none. Objects stay where they are once AddTo was called.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/client.h"
#include "client/commands.h"
#include "larder/v1/types.pb.h"

namespace CLI {  // its own header takes longer to compile than all of ours
class App;
}  // namespace CLI

namespace larder::cli {

// --model NAME with geometry flags, or --model-id HEX for a model that is open.
class ModelFlags {
 public:
  // The default geometry is a small one: 8 layers of 2 heads of 64 elements, bf16, 16 tokens
  // a block, that is 64 KiB a block.
  ModelFlags();
  ModelFlags(const ModelFlags&) = delete;
  ModelFlags& operator=(const ModelFlags&) = delete;

  void AddTo(CLI::App& app);
  bool given() const { return !spec_.name().empty() || model_id_ != 0; }
  // Opens the model, or finds the open one. INVALID_ARGUMENT when neither flag was given.
  absl::StatusOr<v1::Model> Resolve(const Client& client) const;
  void set_default_name(const std::string& name) { spec_.set_name(name); }

 private:
  v1::ModelSpec spec_;
  v1::DType dtype_ = v1::DTYPE_BF16;
  uint64_t layers_ = 8;
  uint64_t kv_heads_ = 2;
  uint64_t head_dim_ = 64;
  uint64_t mla_latent_dim_ = 0;
  uint64_t mla_rope_dim_ = 0;
  uint64_t block_tokens_ = 16;
  uint64_t shards_ = 1;
  uint64_t model_id_ = 0;  // 0: use the spec
};

// Exactly one of --tokens 1,2,3, --tokens-file F and --text "...".
class TokenFlags {
 public:
  TokenFlags() = default;
  TokenFlags(const TokenFlags&) = delete;
  TokenFlags& operator=(const TokenFlags&) = delete;

  void AddTo(CLI::App& app);
  absl::StatusOr<std::vector<uint32_t>> Read() const;

 private:
  std::string tokens_;
  std::string file_;
  std::string text_;
};

struct PromptFlags {
  ModelFlags model;
  TokenFlags tokens;

  void AddTo(CLI::App& app);
};

// What the flags name, with the client that knows the model.
struct Prompt {
  Client client;
  v1::Model model;
  std::vector<uint32_t> tokens;

  uint32_t blocks() const;  // whole ones
};

// Reads the tokens, connects and opens the model. INVALID_ARGUMENT without a whole block.
absl::StatusOr<Prompt> OpenPrompt(const Invocation& invocation, const PromptFlags& flags);

}  // namespace larder::cli
