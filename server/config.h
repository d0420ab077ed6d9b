// Config: what larderd is told, by flags and by environment variables.
//
// Every setting has a flag (--gpu-bytes) and a variable (LARDER_GPU_BYTES); the flag wins.
// README.md has the table.
//
// Thread safety: values.
//
// Invariants:
//   1. A Config that ParseCommandLine returns is valid as a whole: sizes are multiples of
//      4 KiB, combinations make sense. Whether the machine can do it is not looked at.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/log.h"

namespace larder {

enum class GpuBackend { kNone, kEmulated, kCuda };

struct Config {
  std::vector<std::string> listen;  // unix:/path, unix-abstract:name or host:port
  bool insecure_tcp = false;        // plaintext TCP beyond loopback
  uint32_t socket_mode = 0660;      // of the unix sockets
  std::string handover_socket;      // path, or '@' and an abstract name; never empty
  GpuBackend gpu = GpuBackend::kNone;
  std::vector<std::string> gpu_devices;  // of kCuda, by rank, as CudaDevice::Open takes them
  uint64_t gpu_bytes = 0;                // of each rank; of kCuda a multiple of 2 MiB
  uint32_t gpu_ranks = 1;
  uint64_t gpu_reserve = 0;  // of each device, left to others at the start
  uint64_t host_bytes = 0;
  bool huge_pages = true;
  uint32_t prefault_threads = 0;  // 0: one a CPU
  std::string nvme_dir;           // empty: no NVME tier
  uint64_t nvme_bytes = 0;
  uint32_t nvme_threads = 4;
  uint64_t nvme_write_limit = 0;      // bytes a second; 0: none
  uint64_t nvme_write_limit_day = 0;  // bytes in any 24 hours; 0: none
  uint32_t copy_threads = 1;
  double low_water = 0.05;  // part of each tier that the cleaner keeps free
  uint32_t models_max = 64;
  uint32_t sessions_max = 4096;
  std::string metrics;  // host:port; empty: none
  absl::Duration drain_timeout = absl::Seconds(10);
  LogLevel log_level = LogLevel::kInfo;
  bool log_json = false;
};

// Either a config, or what to print and the code to exit with: 0 after --help or --version, 2
// after a mistake, whose message names the key, the value and what is allowed.
struct CommandLine {
  std::optional<Config> config;
  int exit_code = 0;
  std::string out;  // for stdout
  std::string err;  // for stderr
};

CommandLine ParseCommandLine(int argc, const char* const* argv);

}  // namespace larder
