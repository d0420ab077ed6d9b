#include "server/config.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <functional>
#include <set>
#include <string_view>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "proto/larder/v1/handover.h"
#include "server/listen.h"
#include "storage/arena_cuda.h"
#include "storage/units.h"

namespace larder {
namespace {

constexpr std::string_view kListenDefault = "unix:/run/larder/larderd.sock";
constexpr uint64_t kTierBytesMin = uint64_t{1} << 20;
constexpr uint64_t kTierBytesMax = uint64_t{1} << 44;  // what a slot number reaches
constexpr const char* kSizes = "1MiB to 16TiB, such as 512MiB, 8GiB or 1073741824";

constexpr const char* kSeeHelp = "Run larderd --help for all settings.\n";

// Takes the text over into the config; false: not allowed.
using Apply = std::function<bool(Config&, const std::string&)>;

struct Setting {
  const char* flag;
  const char* type;  // empty: a switch
  const char* group;
  const char* standard;  // what holds when nothing is given
  const char* help;
  const char* allowed;
  Apply apply;
  bool repeatable = false;
};

std::string Variable(std::string_view flag) {
  std::string name = "LARDER_";
  for (const char c : flag.substr(2)) name += c == '-' ? '_' : static_cast<char>(toupper(c));
  return name;
}

bool ParseSwitch(const std::string& text, bool& out) {
  return absl::SimpleAtob(text, &out);  // true, false, yes, no, t, f, y, n, 1, 0
}

Apply Switch(bool Config::*field) {
  return
      [field](Config& config, const std::string& text) { return ParseSwitch(text, config.*field); };
}

Apply Text(std::string Config::*field) {
  return [field](Config& config, const std::string& text) {
    config.*field = text;
    return true;
  };
}

Apply Number(uint32_t Config::*field, uint32_t min, uint32_t max) {
  return [=](Config& config, const std::string& text) {
    return absl::SimpleAtoi(text, &(config.*field)) && config.*field >= min && config.*field <= max;
  };
}

Apply TierBytes(uint64_t Config::*field) {
  return [field](Config& config, const std::string& text) {
    const std::optional<uint64_t> bytes = ParseBytes(text);
    if (!bytes || *bytes < kTierBytesMin || *bytes > kTierBytesMax) return false;
    config.*field = *bytes & ~uint64_t{4095};
    return true;
  };
}

Apply WriteLimit(uint64_t Config::*field) {
  return [field](Config& config, const std::string& text) {
    const std::optional<uint64_t> bytes = ParseBytes(text);
    if (!bytes || *bytes < kTierBytesMin) return false;
    config.*field = *bytes;
    return true;
  };
}

bool ApplyMode(Config& config, const std::string& text) {
  if (text.empty() || text.size() > 4 || text.find_first_not_of("01234567") != std::string::npos) {
    return false;
  }
  config.socket_mode = static_cast<uint32_t>(std::stoul(text, nullptr, 8));
  return config.socket_mode <= 0777;
}

bool ApplyGpu(Config& config, const std::string& text) {
  constexpr std::string_view kCuda = "cuda";
  config.gpu_devices.clear();
  if (text == kCuda || absl::StartsWith(text, "cuda:")) {
    config.gpu = GpuBackend::kCuda;
    if (text == kCuda) return true;
    config.gpu_devices = absl::StrSplit(text.substr(kCuda.size() + 1), ',');
    return config.gpu_devices.size() <= wire::kGpuRanksMax &&
           !absl::c_linear_search(config.gpu_devices, "");
  }
  config.gpu = text == "emulated" ? GpuBackend::kEmulated : GpuBackend::kNone;
  return text == "emulated" || text == "none";
}

bool ApplyGpuReserve(Config& config, const std::string& text) {
  const std::optional<uint64_t> bytes = ParseBytes(text);
  config.gpu_reserve = bytes.value_or(0);
  return bytes && *bytes <= kTierBytesMax;
}

bool ApplyLowWater(Config& config, const std::string& text) {
  const std::optional<double> part = ParseFraction(text);
  config.low_water = part.value_or(0);
  return part && *part <= 0.5;
}

bool ApplyMetrics(Config& config, const std::string& text) {
  const absl::StatusOr<ListenAddress> address = ParseListenAddress(text);
  config.metrics = text;
  return address.ok() && address->kind == ListenAddress::Kind::kTcp;
}

bool ApplyDrainTimeout(Config& config, const std::string& text) {
  return absl::ParseDuration(text, &config.drain_timeout) &&
         config.drain_timeout >= absl::ZeroDuration() && config.drain_timeout <= absl::Hours(1);
}

bool ApplyLogLevel(Config& config, const std::string& text) {
  for (const auto& [name, level] :
       {std::pair<std::string_view, LogLevel>{"debug", LogLevel::kDebug},
        {"info", LogLevel::kInfo},
        {"warning", LogLevel::kWarning},
        {"error", LogLevel::kError}}) {
    if (text != name) continue;
    config.log_level = level;
    return true;
  }
  return false;
}

bool ApplyListen(Config& config, const std::string& text) {
  config.listen.push_back(text);
  return ParseListenAddress(text).ok();
}

bool ApplyHandover(Config& config, const std::string& text) {
  config.handover_socket = text;
  return text.size() >= 2 && text.size() <= 107 && (text[0] == '/' || text[0] == '@');
}

const std::vector<Setting>& Settings() {
  constexpr const char* kListen = "Where workers connect";
  constexpr const char* kTiers = "Tiers";
  constexpr const char* kLimits = "Limits";
  constexpr const char* kWatch = "Watching it";
  constexpr const char* kSwitch = "true or false";
  constexpr const char* kLimit = "1MiB or more, such as 200MiB or 2TiB";
  static const std::vector<Setting> kSettings = {
      {"--listen", "ADDRESS", kListen, kListenDefault.data(),
       "Address of the gRPC services; may be repeated (in the variable: commas)",
       "unix:/path (absolute, at most 107 bytes, no %), unix-abstract:name, or host:port with a port of "
       "0 "
       "to 65535",
       ApplyListen, true},
      {"--insecure-tcp", "", kListen, "false", "Allow TCP beyond loopback, in plain text", kSwitch,
       Switch(&Config::insecure_tcp)},
      {"--socket-mode", "MODE", kListen, "0660", "Permissions of the unix sockets",
       "an octal mode up to 0777", ApplyMode},
      {"--handover-socket", "PATH", kListen, "beside the unix socket",
       "Socket that hands the arenas to workers; '@name' for the abstract namespace",
       "an absolute path or @name, at most 107 bytes", ApplyHandover},
      {"--gpu", "KIND", kTiers, "none",
       "GPU tier: none; cuda, in the memory of the first NVIDIA device, or cuda:1, or "
       "cuda:GPU-6c8f2b1e-... (nvidia-smi -L), without which the daemon runs on and says so; or "
       "emulated in shared memory, for tests and demos. Devices of several ranks with commas",
       "none, cuda, cuda:DEVICE,... by number or UUID, or emulated", ApplyGpu},
      {"--gpu-bytes", "SIZE", kTiers, "", "Size of the GPU tier, of each rank", kSizes,
       TierBytes(&Config::gpu_bytes)},
      {"--gpu-ranks", "N", kTiers, "1",
       "GPU memories, each of --gpu-bytes: one a tensor-parallel rank; a model has at most so "
       "many shards, and one of fewer uses the first",
       "1 to 16", Number(&Config::gpu_ranks, 1, wire::kGpuRanksMax)},
      {"--gpu-reserve", "SIZE", kTiers, "4GiB",
       "With cuda: what must be free on each device beyond the tier when the daemon starts, for "
       "the weights and buffers of workers that start later",
       "0 to 16TiB", ApplyGpuReserve},
      {"--host-bytes", "SIZE", kTiers, "1GiB", "Size of the HOST tier, taken at start", kSizes,
       TierBytes(&Config::host_bytes)},
      {"--huge-pages", "BOOL", kTiers, "true", "Try huge pages for the arenas", kSwitch,
       Switch(&Config::huge_pages)},
      {"--prefault-threads", "N", kTiers, "0",
       "Threads that touch the arenas at start; 0: one a CPU", "0 to 256",
       Number(&Config::prefault_threads, 0, 256)},
      {"--nvme-dir", "FOLDER", kTiers, "",
       "Folder of the NVME tier, whose blocks survive a restart; none: no such tier", "a folder",
       Text(&Config::nvme_dir)},
      {"--nvme-bytes", "SIZE", kTiers, "", "Size of the NVME tier, allocated at once", kSizes,
       TierBytes(&Config::nvme_bytes)},
      {"--nvme-threads", "N", kTiers, "4", "Threads for the NVME tier's I/O without io_uring",
       "1 to 64", Number(&Config::nvme_threads, 1, 64)},
      {"--nvme-write-limit", "SIZE", kTiers, "none",
       "Bytes a second written to the NVME tier, to spare the drive; what must leave HOST "
       "meanwhile is forgotten",
       kLimit, WriteLimit(&Config::nvme_write_limit)},
      {"--nvme-write-limit-day", "SIZE", kTiers, "none",
       "Bytes written to the NVME tier in any 24 hours, also before a restart", kLimit,
       WriteLimit(&Config::nvme_write_limit_day)},
      {"--copy-threads", "N", kTiers, "1", "Threads that copy between GPU and HOST", "1 to 64",
       Number(&Config::copy_threads, 1, 64)},
      {"--low-water", "PART", kTiers, "5%",
       "Part of each tier kept free by writing blocks down ahead of need", "0% to 50%, or 0 to 0.5",
       ApplyLowWater},
      {"--models-max", "N", kLimits, "64", "Models that may be open", "1 to 4096",
       Number(&Config::models_max, 1, 4096)},
      {"--sessions-max", "N", kLimits, "4096", "Workers that may be attached", "1 to 65536",
       Number(&Config::sessions_max, 1, 65536)},
      {"--drain-timeout", "TIME", kLimits, "10s",
       "After SIGTERM, how long workers and moves are waited for", "0s to 1h, such as 10s or 500ms",
       ApplyDrainTimeout},
      {"--metrics", "HOST:PORT", kWatch, "off",
       "Serve Prometheus metrics at http://HOST:PORT/metrics",
       "host:port with a port of 0 to 65535", ApplyMetrics},
      {"--log-level", "LEVEL", kWatch, "info", "Least level that is logged, to stderr",
       "debug, info, warning or error", ApplyLogLevel},
      {"--log-json", "", kWatch, "false", "Log JSON lines instead of text", kSwitch,
       Switch(&Config::log_json)},
  };
  return kSettings;
}

CommandLine Mistake(std::string_view key, std::string_view value, std::string_view allowed) {
  CommandLine result;
  result.exit_code = 2;
  result.err = "larderd: " + std::string(key) + ": ";
  if (!value.empty()) result.err += "'" + std::string(value) + "' given; ";
  result.err += std::string(allowed) + "\n" + kSeeHelp;
  return result;
}

std::string KeyOf(const Setting& setting) {
  return std::string(setting.flag) + " (" + Variable(setting.flag) + ")";
}

// The hand-over socket when none is named: beside the first unix socket.
std::string StandardHandover(const std::vector<std::string>& listen) {
  for (const std::string& text : listen) {
    const ListenAddress address = *ParseListenAddress(text);
    if (address.kind == ListenAddress::Kind::kTcp) continue;
    const bool abstract = address.kind == ListenAddress::Kind::kUnixAbstract;
    std::string name = (abstract ? "@" : "") + address.name + ".handover";
    if (name.size() <= 107) return name;
  }
  return "@larderd.handover." + std::to_string(::getpid());
}

// The later of two sockets at one place would take it from the earlier, without an error.
std::optional<CommandLine> CheckSockets(const Config& config) {
  std::set<std::string> names;
  for (const std::string& text : config.listen) {
    const ListenAddress address = *ParseListenAddress(text);
    if (address.kind == ListenAddress::Kind::kTcp) continue;
    const bool abstract = address.kind == ListenAddress::Kind::kUnixAbstract;
    if (!names.insert((abstract ? "@" : "") + address.name).second) {
      return Mistake("--listen (LARDER_LISTEN)", text, "the same socket twice");
    }
  }
  if (names.contains(config.handover_socket)) {
    return Mistake("--handover-socket (LARDER_HANDOVER_SOCKET)", config.handover_socket,
                   "allowed: another socket than those of --listen");
  }
  return std::nullopt;
}

std::optional<CommandLine> CheckGpu(Config& config) {
  constexpr std::string_view kKey = "--gpu-bytes (LARDER_GPU_BYTES)";
  if (config.gpu != GpuBackend::kNone && config.gpu_bytes == 0) {
    return Mistake(kKey, "", "needed with --gpu");
  }
  if (config.gpu == GpuBackend::kNone && config.gpu_bytes != 0) {
    return Mistake(kKey, FormatBytes(config.gpu_bytes), "allowed only with --gpu");
  }
  constexpr std::string_view kRanksKey = "--gpu-ranks (LARDER_GPU_RANKS)";
  if (config.gpu == GpuBackend::kNone && config.gpu_ranks != 1) {
    return Mistake(kRanksKey, std::to_string(config.gpu_ranks), "allowed only with --gpu");
  }
  if (config.gpu != GpuBackend::kCuda) return std::nullopt;
  if (config.gpu_bytes < kCudaArenaGranule) {
    return Mistake(kKey, FormatBytes(config.gpu_bytes), "at least 2MiB with --gpu=cuda");
  }
  config.gpu_bytes -= config.gpu_bytes % kCudaArenaGranule;
  if (config.gpu_devices.empty()) {
    for (uint32_t rank = 0; rank < config.gpu_ranks; ++rank) {
      config.gpu_devices.push_back(std::to_string(rank));
    }
  }
  const auto devices = static_cast<uint32_t>(config.gpu_devices.size());
  if (config.gpu_ranks == 1) config.gpu_ranks = devices;
  if (config.gpu_ranks != devices) {
    return Mistake(kRanksKey, std::to_string(config.gpu_ranks),
                   "as many as --gpu names devices: " + std::to_string(devices));
  }
  return std::nullopt;
}

// What no single setting can tell. nullopt: all is well.
std::optional<CommandLine> CheckTogether(Config& config) {
  for (const std::string& text : config.listen) {
    const ListenAddress address = *ParseListenAddress(text);
    if (address.kind == ListenAddress::Kind::kTcp && !address.loopback && !config.insecure_tcp) {
      return Mistake(
          "--listen (LARDER_LISTEN)", text,
          "TCP is in plain text: allowed on loopback, beyond it only with --insecure-tcp");
    }
  }
  if (std::optional<CommandLine> mistake = CheckGpu(config)) return mistake;
  if (config.nvme_dir.empty() != (config.nvme_bytes == 0)) {
    return config.nvme_dir.empty()
               ? Mistake("--nvme-bytes (LARDER_NVME_BYTES)", FormatBytes(config.nvme_bytes),
                         "allowed only with --nvme-dir")
               : Mistake("--nvme-bytes (LARDER_NVME_BYTES)", "", "needed with --nvme-dir");
  }
  for (const auto& [key, bytes] :
       {std::pair{"--nvme-write-limit (LARDER_NVME_WRITE_LIMIT)", config.nvme_write_limit},
        {"--nvme-write-limit-day (LARDER_NVME_WRITE_LIMIT_DAY)", config.nvme_write_limit_day}}) {
    if (bytes == 0 || !config.nvme_dir.empty()) continue;
    return Mistake(key, FormatBytes(bytes), "allowed only with --nvme-dir");
  }
  if (config.handover_socket.empty()) config.handover_socket = StandardHandover(config.listen);
  return CheckSockets(config);
}

// The given texts in the order of Settings().
using Values = std::vector<std::vector<std::string>>;

void Declare(CLI::App& app, Values& values) {
  values.resize(Settings().size());
  for (size_t i = 0; i < values.size(); ++i) {
    const Setting& setting = Settings()[i];
    CLI::Option* option;
    if (*setting.type == '\0') {
      option = app.add_flag(setting.flag, values[i], setting.help);
    } else {
      option = app.add_option(setting.flag, values[i], setting.help)->type_name(setting.type);
      option->expected(1, setting.repeatable ? 64 : 1);
      if (!setting.repeatable) option->take_last();
      if (*setting.standard != '\0') option->default_str(setting.standard);
    }
    if (setting.repeatable) option->delimiter(',');
    option->envname(Variable(setting.flag))->group(setting.group);
  }
}

// One setting a line and its explanation below, so that nothing wraps.
class Formatter : public CLI::Formatter {
 public:
  std::string make_option(const CLI::Option* option, bool) const override {
    std::string text = "  " + option->get_name(false, true);
    if (option->get_type_size() > 0) text += " " + option->get_type_name();
    if (!option->get_envname().empty()) {
      text.resize(std::max<size_t>(text.size() + 2, 34), ' ');
      text += option->get_envname();
    }
    text += "\n        " + option->get_description();
    if (!option->get_default_str().empty()) text += " [" + option->get_default_str() + "]";
    return text;
  }
  std::string make_group(std::string group, bool is_positional,
                         std::vector<const CLI::Option*> options) const override {
    std::string text = group + ":\n";
    for (const CLI::Option* option : options) {
      text += make_option(option, is_positional) + "\n";
    }
    return text;
  }
};

CommandLine FromCli(CLI::App& app, const CLI::ParseError& error) {
  std::ostringstream out;
  std::ostringstream err;
  CommandLine result;
  result.exit_code = app.exit(error, out, err) == 0 ? 0 : 2;
  result.out = out.str();
  if (!err.str().empty()) result.err = "larderd: " + err.str();
  return result;
}

}  // namespace

CommandLine ParseCommandLine(int argc, const char* const* argv) {
  CLI::App app(
      "larderd keeps the K/V blocks of language models in GPU memory, host memory and NVMe, and\n"
      "hands them by reference to the inference workers of this machine.\n\n"
      "Every setting is a flag or an environment variable; the flag wins.",
      "larderd");
  app.formatter(std::make_shared<Formatter>());
  app.set_version_flag("--version", "larderd " LARDER_VERSION, "Print the version and exit");
  app.failure_message([](const CLI::App*, const CLI::Error& error) {
    return std::string(error.what()) + "\n" + kSeeHelp;
  });
  app.set_help_flag("--help", "Print this help and exit");
  app.footer(
      "Example:\n  larderd --gpu=emulated --gpu-bytes=64MiB --host-bytes=256MiB "
      "--nvme-dir=/var/lib/larder --nvme-bytes=1GiB\n");
  Values values;
  Declare(app, values);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return FromCli(app, error);
  }
  Config config;
  config.host_bytes = uint64_t{1} << 30;
  config.gpu_reserve = uint64_t{4} << 30;
  for (size_t i = 0; i < values.size(); ++i) {
    const Setting& setting = Settings()[i];
    for (const std::string& value : values[i]) {
      if (!setting.apply(config, value)) {
        return Mistake(KeyOf(setting), value, std::string("allowed: ") + setting.allowed);
      }
    }
  }
  if (config.listen.empty()) config.listen.emplace_back(kListenDefault);
  if (std::optional<CommandLine> mistake = CheckTogether(config)) return *std::move(mistake);
  CommandLine result;
  result.config = std::move(config);
  return result;
}

}  // namespace larder
