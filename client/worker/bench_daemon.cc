#include "client/worker/bench_daemon.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "client/client.h"
#include "storage/unique_fd.h"

namespace larder::worker::bench {
namespace {

constexpr uint64_t kTierBytesMin = uint64_t{64} << 20;
constexpr uint64_t kTierBytesStep = uint64_t{1} << 20;
constexpr absl::Duration kFlushTimeout = absl::Minutes(5);  // of 4 GiB, on any drive
constexpr absl::Duration kLettingGoMax = absl::Seconds(10);

// In the child, between fork and exec: async-signal-safe calls only.
[[noreturn]] void Become(char* const* arguments, int stdout_fd, pid_t parent) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);  // which died before prctl
  dup2(stdout_fd, STDOUT_FILENO);
  execv(arguments[0], arguments);
  _exit(127);
}

// Reads to the end of the first line; false when there is none.
bool AwaitLine(int fd) {
  char letter = 0;
  while (letter != '\n') {
    const ssize_t got = read(fd, &letter, 1);
    if (got == 0 || (got < 0 && errno != EINTR)) return false;
  }
  return true;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Daemon>> Daemon::Start(const DaemonOptions& options) {
  if (access(options.program.c_str(), X_OK) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--larderd: \"", options.program, "\": ", std::strerror(errno)));
  }
  std::unique_ptr<Daemon> daemon(new Daemon(options));
  // An address is an absolute path.
  std::string directory =
      std::filesystem::absolute(options.directory).lexically_normal() / "larder-bench.XXXXXX";
  if (mkdtemp(directory.data()) == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("--directory: \"", options.directory, "\": ", std::strerror(errno)));
  }
  daemon->directory_ = directory;
  daemon->address_ = absl::StrCat("unix:", directory, "/larder.sock");
  if (absl::Status spawned = daemon->Spawn(); !spawned.ok()) return spawned;
  return daemon;
}

Daemon::~Daemon() {
  Kill();
  std::error_code ignored;
  if (!directory_.empty()) std::filesystem::remove_all(directory_, ignored);
}

std::vector<std::string> Daemon::Arguments() const {
  const uint64_t wanted = std::max(options_.bytes, kTierBytesMin);
  const std::string size = absl::StrCat((wanted + kTierBytesStep - 1) / kTierBytesStep, "MiB");
  std::vector<std::string> arguments = {
      options_.program,
      absl::StrCat("--listen=", address_),
      absl::StrCat("--host-bytes=", size),
      absl::StrCat("--nvme-dir=", directory_, "/nvme"),
      absl::StrCat("--nvme-bytes=", size),
      "--log-level=error",
  };
  if (!options_.gpu.empty()) {
    arguments.push_back(absl::StrCat("--gpu=", options_.gpu));
    arguments.push_back(absl::StrCat("--gpu-bytes=", size));
  }
  return arguments;
}

absl::Status Daemon::Spawn() {
  std::vector<std::string> arguments = Arguments();
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) {
    return absl::InternalError(absl::StrCat("pipe2: ", std::strerror(errno)));
  }
  const UniqueFd out(ends[0]);
  UniqueFd in(ends[1]);
  const pid_t parent = getpid();
  pid_ = fork();
  if (pid_ == 0) Become(argv.data(), in.get(), parent);
  if (pid_ < 0) return absl::InternalError(absl::StrCat("fork: ", std::strerror(errno)));
  in.Reset();
  // It prints a line once it serves, and what is wrong to stderr, which is ours.
  if (AwaitLine(out.get())) return absl::OkStatus();
  Kill();
  return absl::UnavailableError(
      absl::StrCat("--larderd: \"", options_.program, "\" ended before it was ready"));
}

void Daemon::Kill() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  while (waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
  }
  pid_ = -1;
}

absl::Status Daemon::KillAndRestart() {
  Kill();
  return Spawn();
}

absl::Status Daemon::Flush(const v1::ModelSpec& spec, std::span<const uint32_t> tokens) const {
  absl::StatusOr<Client> client = Client::Connect(address_);
  if (!client.ok()) return client.status();
  absl::StatusOr<v1::Model> model = client->OpenModel(spec);
  if (!model.ok()) return model.status();
  absl::StatusOr<Session> session = client->NewSession("larder-worker bench, flush");
  if (!session.ok()) return session.status();
  absl::StatusOr<Lease> lease = session->Lookup(*model, tokens);
  if (!lease.ok()) return lease.status();
  return lease->Flush(kFlushTimeout).status();
}

absl::Status Daemon::Evict(v1::Tier tier) const {
  absl::StatusOr<Client> client = Client::Connect(address_);
  if (!client.ok()) return client.status();
  // A lease that was let go is released a moment later (client/lease.h).
  const absl::Time deadline = absl::Now() + kLettingGoMax;
  while (true) {
    const absl::StatusOr<v1::EvictResponse> evicted = client->Evict(tier, 0, 0);
    if (!evicted.ok()) return evicted.status();
    if (evicted->kept_blocks() == 0) return absl::OkStatus();
    if (absl::Now() > deadline) {
      return absl::FailedPreconditionError(
          absl::StrCat(v1::Tier_Name(tier), ": ", evicted->kept_blocks(), " blocks are held"));
    }
    absl::SleepFor(absl::Milliseconds(1));
  }
}

}  // namespace larder::worker::bench
