// larder get: the bytes of a prompt's cached blocks.
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "client/commands.h"
#include "client/fill.h"
#include "client/flags.h"
#include "client/json.h"
#include "client/output.h"
#include "client/prompt_flags.h"

namespace larder::cli {
namespace {

constexpr char kCommand[] = "get";

struct GetFlags {
  PromptFlags prompt;
  std::string output = "-";
  uint64_t position = 0;
  uint64_t count = 0;
  bool verify = false;
};

struct FileCloser {
  void operator()(std::FILE* file) const {
    if (file != stdout) std::fclose(file);
  }
};
using File = std::unique_ptr<std::FILE, FileCloser>;

absl::StatusOr<File> OpenOutput(const std::string& path) {
  if (path == "-") return File(stdout);
  std::FILE* const file = std::fopen(path.c_str(), "wb");
  if (file != nullptr) return File(file);
  return absl::InvalidArgumentError(
      absl::StrCat("--output: \"", path, "\": ", std::strerror(errno)));
}

// Takes chunks in order, writes them, and checks whole blocks against what --fill puts.
class Sink {
 public:
  Sink(std::FILE* file, std::vector<uint64_t> seeds, const v1::Model& model, uint32_t position)
      : file_(file),
        seeds_(std::move(seeds)),
        part_bytes_(model.block_bytes()),
        shards_(Shards(model)),
        block_bytes_(WholeBlockBytes(model)),
        position_(position) {}

  absl::Status Take(const v1::DownloadChunk& chunk) {
    if (chunk.position() != position_ || chunk.offset() != block_.size() ||
        block_.size() + chunk.data().size() > block_bytes_) {
      return absl::InternalError(
          absl::StrCat("the daemon sent ", chunk.data().size(), " bytes at offset ", chunk.offset(),
                       " of block ", chunk.position(), "; expected offset ", block_.size(),
                       " of block ", position_, ", blocks of ", block_bytes_));
    }
    block_ += chunk.data();
    return block_.size() < block_bytes_ ? absl::OkStatus() : FinishBlock();
  }

  absl::Status Finish() const {
    if (std::fflush(file_) != 0) return WriteError();
    if (block_.empty()) return absl::OkStatus();
    return absl::InternalError(absl::StrCat("the daemon ended inside of block ", position_));
  }

  uint32_t blocks() const { return blocks_; }
  uint64_t bytes_wrong() const { return bytes_wrong_; }

 private:
  absl::Status FinishBlock() {
    const auto block = std::as_bytes(std::span(block_.data(), block_.size()));
    for (uint32_t rank = 0; rank < shards_ && !seeds_.empty(); ++rank) {
      bytes_wrong_ += WrongBytes(PartSeed(seeds_[position_], rank),
                                 block.subspan(rank * part_bytes_, part_bytes_));
    }
    if (std::fwrite(block_.data(), 1, block_.size(), file_) != block_.size()) return WriteError();
    block_.clear();
    ++position_;
    ++blocks_;
    return absl::OkStatus();
  }

  static absl::Status WriteError() {
    return absl::InternalError(absl::StrCat("--output: cannot write: ", std::strerror(errno)));
  }

  std::FILE* const file_;
  const std::vector<uint64_t> seeds_;  // empty: not checked
  const uint64_t part_bytes_;
  const uint32_t shards_;
  const uint64_t block_bytes_;  // of all parts
  std::string block_;
  uint32_t position_;
  uint32_t blocks_ = 0;
  uint64_t bytes_wrong_ = 0;
};

void Report(const Invocation& invocation, const GetFlags& flags, const Sink& sink, uint64_t wanted,
            uint64_t block_bytes) {
  if (invocation.json && flags.output != "-") {
    Json json = {{"position", flags.position},
                 {"wanted", wanted},
                 {"blocks", sink.blocks()},
                 {"block_bytes", block_bytes},
                 {"bytes", sink.blocks() * block_bytes}};
    if (flags.verify) json["bytes_wrong"] = sink.bytes_wrong();
    std::puts(Dump(json).c_str());
    return;
  }
  std::fprintf(stderr, "got %s of %s blocks (%s)%s\n", FormatCount(sink.blocks()).c_str(),
               FormatCount(wanted).c_str(), FormatBytes(sink.blocks() * block_bytes).c_str(),
               flags.verify ? absl::StrCat(", ", sink.bytes_wrong(), " bytes wrong").c_str() : "");
}

absl::Status CheckRange(const GetFlags& flags, const Prompt& prompt) {
  if (flags.position < prompt.blocks()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("--position: \"", flags.position,
                                                 "\" must be less than the prompt's ",
                                                 prompt.blocks(), " blocks"));
}

int RunGet(const Invocation& invocation, const GetFlags& flags) {
  if (flags.output == "-" && isatty(STDOUT_FILENO) == 1) {
    return Fail(invocation, kCommand,
                absl::InvalidArgumentError("--output: \"-\" is a terminal; name a file"));
  }
  absl::StatusOr<Prompt> prompt = OpenPrompt(invocation, flags.prompt);
  if (!prompt.ok()) return Fail(invocation, kCommand, prompt.status());
  const v1::Model& model = prompt->model;
  if (absl::Status range = CheckRange(flags, *prompt); !range.ok()) {
    return Fail(invocation, kCommand, range);
  }
  absl::StatusOr<File> file = OpenOutput(flags.output);
  if (!file.ok()) return Fail(invocation, kCommand, file.status());

  const uint64_t after = prompt->blocks() - flags.position;
  const uint64_t wanted = flags.count == 0 ? after : std::min(flags.count, after);
  std::vector<uint64_t> seeds;
  if (flags.verify) seeds = BlockSeeds(model.model_id(), prompt->tokens, model.block_tokens());
  Sink sink(file->get(), std::move(seeds), model, static_cast<uint32_t>(flags.position));
  absl::Status got;
  {
    Progress progress("get", wanted);
    got = prompt->client.Download(
        model.model_id(), prompt->tokens, static_cast<uint32_t>(flags.position),
        static_cast<uint32_t>(wanted), invocation.timeout, [&](const v1::DownloadChunk& chunk) {
          progress.Update(sink.blocks());
          return sink.Take(chunk);
        });
  }
  if (got.ok()) got = sink.Finish();
  if (!got.ok()) return Fail(invocation, kCommand, got);
  Report(invocation, flags, sink, wanted, WholeBlockBytes(model));
  return sink.blocks() == wanted && sink.bytes_wrong() == 0 ? kOk : kFailed;
}

}  // namespace

void RegisterGet(CLI::App& app, Invocation& invocation) {
  CLI::App* const get = app.add_subcommand(
      kCommand, "Write the bytes of a prompt's cached blocks; exits 1 unless all are cached");
  const auto flags = std::make_shared<GetFlags>();
  flags->prompt.AddTo(*get);
  get->add_option("--output", flags->output, "Where to; - is stdout (default -)")
      ->type_name("FILE");
  AddNumber(*get, "--position", flags->position, 0, kTokensMax, "First block (default 0)");
  AddNumber(*get, "--count", flags->count, 0, kTokensMax, "At most so many blocks; 0: all");
  get->add_flag("--verify", flags->verify, "Check that the bytes are those of put --fill");
  get->callback([&invocation, flags] {
    invocation.run = [&invocation, flags] { return RunGet(invocation, *flags); };
  });
}

}  // namespace larder::cli
