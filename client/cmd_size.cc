// larder size: what a model's K/V take, before anything is bought or started.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/flags.h"
#include "client/json.h"
#include "client/kv_size.h"
#include "client/names.h"
#include "client/output.h"
#include "client/read_file.h"

namespace larder::cli {
namespace {

constexpr char kCommand[] = "size";
constexpr uint64_t kBlockBytesMax = uint64_t{1} << 30;  // larderd's bound
constexpr uint64_t kBatchMax = 1000;
constexpr uint64_t kSeqLenMax = uint64_t{1} << 24;
constexpr uint64_t kSeqLenDefault = 8192;
constexpr const char* kTierNames[] = {"gpu", "host", "nvme"};

struct SizeFlags {
  std::string config;
  uint64_t layers = 0;
  uint64_t heads = 0;
  uint64_t kv_heads = 0;
  uint64_t head_dim = 0;
  uint64_t mla_latent_dim = 0;
  uint64_t mla_rope_dim = 0;
  v1::DType dtype = v1::DTYPE_UNSPECIFIED;  // the config's, else bf16
  uint64_t block_tokens = 16;
  uint64_t shards = 1;
  uint64_t batch = 1;
  uint64_t seq_len = 0;  // the config's, at most kSeqLenMax, else kSeqLenDefault
  std::string params;
  uint64_t tier_bytes[3] = {};  // 0: not asked about
};

// What there is to say; the flags and the config have become one.
struct Question {
  std::string name;  // of the model, for the first line
  KvShape kv;
  uint64_t query_heads = 0;
  uint64_t params = 0;
  uint64_t weights_bytes = 0;
  uint64_t block_tokens = 0;
  uint64_t shards = 1;
  uint64_t batch = 0;
  uint64_t seq_len = 0;
  uint64_t tier_bytes[3] = {};

  // Of each rank: its heads, or the whole latent.
  uint64_t RankTokenBytes() const { return kv.TokenBytes() / (kv.mla() ? 1 : shards); }
  uint64_t RankBlockBytes() const { return block_tokens * RankTokenBytes(); }
  // Of all ranks together: what HOST and NVME hold.
  uint64_t BlockBytes() const { return shards * RankBlockBytes(); }
  uint64_t SlotBytes(int tier) const { return tier == 0 ? RankBlockBytes() : BlockBytes(); }
  uint64_t BatchBytes(const KvShape& shape) const { return batch * seq_len * shape.TokenBytes(); }
};

constexpr uint64_t kConfigBytesMax = 1 << 20;

absl::StatusOr<ModelShape> ReadConfig(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile("--model", path, kConfigBytesMax);
  if (!text.ok()) return text.status();
  absl::StatusOr<ModelShape> model = ParseModelShape(*text);
  if (model.ok()) return model;
  return absl::InvalidArgumentError(absl::StrCat("--model: ", path, ": ",
                                                 model.status().message()));
}

// Flags win over what the config says.
void Override(const SizeFlags& flags, ModelShape& model) {
  const auto take = [](uint64_t given, uint64_t& value) {
    if (given != 0) value = given;
  };
  take(flags.layers, model.kv.layers);
  take(flags.kv_heads, model.kv.kv_heads);
  take(flags.head_dim, model.kv.head_dim);
  take(flags.mla_latent_dim, model.kv.mla_latent_dim);
  take(flags.mla_rope_dim, model.kv.mla_rope_dim);
  take(flags.heads, model.query_heads);
}

absl::Status CheckBlock(const Question& question) {
  if (!question.kv.mla() && question.kv.kv_heads % question.shards != 0) {
    return absl::InvalidArgumentError(absl::StrCat("--kv-heads: ", question.kv.kv_heads,
                                                   " given, must be a multiple of --shards, ",
                                                   question.shards));
  }
  const uint64_t bytes = question.BlockBytes();
  if (bytes <= kBlockBytesMax) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("--block-tokens: ", question.block_tokens,
                                                 " given, that makes blocks of ", bytes,
                                                 " bytes, at most ", kBlockBytesMax));
}

absl::StatusOr<Question> Ask(const SizeFlags& flags) {
  ModelShape model;
  if (!flags.config.empty()) {
    absl::StatusOr<ModelShape> read = ReadConfig(flags.config);
    if (!read.ok()) return read.status();
    model = *std::move(read);
  }
  const v1::DType weights_dtype = model.kv.dtype;
  Override(flags, model);
  if (flags.dtype != v1::DTYPE_UNSPECIFIED) model.kv.dtype = flags.dtype;
  if (absl::Status status = Check(model.kv); !status.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("--", status.message()));
  }
  Question question;
  question.name = model.architecture;
  question.kv = model.kv;
  question.query_heads = model.query_heads;
  question.params = model.params;
  if (!flags.params.empty()) {
    const std::optional<uint64_t> params = ParseParams(flags.params);
    if (!params) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--params: \"", flags.params, "\" must be a count like 494M, 8.03B or 8030261248"));
    }
    question.params = *params;
  }
  question.weights_bytes = question.params * ElementBytes(weights_dtype);
  question.block_tokens = flags.block_tokens;
  question.shards = flags.shards;
  question.batch = flags.batch;
  const uint64_t context = model.seq_len_max != 0 ? model.seq_len_max : kSeqLenDefault;
  question.seq_len = flags.seq_len != 0 ? flags.seq_len : std::min(context, kSeqLenMax);
  if (absl::Status status = CheckBlock(question); !status.ok()) return status;
  std::copy(std::begin(flags.tier_bytes), std::end(flags.tier_bytes), question.tier_bytes);
  return question;
}

