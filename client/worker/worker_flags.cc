#include "client/worker/worker_flags.h"

#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "client/flags.h"
#include "client/json.h"
#include "client/worker/model_config.h"
#include "client/worker/weights.h"

namespace larder::worker {
namespace {

constexpr uint64_t kRowsMax = 65'536;  // of one step

// The flag that named the file belongs into the message, and a bad file is a bad value.
absl::Status OfFlag(std::string_view flag, std::string_view value, const absl::Status& error) {
  return absl::InvalidArgumentError(
      absl::StrCat(absl::string_view(flag.data(), flag.size()), ": \"",
                   absl::string_view(value.data(), value.size()), "\": ", error.message()));
}

void AddKvDtype(CLI::App& app, Dtype& value) {
  app.add_option_function<std::string>(
         "--kv-dtype",
         [&value](const std::string& text) {
           for (const Dtype dtype :
                {Dtype::kBf16, Dtype::kF16, Dtype::kF32, Dtype::kF8E4M3, Dtype::kI8}) {
             if (text != DtypeName(dtype)) continue;
             value = dtype;
             return;
           }
           throw CLI::ValidationError("--kv-dtype",
                                      "\"" + text + "\" must be one of bf16, f16, f32, f8_e4m3, i8");
         },
         "What K/V are kept as: bf16, f16, f32, f8_e4m3 or i8; f32 on the CPU only (default bf16)")
      ->type_name("TYPE");
}

void AddDevice(CLI::App& app, Device& value) {
  app.add_option_function<std::string>(
         "--device",
         [&value](const std::string& text) {
           if (text != "cpu" && text != "cuda") {
             throw CLI::ValidationError("--device", "\"" + text + "\" must be one of cpu, cuda");
           }
           value = text == "cuda" ? Device::kCuda : Device::kCpu;
         },
         "What computes: cpu, or cuda, the first GPU that CUDA_VISIBLE_DEVICES leaves (default "
         "cpu)")
      ->type_name("NAME");
}

}  // namespace

void ModelFlags::AddTo(CLI::App& app) {
  CLI::Option_group* const source = app.add_option_group("Model", "Exactly one of");
  source
      ->add_option(
          "--model", directory_,
          "Directory with config.json and safetensors, one file or several (Llama or Qwen2)")
      ->type_name("DIR");
  source
      ->add_option("--random-weights", random_config_,
                   "A config.json; weights are drawn from --weights-seed")
      ->type_name("FILE");
  source->require_option(1);
  cli::AddNumber(app, "--weights-seed", weights_seed_, 0, ~uint64_t{0},
                 "Seed of random weights (default 1)");
  AddDevice(app, device_);
  app.add_flag("--no-cuda-graphs", no_cuda_graphs_,
               "With --device cuda: launch the kernels of a decode step one by one");
  AddKvDtype(app, kv_dtype_);
  cli::AddNumber(app, "--block-tokens", block_tokens_, 1, 1'024,
                 "Tokens in a block of K/V (default 16)");
  cli::AddNumber(app, "--threads", threads_, 0, 1'024,
                 "Threads that compute; 0: one for each CPU of this process (default 0)");
}

absl::StatusOr<Weights> ModelFlags::LoadWeights() const {
  if (!directory_.empty()) {
    absl::StatusOr<Weights> weights = Weights::Load(directory_);
    if (!weights.ok()) return OfFlag("--model", directory_, weights.status());
    return weights;
  }
  const absl::StatusOr<ModelConfig> config = ReadModelConfig(random_config_);
  if (!config.ok()) return OfFlag("--random-weights", random_config_, config.status());
  return Weights::Random(*config, weights_seed_);
}

absl::StatusOr<std::unique_ptr<Transformer>> ModelFlags::Load(uint32_t rows_max) const {
  TransformerOptions options;
  options.rows_max = rows_max;
  return Load(options);
}

absl::StatusOr<std::unique_ptr<Transformer>> ModelFlags::Load(TransformerOptions options) const {
  absl::StatusOr<Weights> weights = LoadWeights();
  if (!weights.ok()) return weights.status();
  options.device = device_;
  options.kv_dtype = kv_dtype_;
  options.cuda_graphs = !no_cuda_graphs_;
  options.block_tokens = static_cast<uint32_t>(block_tokens_);
  options.threads = static_cast<uint32_t>(threads_);
  return Transformer::Create(*std::move(weights), options);
}

std::string ModelFlags::name() const {
  const std::filesystem::path path(random_weights() ? random_config_ : directory_);
  // A trailing slash is no name.
  return (path.has_filename() ? path : path.parent_path()).stem().string();
}

void EngineFlags::AddTo(CLI::App& app) {
  constexpr char kBatch[] = "Batching";
  cli::AddNumber(app, "--chunk-tokens", chunk_tokens_, 1, kRowsMax,
                 "Prompt tokens computed in one step (default 256)")
      ->group(kBatch);
  cli::AddNumber(app, "--max-batch", sequences_max_, 1, kRowsMax,
                 "Samples computed at a time (default 8)")
      ->group(kBatch);
  cli::AddBytes(app, "--pool-bytes", pool_bytes_, 1,
                "Own K/V memory, taken as it is used, or at once on a GPU (default 4GiB)")
      ->group(kBatch);
  constexpr char kCache[] = "Cache";
  app.add_option("--cache", cache_address_,
                 "unix:PATH or HOST:PORT of a larderd on this machine (default: no cache)")
      ->type_name("ADDRESS")
      ->group(kCache);
  cli::AddDuration(app, "--cache-timeout", cache_timeout_,
                   "What one call to the daemon may take (default 1s)")
      ->group(kCache);
  cli::AddReal(
      app, "--restore-patience", restore_patience_, 0, 1'000'000,
      "How much longer than computing a restore from NVMe may take, as a part of computing "
      "(default 0.1)")
      ->group(kCache);
  cli::AddDuration(app, "--flush", flush_,
                   "Before a sample ends, wait until what it published survives a restart, at most "
                   "this long (default: do not wait)")
      ->group(kCache);
  app.add_flag("--no-publish", no_publish_, "Only read from the cache")->group(kCache);
}

EngineOptions EngineFlags::Options(std::string_view command) const {
  const std::string name =
      absl::StrCat("larder-worker ", absl::string_view(command.data(), command.size()));
  EngineOptions options;
  options.chunk_tokens = static_cast<uint32_t>(chunk_tokens_);
  options.sequences_max = static_cast<uint32_t>(sequences_max_);
  options.pool_bytes = pool_bytes_;
  options.on_notice = [name](std::string_view text) {
    std::fprintf(stderr, "%s: %.*s\n", name.c_str(), static_cast<int>(text.size()), text.data());
  };
  if (!cache_address_.empty()) {
    CacheOptions& cache = options.cache.emplace();
    cache.address = cache_address_;
    cache.timeout = cache_timeout_;
    cache.publish = !no_publish_;
    cache.flush = flush_;
    cache.restore_patience = restore_patience_;
    cache.worker = absl::StrCat(name, ", pid ", getpid());
  }
  return options;
}

int Fail(const Command& command, std::string_view name, const absl::Status& error) {
  const std::string code = absl::StatusCodeToString(error.code());
  const std::string message(error.message());
  std::fprintf(stderr, "larder-worker %.*s: %s: %s\n", static_cast<int>(name.size()), name.data(),
               code.c_str(), message.c_str());
  if (command.json) {
    std::puts(cli::Dump({{"error", {{"code", code}, {"message", message}}}}).c_str());
  }
  return absl::IsInvalidArgument(error) ? cli::kUsage : cli::kFailed;
}

}  // namespace larder::worker
