#include "server/config.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <string>
#include <vector>

namespace larder {
namespace {

// Sets environment variables and takes them back.
class Environment {
 public:
  explicit Environment(std::vector<std::pair<std::string, std::string>> variables) {
    for (const auto& [name, value] : variables) {
      names_.push_back(name);
      ::setenv(name.c_str(), value.c_str(), 1);
    }
  }
  ~Environment() {
    for (const std::string& name : names_) ::unsetenv(name.c_str());
  }

 private:
  std::vector<std::string> names_;
};

CommandLine Parse(std::vector<std::string> flags) {
  std::vector<const char*> argv = {"larderd"};
  for (const std::string& flag : flags) argv.push_back(flag.c_str());
  return ParseCommandLine(static_cast<int>(argv.size()), argv.data());
}

void ExpectMistake(const std::vector<std::string>& flags, const std::vector<std::string>& parts) {
  const CommandLine result = Parse(flags);
  EXPECT_FALSE(result.config.has_value()) << flags[0];
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_EQ(result.out, "");
  for (const std::string& part : parts) {
    EXPECT_NE(result.err.find(part), std::string::npos) << part << " not in: " << result.err;
  }
}

TEST(Config, Standards) {
  const CommandLine result = Parse({});
  ASSERT_TRUE(result.config.has_value()) << result.err;
  const Config& config = *result.config;
  EXPECT_EQ(config.listen, std::vector<std::string>{"unix:/run/larder/larderd.sock"});
  EXPECT_EQ(config.handover_socket, "/run/larder/larderd.sock.handover");
  EXPECT_EQ(config.socket_mode, 0660u);
  EXPECT_EQ(config.gpu, GpuBackend::kNone);
  EXPECT_EQ(config.gpu_ranks, 1u);
  EXPECT_EQ(config.host_bytes, uint64_t{1} << 30);
  EXPECT_EQ(config.nvme_dir, "");
  EXPECT_EQ(config.metrics, "");
  EXPECT_EQ(config.drain_timeout, absl::Seconds(10));
}

TEST(Config, Flags) {
  const CommandLine result = Parse({"--listen=unix:/tmp/a.sock",
                                    "--listen",
                                    "127.0.0.1:0",
                                    "--socket-mode=600",
                                    "--gpu=emulated",
                                    "--gpu-bytes=64MiB",
                                    "--gpu-ranks=4",
                                    "--host-bytes=1048577",
                                    "--nvme-dir=/data",
                                    "--nvme-bytes=2GiB",
                                    "--nvme-write-limit=200MiB",
                                    "--nvme-write-limit-day=2TiB",
                                    "--low-water=10%",
                                    "--metrics=127.0.0.1:9600",
                                    "--drain-timeout=1m30s",
                                    "--log-level=debug",
                                    "--log-json",
                                    "--prefault-threads=3",
                                    "--models-max=7",
                                    "--huge-pages=false"});
  ASSERT_TRUE(result.config.has_value()) << result.err;
  const Config& config = *result.config;
  EXPECT_EQ(config.listen, (std::vector<std::string>{"unix:/tmp/a.sock", "127.0.0.1:0"}));
  EXPECT_EQ(config.handover_socket, "/tmp/a.sock.handover");
  EXPECT_EQ(config.socket_mode, 0600u);
  EXPECT_EQ(config.gpu, GpuBackend::kEmulated);
  EXPECT_EQ(config.gpu_bytes, uint64_t{64} << 20);
  EXPECT_EQ(config.gpu_ranks, 4u);
  EXPECT_EQ(config.host_bytes, uint64_t{1} << 20) << "rounded down to 4 KiB";
  EXPECT_EQ(config.nvme_bytes, uint64_t{2} << 30);
  EXPECT_EQ(config.nvme_write_limit, uint64_t{200} << 20);
  EXPECT_EQ(config.nvme_write_limit_day, uint64_t{2} << 40);
  EXPECT_DOUBLE_EQ(config.low_water, 0.1);
  EXPECT_EQ(config.metrics, "127.0.0.1:9600");
  EXPECT_EQ(config.drain_timeout, absl::Seconds(90));
  EXPECT_EQ(config.log_level, LogLevel::kDebug);
  EXPECT_TRUE(config.log_json);
  EXPECT_EQ(config.prefault_threads, 3u);
  EXPECT_EQ(config.models_max, 7u);
  EXPECT_FALSE(config.huge_pages);
}

TEST(Config, EnvironmentAndFlagWins) {
  const Environment environment({{"LARDER_HOST_BYTES", "2GiB"},
                                 {"LARDER_LISTEN", "unix:/tmp/b.sock,[::1]:0"},
                                 {"LARDER_LOG_JSON", "true"},
                                 {"LARDER_LOG_LEVEL", "error"}});
  const CommandLine result = Parse({"--log-level=warning"});
  ASSERT_TRUE(result.config.has_value()) << result.err;
  EXPECT_EQ(result.config->host_bytes, uint64_t{2} << 30);
  EXPECT_EQ(result.config->listen, (std::vector<std::string>{"unix:/tmp/b.sock", "[::1]:0"}));
  EXPECT_TRUE(result.config->log_json);
  EXPECT_EQ(result.config->log_level, LogLevel::kWarning);
}

TEST(Config, BadValuesNameKeyValueAndWhatIsAllowed) {
  ExpectMistake({"--host-bytes=8GB"},
                {"--host-bytes", "LARDER_HOST_BYTES", "'8GB'", "1MiB to 16TiB"});
  ExpectMistake({"--host-bytes=4095"}, {"'4095'", "1MiB to 16TiB"});
  ExpectMistake({"--host-bytes=17TiB"}, {"'17TiB'"});
  ExpectMistake({"--nvme-write-limit=200MB"}, {"--nvme-write-limit", "'200MB'", "1MiB or more"});
  ExpectMistake({"--nvme-write-limit-day=4096"}, {"LARDER_NVME_WRITE_LIMIT_DAY", "'4096'"});
  ExpectMistake({"--gpu=cuda:"}, {"--gpu", "'cuda:'", "cuda:DEVICE"});
  ExpectMistake({"--gpu=cuda:0,,1"}, {"--gpu", "'cuda:0,,1'", "or emulated"});
  ExpectMistake({"--gpu=vulkan"}, {"--gpu", "'vulkan'", "none, cuda"});
  ExpectMistake({"--gpu-reserve=lots"}, {"--gpu-reserve", "'lots'", "0 to 16TiB"});
  ExpectMistake({"--socket-mode=0888"}, {"'0888'", "octal"});
  ExpectMistake({"--socket-mode=1777"}, {"'1777'"});
  ExpectMistake({"--listen=unix:relative"}, {"'unix:relative'", "unix:/path"});
  ExpectMistake({"--listen=localhost"}, {"'localhost'", "host:port"});
  ExpectMistake({"--listen=localhost:70000"}, {"'localhost:70000'", "host:port"});
  ExpectMistake({"--listen=unix:/" + std::string(120, 'x')}, {"unix:/xxx"});
  ExpectMistake({"--low-water=60%"}, {"'60%'", "0% to 50%"});
  ExpectMistake({"--drain-timeout=10"}, {"'10'", "0s to 1h"});
  ExpectMistake({"--drain-timeout=-1s"}, {"'-1s'"});
  ExpectMistake({"--metrics=9600"}, {"'9600'", "host:port"});
  ExpectMistake({"--log-level=loud"}, {"'loud'", "debug, info, warning or error"});
  ExpectMistake({"--models-max=0"}, {"'0'", "1 to 4096"});
  ExpectMistake({"--prefault-threads=-1"}, {"'-1'", "0 to 256"});
  ExpectMistake({"--huge-pages=maybe"}, {"'maybe'", "true or false"});
  ExpectMistake({"--handover-socket=here"}, {"'here'", "absolute path or @name"});
}

TEST(Config, BadVariablesToo) {
  const Environment environment(
      {std::pair<std::string, std::string>("LARDER_LOG_JSON", "perhaps")});
  ExpectMistake({}, {"LARDER_LOG_JSON", "'perhaps'", "true or false"});
}

TEST(Config, SettingsMustFitTogether) {
  ExpectMistake({"--gpu=emulated"}, {"--gpu-bytes", "needed with --gpu"});
  ExpectMistake({"--gpu-bytes=64MiB"}, {"'64 MiB'", "allowed only with --gpu"});
  ExpectMistake({"--gpu-ranks=2"}, {"--gpu-ranks", "'2'", "allowed only with --gpu"});
  for (const char* ranks : {"0", "17", "two"}) {
    ExpectMistake({"--gpu=emulated", "--gpu-bytes=64MiB", std::string("--gpu-ranks=") + ranks},
                  {"--gpu-ranks (LARDER_GPU_RANKS)", ranks, "1 to 16"});
  }
  ExpectMistake({"--nvme-dir=/data"}, {"--nvme-bytes", "needed with --nvme-dir"});
  ExpectMistake({"--nvme-bytes=1GiB"}, {"allowed only with --nvme-dir"});
  ExpectMistake({"--nvme-write-limit=1GiB"}, {"'1 GiB'", "allowed only with --nvme-dir"});
  ExpectMistake({"--listen=0.0.0.0:9000"}, {"'0.0.0.0:9000'", "loopback", "--insecure-tcp"});
  EXPECT_TRUE(Parse({"--listen=0.0.0.0:9000", "--insecure-tcp"}).config.has_value());
  EXPECT_TRUE(Parse({"--listen=127.1.2.3:9000"}).config.has_value());
  EXPECT_TRUE(Parse({"--listen=localhost:9000"}).config.has_value());
  ExpectMistake({"--listen=unix:/s", "--listen=unix:///s"}, {"'unix:///s'", "twice"});
  ExpectMistake({"--listen=unix:/s", "--handover-socket=/s"},
                {"--handover-socket", "'/s'", "another socket"});
  ExpectMistake({"--listen=unix-abstract:s", "--handover-socket=@s"}, {"another socket"});
  EXPECT_TRUE(Parse({"--listen=unix-abstract:s", "--listen=unix:/s"}).config.has_value());
  ExpectMistake({"--listen=unix:/a%20b"}, {"'unix:/a%20b'", "no %"});
}

TEST(Config, UnknownFlagsAndMissingValues) {
  ExpectMistake({"--hots-bytes=1GiB"}, {"--hots-bytes"});
  ExpectMistake({"--host-bytes"}, {"--host-bytes"});
  ExpectMistake({"start"}, {"start"});
}

TEST(Config, HandoverBesideAbstractAndTcp) {
  EXPECT_EQ(Parse({"--listen=unix-abstract:l"}).config->handover_socket, "@l.handover");
  EXPECT_EQ(Parse({"--listen=127.0.0.1:0"}).config->handover_socket[0], '@');
}

TEST(Config, CudaDevices) {
  const Config first = *Parse({"--gpu=cuda", "--gpu-bytes=7MiB"}).config;
  EXPECT_EQ(first.gpu, GpuBackend::kCuda);
  EXPECT_EQ(first.gpu_devices, std::vector<std::string>{"0"});
  EXPECT_EQ(first.gpu_bytes, uint64_t{6} << 20);  // whole 2 MiB
  EXPECT_EQ(first.gpu_reserve, uint64_t{4} << 30);
  const Config ranks = *Parse({"--gpu=cuda", "--gpu-bytes=1GiB", "--gpu-ranks=3"}).config;
  EXPECT_EQ(ranks.gpu_devices, (std::vector<std::string>{"0", "1", "2"}));
  const Config named = *Parse({"--gpu=cuda:GPU-1,2", "--gpu-bytes=1GiB", "--gpu-reserve=0"}).config;
  EXPECT_EQ(named.gpu_devices, (std::vector<std::string>{"GPU-1", "2"}));
  EXPECT_EQ(named.gpu_ranks, 2u);
  EXPECT_EQ(named.gpu_reserve, 0u);
  ExpectMistake({"--gpu=cuda"}, {"--gpu-bytes", "needed with --gpu"});
  ExpectMistake({"--gpu=cuda", "--gpu-bytes=1MiB"}, {"--gpu-bytes", "'1 MiB'", "at least 2MiB"});
  ExpectMistake({"--gpu=cuda:0,1", "--gpu-bytes=1GiB", "--gpu-ranks=3"},
                {"--gpu-ranks", "'3'", "2"});
}

TEST(Config, HelpNamesEverySetting) {
  const CommandLine result = Parse({"--help"});
  EXPECT_FALSE(result.config.has_value());
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.err, "");
  for (const char* part :
       {"--listen",    "LARDER_LISTEN", "--insecure-tcp",     "--socket-mode", "--handover-socket",
        "--gpu",       "--gpu-bytes",   "--gpu-ranks",        "--host-bytes",  "--gpu-reserve",
        "--nvme-dir",  "--nvme-bytes",  "--low-water",        "--metrics",     "--drain-timeout",
        "--log-level", "--log-json",    "--prefault-threads", "--models-max",  "--version",
        "[1GiB]",      "Example:"}) {
    EXPECT_NE(result.out.find(part), std::string::npos) << part;
  }
}

TEST(Config, Version) {
  const CommandLine result = Parse({"--version"});
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.out.rfind("larderd ", 0), 0u) << result.out;
}

}  // namespace
}  // namespace larder
