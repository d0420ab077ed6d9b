// larder put: publishes K/V bytes for a prompt.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/fill.h"
#include "client/json.h"
#include "client/output.h"
#include "client/prompt_flags.h"
#include "client/read_file.h"

namespace larder::cli {
namespace {

constexpr char kCommand[] = "put";
// Blocks of one call: bytes of an inline message, and what is reserved at a time.
constexpr uint64_t kInlineBytesMax = 16 << 20;
constexpr uint32_t kReserveBlocksMax = 1024;

struct PutFlags {
  PromptFlags prompt;
  std::string data;  // a file, or "-"
  bool fill = false;
  bool inline_bytes = false;
  bool flush = false;
};

// Where the bytes of block `position` come from: what was read, or derived.
class Source {
 public:
  static absl::StatusOr<Source> Open(const PutFlags& flags, const Prompt& prompt) {
    Source source;
    source.part_bytes_ = prompt.model.block_bytes();
    source.shards_ = Shards(prompt.model);
    if (flags.fill) {
      source.seeds_ =
          BlockSeeds(prompt.model.model_id(), prompt.tokens, prompt.model.block_tokens());
      return source;
    }
    const uint64_t expected = prompt.blocks() * WholeBlockBytes(prompt.model);
    absl::StatusOr<std::string> data = ReadFile("--data", flags.data, expected);
    if (!data.ok()) return data.status();
    if (data->size() != expected) {
      return absl::InvalidArgumentError(
          absl::StrCat("--data: \"", flags.data, "\" has ", data->size(), " bytes, must have ",
                       expected, ": ", prompt.blocks(), " blocks of ", WholeBlockBytes(prompt.model)));
    }
    source.data_ = *std::move(data);
    return source;
  }

  void Write(uint32_t position, uint32_t rank, std::span<std::byte> part) const {
    if (!seeds_.empty()) return FillBlock(PartSeed(seeds_[position], rank), part);
    const uint64_t parts_before = uint64_t{position} * shards_ + rank;
    std::memcpy(part.data(), data_.data() + parts_before * part_bytes_, part.size());
  }

