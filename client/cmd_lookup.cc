// larder lookup, explain: what the cache has of a prompt, and why no more.
#include <cstdio>
#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "client/commands.h"
#include "client/json.h"
#include "client/names.h"
#include "client/output.h"
#include "client/prompt_flags.h"

namespace larder::cli {
namespace {

std::string YesOrDot(bool yes) { return yes ? "yes" : "."; }

void PrintLookup(const v1::LookupPrefixResponse& found, const Prompt& prompt) {
  std::printf("%s of %s tokens are cached (%s of %s blocks)\n",
              FormatCount(found.matched_tokens()).c_str(),
              FormatCount(prompt.tokens.size()).c_str(),
              FormatCount(found.matched_tokens() / prompt.model.block_tokens()).c_str(),
              FormatCount(prompt.blocks()).c_str());
  Table table({"TIER", ">POSITION", ">BLOCKS", ">BYTES"});
  for (const v1::Run& run : found.runs()) {
    table.AddRow({TierName(run.tier()), FormatCount(run.position()), FormatCount(run.blocks()),
                  FormatBytes(run.blocks() * WholeBlockBytes(prompt.model))});
  }
  if (!table.empty()) std::printf("\n%s", table.Render().c_str());
  if (found.restore().bytes() != 0) {
    std::printf("\nrestoring %s from NVME takes about %s\n",
                FormatBytes(found.restore().bytes()).c_str(),
                FormatMicroseconds(static_cast<double>(found.restore().microseconds())).c_str());
  }
}

int RunLookup(const Invocation& invocation, const PromptFlags& flags) {
  constexpr char kCommand[] = "lookup";
  absl::StatusOr<Prompt> prompt = OpenPrompt(invocation, flags);
  if (!prompt.ok()) return Fail(invocation, kCommand, prompt.status());
  absl::StatusOr<v1::LookupPrefixResponse> found =
      prompt->client.Peek(prompt->model.model_id(), prompt->tokens);
  if (!found.ok()) return Fail(invocation, kCommand, found.status());
  if (!invocation.json) {
    PrintLookup(*found, *prompt);
    return kOk;
  }
  Json json = ToJson(*found);
  json["model_id"] = FormatId(prompt->model.model_id());
  json["asked_tokens"] = prompt->tokens.size();
  std::puts(Dump(json).c_str());
  return kOk;
}

void PrintExplanation(const v1::ExplainResponse& explained) {
  std::printf("%s of %s blocks match; %s\n", FormatCount(explained.matched_blocks()).c_str(),
              FormatCount(explained.asked_blocks()).c_str(), explained.stopped_because().c_str());
  if (explained.ignored_tail_tokens() != 0) {
    std::printf("the last %u tokens are less than a block and were ignored\n",
                explained.ignored_tail_tokens());
  }
  Table table({">POSITION", ">BLOCKS", "GPU", "HOST", "NVME", ">PINS", ">HITS", ">GOES ON TO"});
  for (const v1::ExplainSegment& segment : explained.segments()) {
    table.AddRow({FormatCount(segment.position()), FormatCount(segment.blocks()),
                  YesOrDot(segment.gpu()), YesOrDot(segment.host()), YesOrDot(segment.nvme()),
                  FormatCount(segment.pins()), FormatCount(segment.hits()),
                  absl::StrCat(segment.children(), " paths")});
  }
  if (!table.empty()) std::printf("\n%s", table.Render().c_str());
}

int RunExplain(const Invocation& invocation, const PromptFlags& flags) {
  constexpr char kCommand[] = "explain";
  absl::StatusOr<Prompt> prompt = OpenPrompt(invocation, flags);
  if (!prompt.ok()) return Fail(invocation, kCommand, prompt.status());
  absl::StatusOr<v1::ExplainResponse> explained =
      prompt->client.Explain(prompt->model.model_id(), prompt->tokens);
  if (!explained.ok()) return Fail(invocation, kCommand, explained.status());
  if (invocation.json) {
    std::puts(Dump(ToJson(*explained)).c_str());
  } else {
    PrintExplanation(*explained);
  }
  return kOk;
}

using Runner = int (*)(const Invocation&, const PromptFlags&);

void Register(CLI::App& app, Invocation& invocation, const char* name, const char* help,
              Runner runner) {
  CLI::App* const command = app.add_subcommand(name, help);
  const auto flags = std::make_shared<PromptFlags>();
  flags->AddTo(*command);
  command->callback([&invocation, flags, runner] {
    invocation.run = [&invocation, flags, runner] { return runner(invocation, *flags); };
  });
}

}  // namespace

void RegisterLookup(CLI::App& app, Invocation& invocation) {
  Register(app, invocation, "lookup", "How much of a prompt is cached, and in which tiers",
           RunLookup);
  Register(app, invocation, "explain", "Why a prompt hits or misses, segment by segment",
           RunExplain);
}

}  // namespace larder::cli
