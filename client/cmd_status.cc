// larder status, models, sessions: what a daemon holds and who holds it.
#include <cstdio>
#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/client.h"
#include "client/commands.h"
#include "client/connect.h"
#include "client/json.h"
#include "client/names.h"
#include "client/output.h"

namespace larder::cli {
namespace {

// "4 x 64.0 MiB" where there are several: the other figures of that row are each one's.
std::string Each(uint32_t count, uint64_t bytes) {
  return count > 1 ? absl::StrCat(count, " x ", FormatBytes(bytes)) : FormatBytes(bytes);
}

std::string TierTable(const v1::Status& status) {
  Table table(
      {"TIER", "BACKEND", "HEALTH", ">USED", ">OF", ">PINNED", ">BLOCKS", ">HITS", ">EVICTIONS"});
  for (const v1::TierStatus& tier : status.tiers()) {
    table.AddRow({TierName(tier.tier()), tier.backend(), tier.health(),
                  FormatBytes(tier.bytes_used()), Each(tier.ranks(), tier.bytes_total()),
                  FormatBytes(tier.bytes_pinned()), FormatCount(tier.blocks()),
                  FormatCount(tier.hits()), FormatCount(tier.evictions())});
  }
  return table.Render();
}

std::string MoveTable(const v1::Status& status) {
  Table table({"MOVES", ">QUEUED", ">DONE", ">FAILED", ">COPIED", ">RATE"});
  for (const v1::MoveStatus& move : status.moves()) {
    table.AddRow({absl::StrCat(TierName(move.from()), " to ", TierName(move.to())),
                  FormatCount(move.queued()), FormatCount(move.done()), FormatCount(move.failed()),
                  FormatBytes(move.bytes()), FormatRate(move.bytes_per_second())});
  }
  return table.Render();
}

void PrintStatus(const v1::Status& status, const std::string& address) {
  std::printf("larderd %s at %s, boot %s, up %s%s\n\n", status.version().c_str(), address.c_str(),
              FormatId(status.boot_id()).c_str(), FormatAge(status.uptime_seconds()).c_str(),
              status.draining() ? ", DRAINING" : "");
  std::printf("%s\n", TierTable(status).c_str());
  for (const v1::TierStatus& tier : status.tiers()) {
    if (!tier.io().empty())
      std::printf("%s by %s\n\n", TierName(tier.tier()).c_str(), tier.io().c_str());
  }
  std::printf("%s\n", MoveTable(status).c_str());
  Table counts({"NOW", ">", "SINCE START", ">"});
  counts.AddRow({"models", FormatCount(status.models()), "lookups", FormatCount(status.lookups())});
  counts.AddRow({"sessions", FormatCount(status.sessions()), "blocks asked",
                 FormatCount(status.lookup_blocks())});
  counts.AddRow({"sessions lost", FormatCount(status.sessions_lost()), "blocks missed",
                 FormatCount(status.miss_blocks())});
  counts.AddRow(
      {"leases", FormatCount(status.leases()), "blocks hit",
       FormatPercent(status.lookup_blocks() - status.miss_blocks(), status.lookup_blocks())});
  counts.AddRow({"reserved blocks", FormatCount(status.reserved_blocks()), "corrupt blocks",
                 FormatCount(status.corrupt_blocks())});
  counts.AddRow({"moves in flight", FormatCount(status.moves_in_flight()), "orphans collected",
                 FormatCount(status.orphans_collected())});
  std::fputs(counts.Render().c_str(), stdout);
}

int RunStatus(const Invocation& invocation) {
  absl::StatusOr<Client> client = ConnectTo(invocation);
  if (!client.ok()) return Fail(invocation, "status", client.status());
  absl::StatusOr<v1::Status> status = client->GetStatus();
  if (!status.ok()) return Fail(invocation, "status", status.status());
  if (invocation.json) {
    std::puts(Dump(ToJson(*status)).c_str());
  } else {
    PrintStatus(*status, client->address());
  }
  return kOk;
}

std::string Geometry(const v1::ModelSpec& spec) {
  if (spec.mla_latent_dim() != 0) {
    return absl::StrFormat("%d x MLA %d+%d", spec.layers(), spec.mla_latent_dim(),
                           spec.mla_rope_dim());
  }
  return absl::StrFormat("%d x %d x %d", spec.layers(), spec.kv_heads(), spec.head_dim());
}

std::string Use(const v1::ModelStatus& model, v1::Tier tier) {
  for (const v1::ModelStatus::TierUse& use : model.use()) {
    if (use.tier() == tier) return FormatBytes(use.bytes_used());
  }
  return "-";
}

void PrintModels(const v1::ListModelsResponse& models) {
  Table table({"ID", "NAME", "REVISION", "LORA", "GEOMETRY", "DTYPE", ">TOKENS", ">BLOCK",
               ">BLOCKS", ">GPU", ">HOST", ">NVME"});
  for (const v1::ModelStatus& status : models.models()) {
    const v1::Model& model = status.model();
    table.AddRow({FormatId(model.model_id()), model.spec().name(), model.spec().weights_revision(),
                  model.spec().lora(), Geometry(model.spec()), DTypeName(model.spec().dtype()),
                  FormatCount(model.block_tokens()), Each(Shards(model), model.block_bytes()),
                  FormatCount(status.tree_blocks()), Use(status, v1::TIER_GPU),
                  Use(status, v1::TIER_HOST), Use(status, v1::TIER_NVME)});
  }
  std::fputs(table.empty() ? "no model is open\n" : table.Render().c_str(), stdout);
}

int RunModels(const Invocation& invocation) {
  absl::StatusOr<Client> client = ConnectTo(invocation);
  if (!client.ok()) return Fail(invocation, "models", client.status());
  absl::StatusOr<v1::ListModelsResponse> models = client->ListModels();
  if (!models.ok()) return Fail(invocation, "models", models.status());
  if (invocation.json) {
    std::puts(Dump(ToJson(*models)).c_str());
  } else {
    PrintModels(*models);
  }
  return kOk;
}

void PrintSessions(const v1::ListSessionsResponse& sessions, bool leases) {
  Table table({"SESSION", "WORKER", ">PID", "STATE", ">AGE", ">LEASES"});
  Table held({"LEASE", "SESSION", "MODEL", ">END", ">RESERVED", ">DUPLICATES", ">AGE"});
  for (const v1::SessionStatus& session : sessions.sessions()) {
    table.AddRow({FormatId(session.session_id()), session.worker(),
                  session.pid() == 0 ? "-" : absl::StrCat(session.pid()),
                  session.lost() ? "lost" : "live", FormatAge(session.age_seconds()),
                  FormatCount(session.lease_count())});
    for (const v1::LeaseStatus& lease : session.leases()) {
      held.AddRow({FormatId(lease.lease_id()), FormatId(session.session_id()),
                   FormatId(lease.model_id()), FormatCount(lease.end()),
                   FormatCount(lease.reserved_blocks()), FormatCount(lease.duplicate_blocks()),
                   FormatAge(lease.age_seconds())});
    }
  }
  std::fputs(table.empty() ? "no session is open\n" : table.Render().c_str(), stdout);
  if (leases && !held.empty()) std::printf("\n%s", held.Render().c_str());
}

int RunSessions(const Invocation& invocation, bool leases) {
  absl::StatusOr<Client> client = ConnectTo(invocation);
  if (!client.ok()) return Fail(invocation, "sessions", client.status());
  absl::StatusOr<v1::ListSessionsResponse> sessions = client->ListSessions(leases);
  if (!sessions.ok()) return Fail(invocation, "sessions", sessions.status());
  if (invocation.json) {
    std::puts(Dump(ToJson(*sessions)).c_str());
  } else {
    PrintSessions(*sessions, leases);
  }
  return kOk;
}

}  // namespace

void RegisterStatus(CLI::App& app, Invocation& invocation) {
  app.add_subcommand("status", "Tiers, moves, sessions, leases and hit counts of a daemon")
      ->callback(
          [&invocation] { invocation.run = [&invocation] { return RunStatus(invocation); }; });
  app.add_subcommand("models", "Models that are open, and what they use")->callback([&invocation] {
    invocation.run = [&invocation] { return RunModels(invocation); };
  });
  CLI::App* const sessions = app.add_subcommand("sessions", "Workers that are attached");
  const auto leases = std::make_shared<bool>(false);
  sessions->add_flag("--leases", *leases, "List each session's leases too");
  sessions->callback([&invocation, leases] {
    invocation.run = [&invocation, leases] { return RunSessions(invocation, *leases); };
  });
}

}  // namespace larder::cli
