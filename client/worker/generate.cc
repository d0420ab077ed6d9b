// larder-worker generate: prompts in, text out.
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/flags.h"
#include "client/json.h"
#include "client/output.h"
#include "client/worker/engine.h"
#include "client/worker/tokenizer.h"
#include "client/worker/worker_flags.h"

namespace larder::worker {
namespace {

using cli::Json;

struct GenerateFlags {
  ModelFlags model;
  EngineFlags engine;
  std::vector<std::string> texts;
  std::vector<std::string> files;
  std::vector<std::string> token_lists;
  uint64_t samples = 1;
  uint64_t tokens_max = 128;
  uint64_t top_k = 0;
  SamplingOptions sampling;
  bool stream = false;

  void AddTo(CLI::App& app);
};

void GenerateFlags::AddTo(CLI::App& app) {
  CLI::Option_group* const prompts = app.add_option_group(
      "Prompts", "At least one; each may be given several times. Texts come first, then files");
  // One value a flag, or the values that follow would be taken for prompts.
  const auto each = [&](const char* name, std::vector<std::string>& values, const char* type,
                        const char* help) {
    prompts->add_option(name, values, help)
        ->type_name(type)
        ->expected(1)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  };
  each("--prompt", texts, "TEXT", "A text; each byte is a token");
  each("--prompt-file", files, "FILE", "A file of text");
  each("--tokens", token_lists, "LIST", "Token ids: 1,2,3");
  prompts->require_option(1, 0);

  constexpr char kSampling[] = "Sampling";
  cli::AddNumber(app, "-n,--samples", samples, 1, 65'536,
                 "Continuations of each prompt, at most --max-batch (default 1)")
      ->group(kSampling);
  cli::AddNumber(app, "--max-tokens", tokens_max, 1, ~uint32_t{0},
                 "Tokens of a continuation (default 128); fewer where the context ends")
      ->group(kSampling);
  cli::AddReal(app, "--temperature", sampling.temperature, 0, 100,
               "0: the most likely token each time (default 0)")
      ->group(kSampling);
  cli::AddNumber(app, "--top-k", top_k, 0, ~uint32_t{0},
                 "Draw from the N most likely tokens; 0: all (default 0)")
      ->group(kSampling);
  cli::AddReal(app, "--top-p", sampling.top_p, 1e-6, 1,
               "Draw from the likeliest tokens that reach this probability (default 1)")
      ->group(kSampling);
  cli::AddNumber(app, "--seed", sampling.seed, 0, ~uint64_t{0}, "Seed of the draws (default 0)")
      ->group(kSampling);

  app.add_flag("--stream", stream,
               "Write each token as it is chosen: its text, for one prompt and sample; with --json "
               "an object a line, before the result's");
  model.AddTo(app);
  engine.AddTo(app);
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return absl::InvalidArgumentError(
        absl::StrCat("--prompt-file: \"", path, "\": ", std::strerror(errno)));
  }
  return std::string((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
}

absl::StatusOr<std::vector<std::vector<uint32_t>>> ReadPrompts(const GenerateFlags& flags,
                                                               const Tokenizer& tokenizer) {
  std::vector<std::string> texts = flags.texts;
  for (const std::string& path : flags.files) {
    absl::StatusOr<std::string> text = ReadFile(path);
    if (!text.ok()) return text.status();
    texts.push_back(*std::move(text));
  }
  std::vector<std::vector<uint32_t>> prompts;
  for (const std::string& text : texts) {
    absl::StatusOr<std::vector<uint32_t>> tokens = tokenizer.Encode(text);
    if (!tokens.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("--prompt: ", tokens.status().message()));
    }
    prompts.push_back(*std::move(tokens));
  }
  for (const std::string& list : flags.token_lists) {
    absl::StatusOr<std::vector<uint32_t>> tokens = tokenizer.ParseIds(list);
    if (!tokens.ok()) return tokens.status();
    prompts.push_back(*std::move(tokens));
  }
  return prompts;
}

double PerSecond(uint64_t count, absl::Duration took) {
  return took > absl::ZeroDuration() ? static_cast<double>(count) / absl::ToDoubleSeconds(took) : 0;
}

// From the first to the last token; the first came out of the prompt.
double DecodeRate(const Result& result) {
  return PerSecond(result.stats.new_tokens - result.completions.size(),
                   result.stats.total - result.stats.ttft);
}

uint64_t PromptTokensComputed(const RequestStats& stats) {
  return stats.prompt_tokens - stats.reused_tokens();
}

double PrefillRateOf(const RequestStats& stats) {
  return PerSecond(PromptTokensComputed(stats),
                   stats.ttft - stats.queued - stats.lookup - stats.restore);
}

Json ToJson(const RequestStats& stats) {
  const auto ms = [](absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); };
  return {{"prompt_tokens", stats.prompt_tokens},
          {"reused_tokens",
           {{"gpu", stats.reused_gpu_tokens},
            {"host", stats.reused_host_tokens},
            {"nvme", stats.reused_nvme_tokens}}},
          {"prompt_tokens_computed", PromptTokensComputed(stats)},
          {"computed_tokens", stats.computed_tokens},
          {"new_tokens", stats.new_tokens},
          {"published_blocks", stats.published_blocks},
          {"local_blocks", stats.local_blocks},
          {"durable", stats.durable},
          {"cut_blocks", stats.cut_blocks},
          {"given_up_blocks", stats.given_up_blocks},
          {"restore_estimate_ms", ms(stats.restore_estimate)},
          {"compute_estimate_ms", ms(stats.compute_estimate)},
          {"queued_ms", ms(stats.queued)},
          {"lookup_ms", ms(stats.lookup)},
          {"restore_ms", ms(stats.restore)},
          {"ttft_ms", ms(stats.ttft)},
          {"total_ms", ms(stats.total)}};
}

Json ToJson(const Result& result, const Tokenizer& tokenizer) {
  Json json = ToJson(result.stats);
  json["prefill_tokens_per_second"] = PrefillRateOf(result.stats);
  json["decode_tokens_per_second"] = DecodeRate(result);
  json["completions"] = Json::array();
  for (const Completion& completion : result.completions) {
    json["completions"].push_back({{"text", tokenizer.Decode(completion.tokens)},
                                   {"tokens", completion.tokens},
                                   {"finish", std::string(FinishName(completion.finish))}});
  }
  return json;
}

// Texts on stdout, with a heading where there are several; figures on stderr.
void Print(const std::vector<Result>& results, const Tokenizer& tokenizer, bool streamed) {
  const bool one = results.size() == 1 && results[0].completions.size() == 1;
  for (size_t i = 0; i < results.size(); ++i) {
    for (size_t sample = 0; sample < results[i].completions.size(); ++sample) {
      const std::string text = tokenizer.Decode(results[i].completions[sample].tokens);
      if (!one) std::printf("%s== prompt %zu, sample %zu\n", i + sample > 0 ? "\n" : "", i, sample);
      if (!one || !streamed) std::fwrite(text.data(), 1, text.size(), stdout);
      std::putchar('\n');
    }
  }
  std::fflush(stdout);
  cli::Table table({">PROMPT", ">TOKENS", ">FROM GPU", ">HOST", ">NVME", ">COMPUTED", ">TTFT",
                    ">PREFILL/S", ">NEW", ">DECODE/S", ">BLOCKS SAVED"});
  for (size_t i = 0; i < results.size(); ++i) {
    const RequestStats& stats = results[i].stats;
    table.AddRow(
        {absl::StrCat(i), cli::FormatCount(stats.prompt_tokens),
         cli::FormatCount(stats.reused_gpu_tokens), cli::FormatCount(stats.reused_host_tokens),
         cli::FormatCount(stats.reused_nvme_tokens), cli::FormatCount(PromptTokensComputed(stats)),
         cli::FormatMicroseconds(absl::ToDoubleMicroseconds(stats.ttft)),
         absl::StrFormat("%.0f", PrefillRateOf(stats)), cli::FormatCount(stats.new_tokens),
         absl::StrFormat("%.1f", DecodeRate(results[i])),
         cli::FormatCount(stats.published_blocks)});
  }
  std::fprintf(stderr, "\n%s", table.Render().c_str());
}

void PrintToken(bool json, const Tokenizer& tokenizer, size_t prompt, uint32_t sample,
                uint32_t token) {
  const std::string text = tokenizer.Decode({&token, 1});
  if (json) {
    std::puts(cli::Dump({{"prompt", prompt}, {"sample", sample}, {"token", token}, {"text", text}})
                  .c_str());
  } else {
    std::fwrite(text.data(), 1, text.size(), stdout);
  }
  std::fflush(stdout);
}

// Generates for all prompts at once; results in the prompts' order.
absl::StatusOr<std::vector<Result>> Generate(Engine& engine, const GenerateFlags& flags, bool json,
                                             const Tokenizer& tokenizer,
                                             std::vector<std::vector<uint32_t>> prompts) {
  const bool stream = flags.stream && (json || (prompts.size() == 1 && flags.samples == 1));
  for (size_t i = 0; i < prompts.size(); ++i) {
    Request request;
    request.prompt = std::move(prompts[i]);
    request.new_tokens_max = static_cast<uint32_t>(flags.tokens_max);
    request.samples = static_cast<uint32_t>(flags.samples);
    request.sampling = flags.sampling;
    request.sampling.top_k = static_cast<uint32_t>(flags.top_k);
    request.end_token = tokenizer.end_token();
    if (stream) {
      request.on_token = [&, i](uint32_t sample, uint32_t token) {
        PrintToken(json, tokenizer, i, sample, token);
      };
    }
    if (absl::StatusOr<uint64_t> id = engine.Submit(std::move(request)); !id.ok()) {
      return id.status();
    }
  }
  if (absl::Status ran = engine.Run(); !ran.ok()) return ran;
  std::vector<Result> results = engine.TakeResults();
  std::sort(results.begin(), results.end(),
            [](const Result& a, const Result& b) { return a.id < b.id; });
  return results;
}

int Run(const Command& command, const GenerateFlags& flags) {
  constexpr char kCommand[] = "generate";
  absl::StatusOr<std::unique_ptr<Transformer>> transformer =
      flags.model.Load(flags.engine.rows_max());
  if (!transformer.ok()) return Fail(command, kCommand, transformer.status());
  const Tokenizer tokenizer((*transformer)->config().vocab);
  absl::StatusOr<std::vector<std::vector<uint32_t>>> prompts = ReadPrompts(flags, tokenizer);
  if (!prompts.ok()) return Fail(command, kCommand, prompts.status());
  absl::StatusOr<std::unique_ptr<Engine>> engine =
      Engine::Create(**transformer, flags.engine.Options(kCommand));
  if (!engine.ok()) return Fail(command, kCommand, engine.status());
  absl::StatusOr<std::vector<Result>> results =
      Generate(**engine, flags, command.json, tokenizer, *std::move(prompts));
  if (!results.ok()) return Fail(command, kCommand, results.status());
  if (!command.json) {
    Print(*results, tokenizer, flags.stream);
    return cli::kOk;
  }
  const EngineStats stats = (*engine)->stats();
  Json json = {{"prompts", Json::array()},
               {"steps", stats.steps},
               {"sequences_peak", stats.sequences_peak},
               {"computing_ms", absl::ToDoubleMilliseconds(stats.computing)}};
  for (const Result& result : *results) json["prompts"].push_back(ToJson(result, tokenizer));
  std::puts(cli::Dump(json).c_str());
  return cli::kOk;
}

}  // namespace

void RegisterGenerate(CLI::App& app, Command& command) {
  CLI::App* const generate = app.add_subcommand("generate", "Continue prompts");
  const auto flags = std::make_shared<GenerateFlags>();
  flags->AddTo(*generate);
  generate->callback(
      [&command, flags] { command.run = [&command, flags] { return Run(command, *flags); }; });
}

}  // namespace larder::worker
