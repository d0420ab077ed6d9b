// slow_larderd: a larderd whose drive takes a quarter of a second longer for every read.
#include <cstdio>
#include <memory>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/config.h"
#include "server/daemon.h"
#include "server/log.h"
#include "storage/io_backend.h"

namespace {

constexpr absl::Duration kReadDelay = absl::Milliseconds(250);

class SlowReads final : public larder::IoBackend {
 public:
  explicit SlowReads(std::unique_ptr<IoBackend> file) : file_(std::move(file)) {}

  void Read(uint64_t offset, std::span<std::byte> to, DoneFn done) override {
    file_->Read(offset, to, [done = std::move(done)](absl::Status status) {
      absl::SleepFor(kReadDelay);
      done(std::move(status));
    });
  }
  void Write(uint64_t offset, std::span<const std::byte> from, DoneFn done) override {
    file_->Write(offset, from, std::move(done));
  }
  absl::Status Sync() override { return file_->Sync(); }

 private:
  const std::unique_ptr<IoBackend> file_;
};

}  // namespace

int main(int argc, char** argv) {
  const larder::CommandLine command_line = larder::ParseCommandLine(argc, argv);
  std::fputs(command_line.err.c_str(), stderr);
  if (!command_line.config) return command_line.exit_code;
  larder::InitLog(command_line.config->log_level, command_line.config->log_json);
  larder::DaemonHooks hooks;
  hooks.wrap_nvme_io = [](std::unique_ptr<larder::IoBackend> file) {
    return std::make_unique<SlowReads>(std::move(file));
  };
  return larder::RunDaemon(*command_line.config, std::move(hooks));
}