std::string HeadsText(const KvShape& kv) {
  if (kv.mla()) return absl::StrCat("latent ", kv.mla_latent_dim, " + ", kv.mla_rope_dim);
  return absl::StrCat(kv.kv_heads, " x ", kv.head_dim);
}

std::string Exactly(uint64_t bytes) {
  return bytes < 1024 ? FormatBytes(bytes)
                      : absl::StrCat(FormatBytes(bytes), " (", FormatCount(bytes), " B)");
}

void PrintSizes(const Question& q) {
  std::printf("%s%llu layers, K/V heads %s, %s\n\n", q.name.empty() ? "" : (q.name + ": ").c_str(),
              static_cast<unsigned long long>(q.kv.layers), HeadsText(q.kv).c_str(),
              absl::AsciiStrToLower(DTypeName(q.kv.dtype)).c_str());
  Table table({"WHAT", "BYTES"});
  table.AddRow({"a token and layer", Exactly(q.kv.TokenLayerBytes())});
  table.AddRow({"a token", Exactly(q.kv.TokenBytes())});
  table.AddRow({absl::StrCat("a block and layer (", q.block_tokens, " tokens)"),
                Exactly(q.block_tokens * q.kv.TokenLayerBytes())});
  table.AddRow({"a block", Exactly(q.BlockBytes())});
  if (q.shards > 1) {
    table.AddRow({absl::StrCat("a token, each of ", q.shards, " ranks"),
                  Exactly(q.RankTokenBytes())});
    table.AddRow({absl::StrCat("a block, each of ", q.shards, " ranks"),
                  Exactly(q.RankBlockBytes())});
  }
  table.AddRow({absl::StrCat(FormatCount(q.batch), " x ", FormatCount(q.seq_len), " tokens"),
                Exactly(q.BatchBytes(q.kv))});
  if (q.params != 0) {
    table.AddRow({absl::StrCat("weights (", FormatCount(q.params), " parameters)"),
                  Exactly(q.weights_bytes)});
  }
  std::fputs(table.Render().c_str(), stdout);
  if (q.params == 0) return;
  const uint64_t tokens = TokensToOutgrow(q.weights_bytes, q.kv);
  std::printf("\nK/V outgrow the weights at %s tokens", FormatCount(tokens).c_str());
  if (q.batch > 1) {
    std::printf(", %s in each of %s sequences",
                FormatCount((tokens + q.batch - 1) / q.batch).c_str(),
                FormatCount(q.batch).c_str());
  }
  std::puts("");
}

void PrintHeads(const Question& q, const std::vector<HeadsVariant>& variants) {
  Table table({"HEADS", "K/V A LAYER", ">A TOKEN", ">A BLOCK", ">ALL TOKENS", ">OF THIS"});
  for (const HeadsVariant& variant : variants) {
    table.AddRow({variant.name, HeadsText(variant.kv), FormatBytes(variant.kv.TokenBytes()),
                  FormatBytes(q.block_tokens * variant.kv.TokenBytes()),
                  FormatBytes(q.BatchBytes(variant.kv)),
                  FormatPercent(variant.kv.TokenBytes(), q.kv.TokenBytes())});
  }
  std::printf("\n%s", table.Render().c_str());
}

void PrintTiers(const Question& q) {
  Table table({"TIER", ">BYTES", ">BLOCKS", ">TOKENS", ">SEQUENCES"});
  for (int t = 0; t < 3; ++t) {
    if (q.tier_bytes[t] == 0) continue;
    const uint64_t blocks = BlocksInTier(q.tier_bytes[t], static_cast<uint32_t>(q.SlotBytes(t)));
    const uint64_t tokens = blocks * q.block_tokens;
    const bool each = t == 0 && q.shards > 1;
    table.AddRow({absl::AsciiStrToUpper(kTierNames[t]),
                  absl::StrCat(each ? absl::StrCat(q.shards, " x ") : "",
                               FormatBytes(q.tier_bytes[t])),
                  FormatCount(blocks), FormatCount(tokens), FormatCount(tokens / q.seq_len)});
  }
  if (!table.empty()) std::printf("\n%s", table.Render().c_str());
}

