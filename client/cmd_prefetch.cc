// larder prefetch, evict: moves blocks up, and drops copies.
#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "client/commands.h"
#include "client/connect.h"
#include "client/flags.h"
#include "client/json.h"
#include "client/names.h"
#include "client/output.h"
#include "client/prompt_flags.h"

namespace larder::cli {
namespace {

struct PrefetchFlags {
  PromptFlags prompt;
  v1::Tier tier = v1::TIER_UNSPECIFIED;
  absl::Duration wait = absl::ZeroDuration();  // 0: not given
  bool no_wait = false;
};

PrefetchOptions OptionsOf(const Invocation& invocation, const PrefetchFlags& flags) {
  PrefetchOptions options;
  options.tier = flags.tier;
  if (flags.no_wait) {
    options.policy = v1::PREFETCH_POLICY_BEST_EFFORT;
  } else if (flags.wait > absl::ZeroDuration()) {
    options.policy = v1::PREFETCH_POLICY_TIMEOUT;
    options.policy_timeout = flags.wait;
  } else {
    options.deadline = invocation.timeout;
  }
  return options;
}

int RunPrefetch(const Invocation& invocation, const PrefetchFlags& flags) {
  constexpr char kCommand[] = "prefetch";
  absl::StatusOr<Prompt> prompt = OpenPrompt(invocation, flags.prompt);
  if (!prompt.ok()) return Fail(invocation, kCommand, prompt.status());
  Json runs = Json::array();
  absl::StatusOr<PrefetchResult> result = [&] {
    Progress progress("prefetch", prompt->blocks());
    return prompt->client.Prefetch(prompt->model.model_id(), prompt->tokens,
                                   OptionsOf(invocation, flags),
                                   [&](const v1::PrefetchEvent& event) {
                                     progress.Update(event.ready_blocks());
                                     if (!invocation.json) return;
                                     for (const v1::Run& run : event.runs()) {
                                       runs.push_back(ToJson(run));
                                     }
                                   });
  }();
  if (!result.ok()) return Fail(invocation, kCommand, result.status());
  const bool unreadable = result->unreadable_position.has_value();
  if (invocation.json) {
    Json json = {{"asked_blocks", prompt->blocks()},
                 {"ready_blocks", result->ready_blocks},
                 {"promised_blocks", result->promised_blocks},
                 {"unreadable", unreadable},
                 {"runs", std::move(runs)}};
    if (unreadable) json["unreadable_position"] = *result->unreadable_position;
    std::puts(Dump(json).c_str());
  } else {
    std::printf(
        "%s of %s blocks are readable in the tier; %s were promised%s\n",
        FormatCount(result->ready_blocks).c_str(), FormatCount(prompt->blocks()).c_str(),
        FormatCount(result->promised_blocks).c_str(),
        unreadable
            ? absl::StrCat("; block ", *result->unreadable_position, " could not be read").c_str()
            : "");
  }
  return unreadable ? kFailed : kOk;
}

struct EvictFlags {
  v1::Tier tier = v1::TIER_UNSPECIFIED;
  ModelFlags model;
  uint64_t blocks = 0;
};

int RunEvict(const Invocation& invocation, const EvictFlags& flags) {
  constexpr char kCommand[] = "evict";
  absl::StatusOr<Client> client = ConnectTo(invocation);
  if (!client.ok()) return Fail(invocation, kCommand, client.status());
  uint64_t model_id = 0;
  if (flags.model.given()) {
    absl::StatusOr<v1::Model> model = flags.model.Resolve(*client);
    if (!model.ok()) return Fail(invocation, kCommand, model.status());
    model_id = model->model_id();
  }
  absl::StatusOr<v1::EvictResponse> evicted = client->Evict(flags.tier, model_id, flags.blocks);
  if (!evicted.ok()) return Fail(invocation, kCommand, evicted.status());
  if (invocation.json) {
    std::puts(Dump(ToJson(*evicted)).c_str());
  } else {
    std::printf("dropped %s copies; %s are pinned or moving and stay\n",
                FormatCount(evicted->evicted_blocks()).c_str(),
                FormatCount(evicted->kept_blocks()).c_str());
  }
  return kOk;
}

}  // namespace

void RegisterPrefetch(CLI::App& app, Invocation& invocation) {
  CLI::App* const prefetch = app.add_subcommand(
      "prefetch", "Bring a prompt's cached blocks up to a tier; waits up to --timeout");
  const auto flags = std::make_shared<PrefetchFlags>();
  flags->prompt.AddTo(*prefetch);
  AddTier(*prefetch, "--tier", flags->tier, /*nvme=*/false, "gpu or host (default the highest)");
  CLI::Option* const wait =
      AddDuration(*prefetch, "--wait", flags->wait, "Report what is there after this time");
  prefetch->add_flag("--no-wait", flags->no_wait, "Start the moves and report what is there")
      ->excludes(wait);
  prefetch->callback([&invocation, flags] {
    invocation.run = [&invocation, flags] { return RunPrefetch(invocation, *flags); };
  });

  CLI::App* const evict =
      app.add_subcommand("evict", "Drop unpinned copies, the least valuable first");
  const auto evict_flags = std::make_shared<EvictFlags>();
  evict_flags->model.AddTo(*evict);
  AddTier(*evict, "--tier", evict_flags->tier, /*nvme=*/true,
          "gpu, host or nvme (default every tier)");
  AddNumber(*evict, "--blocks", evict_flags->blocks, 0, std::numeric_limits<uint64_t>::max(),
            "At most so many a tier; 0: all that can be (default 0)");
  evict->callback([&invocation, evict_flags] {
    invocation.run = [&invocation, evict_flags] { return RunEvict(invocation, *evict_flags); };
  });
}

}  // namespace larder::cli
