#include "client/worker/bench_command.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/flags.h"
#include "client/worker/bench.h"

namespace larder::worker {
namespace {

struct Experiment {
  const char* name;
  absl::Status (*run)(bench::Bench&);
  const char* help;
};

constexpr Experiment kExperiments[] = {
    {"work", bench::RunWork, "K/V computations, with K/V kept and without"},
    {"prefix", bench::RunPrefix, "two requests share a document (needs --larderd)"},
    {"restore", bench::RunRestore,
     "a prefix from HOST, and from NVMe after the daemon was killed (needs --larderd)"},
    {"paging", bench::RunPaging, "memory of 50 sequences: paged, and reserved for the longest"},
    {"heads", bench::RunHeads, "MHA, GQA, MQA and MLA: bytes and time (the kernels alone)"},
    {"prefetch", bench::RunPrefetch, "restoring before the request comes (needs --larderd)"},
    {"speculation", bench::RunSpeculation, "an n-gram draft, verified in one pass"},
    {"sinks", bench::RunSinks, "StreamingLLM: a text many times as long as the context"},
};

struct BenchFlags {
  ModelFlags model;
  std::vector<std::string> experiments;
  std::string larderd;
  std::string directory = std::filesystem::temp_directory_path().string();
  std::string output;
  std::string text;
  std::string rows;
  uint64_t chunk_tokens = bench::BenchOptions().chunk_tokens;
  uint64_t prefix_tokens = bench::BenchOptions().prefix_tokens;

  void AddTo(CLI::App& app);
};

void BenchFlags::AddTo(CLI::App& app) {
  std::vector<std::string> names;
  std::string footer = "Experiments:\n";
  for (const Experiment& experiment : kExperiments) {
    names.push_back(experiment.name);
    absl::StrAppend(&footer, "  ", experiment.name,
                    std::string(14 - std::strlen(experiment.name), ' '), experiment.help, "\n");
  }
  app.footer(footer);
  app.add_option("EXPERIMENT", experiments, "Which (default: all)")
      ->type_name("NAME")
      ->check(CLI::Validator(
          [names](const std::string& name) {
            const bool known = std::find(names.begin(), names.end(), name) != names.end();
            return known
                       ? std::string()
                       : absl::StrCat("\"", name, "\" must be one of ", absl::StrJoin(names, ", "));
          },
          ""));
  app.add_option("--larderd", larderd, "The larderd that experiments start, kill and restart")
      ->type_name("FILE");
  app.add_option("--directory", directory,
                 "Where its sockets and its NVMe tier go, on the drive that is to be measured "
                 "(default: the temporary directory)")
      ->type_name("DIR");
  app.add_option("--output", output, "Where CSV files and SVG plots go; made where it is not there")
      ->type_name("DIR")
      ->required();
  app.add_option("--text", text,
                 "A text for the prompts of byte-level models (default: tokens are drawn)")
      ->type_name("FILE");
  cli::AddNumber(app, "--chunk-tokens", chunk_tokens, 1, 32'768,
                 "Prompt tokens computed in one pass (default 256)");
  cli::AddNumber(app, "--prefix-tokens", prefix_tokens, 16, kPositionsMax,
                 "The longest prefix of prefix, restore and prefetch (default 4000)");
  app.add_option("--rows", rows, "Add rows for tests/bench/run.sh to this file")->type_name("FILE");
  model.AddTo(app);
}

absl::StatusOr<std::string> ReadText(const std::string& path) {
  if (path.empty()) return std::string();
  std::ifstream file(path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!text.empty()) return text;
  return absl::InvalidArgumentError(
      absl::StrCat("--text: \"", path, "\": ", file.is_open() ? "empty" : std::strerror(errno)));
}

absl::StatusOr<bench::Bench> Open(const BenchFlags& flags, bool json) {
  bench::BenchOptions options;
  options.larderd = flags.larderd;
  options.directory = flags.directory;
  options.random_weights = flags.model.random_weights();
  options.chunk_tokens = static_cast<uint32_t>(flags.chunk_tokens);
  options.prefix_tokens = static_cast<uint32_t>(flags.prefix_tokens);
  options.model_name =
      absl::StrCat(flags.model.name(), options.random_weights ? ", random weights" : "");
  absl::StatusOr<std::string> text = ReadText(flags.text);
  if (!text.ok()) return text.status();
  options.text_name =
      text->empty() ? "drawn tokens" : std::filesystem::path(flags.text).filename().string();
  options.text = *std::move(text);
  absl::StatusOr<bench::Report> report = bench::Report::Create(flags.output, flags.rows, json);
  if (!report.ok()) return report.status();
  return bench::Bench(flags.model, std::move(options), *std::move(report));
}

int Run(const Command& command, const BenchFlags& flags) {
  constexpr char kCommand[] = "bench";
  absl::StatusOr<bench::Bench> bench = Open(flags, command.json);
  if (!bench.ok()) return Fail(command, kCommand, bench.status());
  for (const Experiment& experiment : kExperiments) {
    const std::vector<std::string>& wanted = flags.experiments;
    if (!wanted.empty() &&
        std::find(wanted.begin(), wanted.end(), experiment.name) == wanted.end()) {
      continue;
    }
    if (absl::Status done = experiment.run(*bench); !done.ok()) {
      return Fail(command, absl::StrCat(kCommand, " ", experiment.name), done);
    }
  }
  return cli::kOk;
}

}  // namespace

void RegisterBench(CLI::App& app, Command& command) {
  CLI::App* const bench = app.add_subcommand("bench", "Measure what K/V that are kept are worth");
  const auto flags = std::make_shared<BenchFlags>();
  flags->AddTo(*bench);
  bench->callback(
      [&command, flags] { command.run = [&command, flags] { return Run(command, *flags); }; });
}

}  // namespace larder::worker
