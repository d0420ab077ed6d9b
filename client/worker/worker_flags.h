// Worker flags: which model, how it is computed, and with which cache. Those that every subcommand
// of larder-worker has.
//
// Thread safety: none. Objects stay where they are once AddTo was called.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/commands.h"
#include "client/worker/engine.h"
#include "client/worker/transformer.h"

namespace CLI {  // its own header takes longer to compile than all of ours
class App;
}  // namespace CLI

namespace larder::worker {

// --model DIR, or --random-weights CONFIG.json; where it is computed, and how K/V are kept.
class ModelFlags {
 public:
  ModelFlags() = default;
  ModelFlags(const ModelFlags&) = delete;
  ModelFlags& operator=(const ModelFlags&) = delete;

  void AddTo(CLI::App& app);
  // Loads the model for steps of at most `rows_max` tokens. INVALID_ARGUMENT naming the flag for
  // files that are not there or not good.
  absl::StatusOr<std::unique_ptr<Transformer>> Load(uint32_t rows_max) const;
  // Computed as `options` say, except for what flags say: device, cuda_graphs, kv_dtype,
  // block_tokens, threads.
  absl::StatusOr<std::unique_ptr<Transformer>> Load(TransformerOptions options) const;

  bool random_weights() const { return directory_.empty(); }
  // The directory's name, or that of the config's file without its end.
  std::string name() const;

 private:
  absl::StatusOr<Weights> LoadWeights() const;

  std::string directory_;
  std::string random_config_;
  uint64_t weights_seed_ = 1;
  Device device_ = Device::kCpu;
  Dtype kv_dtype_ = Dtype::kBf16;
  bool no_cuda_graphs_ = false;
  uint64_t block_tokens_ = 16;
  uint64_t threads_ = 0;
};

// How requests are batched, and the cache.
class EngineFlags {
 public:
  EngineFlags() = default;
  EngineFlags(const EngineFlags&) = delete;
  EngineFlags& operator=(const EngineFlags&) = delete;

  void AddTo(CLI::App& app);
  // `command` is told to the daemon as the worker's name, and begins notices on stderr.
  EngineOptions Options(std::string_view command) const;
  uint32_t rows_max() const { return static_cast<uint32_t>(chunk_tokens_ + sequences_max_); }

 private:
  uint64_t chunk_tokens_ = 256;
  uint64_t sequences_max_ = 8;
  uint64_t pool_bytes_ = uint64_t{4} << 30;
  std::string cache_address_;
  absl::Duration cache_timeout_ = absl::Seconds(1);
  double restore_patience_ = 0.1;
  absl::Duration flush_;
  bool no_publish_ = false;
};

// What main runs after parsing: as `larder`'s commands (client/commands.h).
struct Command {
  bool json = false;
  std::function<int()> run;  // answers a cli::ExitCode
};

// Says what went wrong on stderr (and, with --json, as {"error": ..} on stdout), and answers the
// exit code for it.
int Fail(const Command& command, std::string_view name, const absl::Status& error);

void RegisterGenerate(CLI::App& app, Command& command);

}  // namespace larder::worker
