#include <malloc.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <thread>
#include <utility>

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
  return signals;
}

int AwaitSignal(const sigset_t& signals) {
  int signal = 0;
  while (sigwait(&signals, &signal) != 0) {
  }
  return signal;
}

// From now on a signal ends the process at once, with the code that a shell expects.
void ExitOnNextSignal(const sigset_t& signals) {
  std::thread([signals] {
    const int signal = AwaitSignal(signals);
    Log(LogLevel::kWarning, "second signal, exiting at once", {{"signal", signal}});
    _exit(128 + signal);
  }).detach();
}

}  // namespace

int RunDaemon(const Config& config, DaemonHooks hooks) {
  mallopt(M_ARENA_MAX, kMallocArenas);
  signal(SIGPIPE, SIG_IGN);
  // Blocked here, so that no thread started later takes them.
  const sigset_t signals = StopSignals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  absl::StatusOr<std::unique_ptr<Daemon>> daemon = Daemon::Start(config, std::move(hooks));
  if (!daemon.ok()) {
    Log(LogLevel::kError, "cannot start", {{"why", std::string(daemon.status().message())}});
    if (CudaDevice::AnyAbandoned()) _exit(1);
    return 1;
  }
  std::printf("larderd ready: %s\n", (*daemon)->Summary().c_str());
  std::fflush(stdout);

  const int signal = AwaitSignal(signals);
  Log(LogLevel::kInfo, "draining", {{"signal", signal}});
  ExitOnNextSignal(signals);
  (*daemon)->Drain();
  daemon->reset();
  Log(LogLevel::kInfo, "stopped");
  if (CudaDevice::AnyAbandoned()) _exit(0);
  return 0;
}

}  // namespace larder