 private:
  uint64_t part_bytes_ = 0;
  uint32_t shards_ = 1;
  std::string data_;
  std::vector<uint64_t> seeds_;
};

std::span<const uint32_t> TokensOf(const Prompt& prompt, uint32_t position, uint32_t blocks) {
  return std::span(prompt.tokens)
      .subspan(size_t{position} * prompt.model.block_tokens(),
               size_t{blocks} * prompt.model.block_tokens());
}

// At most `count_max` blocks, at the lease's end.
absl::StatusOr<v1::LeaseState> PutInPlace(Lease& lease, const Prompt& prompt, const Source& source,
                                          uint32_t count_max) {
  absl::StatusOr<uint32_t> count = lease.ReserveUpTo(count_max);
  if (!count.ok()) return count.status();
  for (uint32_t i = 0; i < *count * lease.shards(); ++i) {
    const uint32_t position = lease.end() + i / lease.shards();
    const uint32_t rank = i % lease.shards();
    absl::StatusOr<std::span<std::byte>> part = lease.Reserved(position, rank);
    if (!part.ok()) return part.status();
    source.Write(position, rank, *part);
  }
  return lease.Put(TokensOf(prompt, lease.end(), *count));
}

absl::StatusOr<v1::LeaseState> PutOverWire(Lease& lease, const Prompt& prompt, const Source& source,
                                           uint32_t count) {
  const uint64_t part_bytes = lease.block_bytes();
  std::vector<std::byte> data(count * WholeBlockBytes(prompt.model));
  for (uint32_t i = 0; i < count * lease.shards(); ++i) {
    source.Write(lease.end() + i / lease.shards(), i % lease.shards(),
                 std::span(data).subspan(i * part_bytes, part_bytes));
  }
  return lease.PutInline(TokensOf(prompt, lease.end(), count), data);
}

struct Outcome {
  uint32_t blocks = 0;
  uint32_t cached_before = 0;
  uint32_t durable = 0;
};

absl::StatusOr<Outcome> PutMissing(const Invocation& invocation, const PutFlags& flags,
                                   const Prompt& prompt, const Source& source) {
  SessionOptions options;
  options.map_arenas = !flags.inline_bytes;
  absl::StatusOr<Session> session =
      prompt.client.NewSession(absl::StrCat("larder put, pid ", getpid()), options);
  if (!session.ok()) return session.status();
  absl::StatusOr<Lease> lease = session->Lookup(prompt.model, prompt.tokens);
  if (!lease.ok()) return lease.status();
  // What the CPU cannot write goes over the wire, to HOST.
  const bool over_wire = flags.inline_bytes || session->HasDeviceArenas();
  Outcome outcome = {prompt.blocks(), lease->end(), 0};
  const uint64_t inline_blocks =
      std::max<uint64_t>(1, kInlineBytesMax / std::max<uint64_t>(1, WholeBlockBytes(prompt.model)));
  const uint32_t step = over_wire ? static_cast<uint32_t>(inline_blocks) : kReserveBlocksMax;
  Progress progress("put", outcome.blocks);
  while (lease->end() < outcome.blocks) {
    const uint32_t count_max = std::min(step, outcome.blocks - lease->end());
    absl::StatusOr<v1::LeaseState> put = over_wire ? PutOverWire(*lease, prompt, source, count_max)
                                                   : PutInPlace(*lease, prompt, source, count_max);
    if (!put.ok()) return put.status();
    outcome.durable = put->durable_blocks();
    progress.Update(lease->end());
  }
  if (flags.flush) {
    absl::StatusOr<v1::LeaseState> flushed = lease->Flush(invocation.timeout);
    if (!flushed.ok()) return flushed.status();
    outcome.durable = flushed->durable_blocks();
  }
  if (absl::Status released = lease->Release(); !released.ok()) return released;
  return outcome;
}

int RunPut(const Invocation& invocation, const PutFlags& flags) {
  absl::StatusOr<Prompt> prompt = OpenPrompt(invocation, flags.prompt);
  if (!prompt.ok()) return Fail(invocation, kCommand, prompt.status());
  if (prompt->tokens.size() % prompt->model.block_tokens() != 0) {
    return Fail(invocation, kCommand,
                absl::InvalidArgumentError(absl::StrCat("the prompt has ", prompt->tokens.size(),
                                                        " tokens, must be whole blocks of ",
                                                        prompt->model.block_tokens())));
  }
  absl::StatusOr<Source> source = Source::Open(flags, *prompt);
  if (!source.ok()) return Fail(invocation, kCommand, source.status());
  absl::StatusOr<Outcome> outcome = PutMissing(invocation, flags, *prompt, *source);
  if (!outcome.ok()) return Fail(invocation, kCommand, outcome.status());
  const uint32_t put = outcome->blocks - outcome->cached_before;
  if (invocation.json) {
    std::puts(Dump({{"model_id", FormatId(prompt->model.model_id())},
                    {"block_bytes", WholeBlockBytes(prompt->model)},
                    {"shards", Shards(prompt->model)},
                    {"blocks", outcome->blocks},
                    {"cached_before", outcome->cached_before},
                    {"put", put},
                    {"durable", outcome->durable}})
                  .c_str());
  } else {
    std::printf("put %s of %s blocks (%s); %s were cached already; %s are durable\n",
                FormatCount(put).c_str(), FormatCount(outcome->blocks).c_str(),
                FormatBytes(put * WholeBlockBytes(prompt->model)).c_str(),
                FormatCount(outcome->cached_before).c_str(), FormatCount(outcome->durable).c_str());
  }
  return kOk;
}

}  // namespace

void RegisterPut(CLI::App& app, Invocation& invocation) {
  CLI::App* const put = app.add_subcommand(
      kCommand, "Publish the K/V bytes of a prompt; blocks that are cached stay as they are");
  const auto flags = std::make_shared<PutFlags>();
  flags->prompt.AddTo(*put);
  CLI::Option_group* const source = put->add_option_group("Bytes", "Exactly one of");
  source->add_option("--data", flags->data, "File of all blocks' bytes in order, of each block its shards' parts in "
                     "order; - is stdin")
      ->type_name("FILE");
  source->add_flag("--fill", flags->fill,
                   "Derive them from model and tokens (get --verify checks those)");
  source->require_option(1);
  put->add_flag("--inline", flags->inline_bytes,
                "Send the bytes over the wire instead of writing them in place");
  put->add_flag("--flush", flags->flush, "Wait until all blocks survive a restart");
  put->callback([&invocation, flags] {
    invocation.run = [&invocation, flags] { return RunPut(invocation, *flags); };
  });
}

}  // namespace larder::cli
