#include <grpc/support/log.h>
#include <malloc.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/daemon.h"
#include "server/log.h"
#include "storage/cuda_device.h"

namespace larder {
namespace {

// Allocation arenas of glibc: one a thread would cost tens of MiB that nobody uses.
constexpr int kMallocArenas = 2;

sigset_t StopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  // A terminal that is closed says so, unless nohup was there first.
  struct sigaction hangup {};
  if (sigaction(SIGHUP, nullptr, &hangup) == 0 && hangup.sa_handler != SIG_IGN) {
    sigaddset(&signals, SIGHUP);
  }
  return signals;
}

int AwaitSignal(const sigset_t& signals) {
  int signal = 0;
  while (sigwait(&signals, &signal) != 0) {
  }
  return signal;
}

// What the thread that takes the signals and the one that runs the daemon tell each other.
struct Stop {
  absl::Mutex mu;
  bool serving ABSL_GUARDED_BY(mu) = false;
  int signal ABSL_GUARDED_BY(mu) = 0;  // 0: none yet

  bool Told() const ABSL_SHARED_LOCKS_REQUIRED(mu) { return signal != 0; }
};

// While the daemon starts, which takes minutes with large arenas, it has nothing to lose: a signal
// ends the process at once. Later the first is for the daemon, and a second ends the process with
// the code that a shell expects.
void WatchSignals(const sigset_t& signals, std::shared_ptr<Stop> stop) {
  std::thread([signals, stop = std::move(stop)] {
    const int first = AwaitSignal(signals);
    {
      const absl::MutexLock lock(&stop->mu);
      if (!stop->serving) {
        Log(LogLevel::kInfo, "stopped before it was ready", {{"signal", first}});
        _exit(0);
      }
      stop->signal = first;
    }
    const int second = AwaitSignal(signals);
    Log(LogLevel::kWarning, "second signal, exiting at once", {{"signal", second}});
    _exit(128 + second);
  }).detach();
}

// gRPC's own lines in our format.
void LogForGrpc(gpr_log_func_args* args) {
  const bool error = args->severity == GPR_LOG_SEVERITY_ERROR;
  Log(error ? LogLevel::kWarning : LogLevel::kDebug, "grpc", {{"what", args->message}});
}

// As many files as may be: shells and containers start with 1,024, which some 340 workers use up.
void RaiseFileLimit(const Config& config) {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  if (setrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  // A worker has a connection here, and each process of its group a hand-over and a pidfd.
  constexpr uint64_t kOwnFiles = 256;
  const uint64_t needed = kOwnFiles + config.sessions_max * (1 + 2 * uint64_t{config.gpu_ranks});
  if (limit.rlim_max >= needed) return;
  Log(LogLevel::kWarning, "fewer open files are allowed than all workers may need (ulimit -Hn)",
      {{"allowed", limit.rlim_max}, {"needed", needed}, {"sessions_max", config.sessions_max}});
}

}  // namespace

int RunDaemon(const Config& config, DaemonHooks hooks) {
  mallopt(M_ARENA_MAX, kMallocArenas);
  signal(SIGPIPE, SIG_IGN);
  gpr_set_log_function(LogForGrpc);
  RaiseFileLimit(config);
  // Blocked here, so that no thread started later takes them.
  const sigset_t signals = StopSignals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  const auto stop = std::make_shared<Stop>();
  WatchSignals(signals, stop);

  absl::StatusOr<std::unique_ptr<Daemon>> daemon = Daemon::Start(config, std::move(hooks));
  if (!daemon.ok()) {
    Log(LogLevel::kError, "cannot start", {{"why", std::string(daemon.status().message())}});
    if (CudaDevice::AnyAbandoned()) _exit(1);
    return 1;
  }
  {
    const absl::MutexLock lock(&stop->mu);
    stop->serving = true;
  }
  std::printf("larderd ready: %s\n", (*daemon)->Summary().c_str());
  std::fflush(stdout);

  {
    const absl::MutexLock lock(&stop->mu, absl::Condition(stop.get(), &Stop::Told));
    Log(LogLevel::kInfo, "draining", {{"signal", stop->signal}});
  }
  (*daemon)->Drain();
  daemon->reset();
  Log(LogLevel::kInfo, "stopped");
  if (CudaDevice::AnyAbandoned()) _exit(0);
  return 0;
}

}  // namespace larder