Json ToJson(const Question& q, const std::vector<HeadsVariant>& variants) {
  Json json = {{"layers", q.kv.layers},
               {"kv_heads", q.kv.kv_heads},
               {"head_dim", q.kv.head_dim},
               {"mla_latent_dim", q.kv.mla_latent_dim},
               {"mla_rope_dim", q.kv.mla_rope_dim},
               {"dtype", DTypeName(q.kv.dtype)},
               {"block_tokens", q.block_tokens},
               {"batch", q.batch},
               {"seq_len", q.seq_len},
               {"bytes_per_token_layer", q.kv.TokenLayerBytes()},
               {"bytes_per_token", q.kv.TokenBytes()},
               {"bytes_per_block_layer", q.block_tokens * q.kv.TokenLayerBytes()},
               {"bytes_per_block", q.BlockBytes()},
               {"shards", q.shards},
               {"bytes_per_token_rank", q.RankTokenBytes()},
               {"bytes_per_block_rank", q.RankBlockBytes()},
               {"bytes", q.BatchBytes(q.kv)}};
  if (q.params != 0) {
    json["params"] = q.params;
    json["weights_bytes"] = q.weights_bytes;
    json["tokens_to_outgrow_weights"] = TokensToOutgrow(q.weights_bytes, q.kv);
  }
  json["heads"] = Json::array();
  for (const HeadsVariant& variant : variants) {
    json["heads"].push_back({{"name", variant.name},
                             {"bytes_per_token", variant.kv.TokenBytes()},
                             {"bytes", q.BatchBytes(variant.kv)}});
  }
  json["tiers"] = Json::array();
  for (int t = 0; t < 3; ++t) {
    if (q.tier_bytes[t] == 0) continue;
    const uint64_t blocks = BlocksInTier(q.tier_bytes[t], static_cast<uint32_t>(q.SlotBytes(t)));
    json["tiers"].push_back({{"tier", absl::AsciiStrToUpper(kTierNames[t])},
                             {"bytes", q.tier_bytes[t]},
                             {"blocks", blocks},
                             {"tokens", blocks * q.block_tokens}});
  }
  return json;
}

int RunSize(const Invocation& invocation, const SizeFlags& flags) {
  absl::StatusOr<Question> question = Ask(flags);
  if (!question.ok()) return Fail(invocation, kCommand, question.status());
  const std::vector<HeadsVariant> variants = HeadsVariants(question->kv, question->query_heads);
  if (invocation.json) {
    std::puts(Dump(ToJson(*question, variants)).c_str());
    return kOk;
  }
  PrintSizes(*question);
  PrintHeads(*question, variants);
  PrintTiers(*question);
  return kOk;
}

}  // namespace

void RegisterSize(CLI::App& app, Invocation& invocation) {
  CLI::App* const size = app.add_subcommand(
      kCommand, "How many bytes a model's K/V take, and what the tiers would hold");
  const auto flags = std::make_shared<SizeFlags>();
  size->add_option("--model", flags->config,
                   "A Hugging Face config.json; the flags below win over what it says")
      ->type_name("FILE");
  AddNumber(*size, "--layers", flags->layers, 1, 1024, "Layers");
  AddNumber(*size, "--heads", flags->heads, 1, 1024, "Query heads, to compare with MHA");
  AddNumber(*size, "--kv-heads", flags->kv_heads, 1, 1024, "K/V heads");
  AddNumber(*size, "--head-dim", flags->head_dim, 1, 4096, "Elements of a head");
  AddNumber(*size, "--mla-latent-dim", flags->mla_latent_dim, 1, 8192, "MLA's latent elements");
  AddNumber(*size, "--mla-rope-dim", flags->mla_rope_dim, 1, 8192, "MLA's rope elements");
  AddDType(*size, "--dtype", flags->dtype,
           "Of K/V: f32, f16, bf16, f8_e4m3 or i8 (default the model's, else bf16)");
  AddNumber(*size, "--block-tokens", flags->block_tokens, 1, 1024,
            "Tokens in a block (default 16)");
  AddNumber(*size, "--shards,--tensor-parallel", flags->shards, 1, 16,
            "Tensor-parallel ranks (default 1): each has its part of a block in its own GPU");
  AddNumber(*size, "--batch", flags->batch, 1, kBatchMax, "Sequences at a time (default 1)");
  AddNumber(*size, "--seq-len", flags->seq_len, 1, kSeqLenMax,
            "Tokens in each (default the model's context, else 8192)");
  size->add_option("--params", flags->params, "Parameters of the weights: 494M, 8.03B")
      ->type_name("N");
  for (int t = 0; t < 3; ++t) {
    AddBytes(*size, absl::StrCat("--", kTierNames[t], "-bytes"), flags->tier_bytes[t], 1,
             absl::StrCat("Size of the ", absl::AsciiStrToUpper(kTierNames[t]),
                          " tier", t == 0 ? ", of each rank" : "", ", to say what it holds"));
  }
  size->callback([&invocation, flags] {
    invocation.run = [&invocation, flags] { return RunSize(invocation, *flags); };
  });
}

}  // namespace larder::cli
