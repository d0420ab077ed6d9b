#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/replay.h"
#include "storage/unique_fd.h"

namespace larder::cli {
namespace {

// A worker that dies again and again has a reason; restarting it forever would hide that.
constexpr uint64_t kRespawnsMax = 1000;

absl::Status SystemError(const char* what, int error) {
  return absl::InternalError(absl::StrCat(what, ": ", std::strerror(error)));
}

// posix_spawn of this very binary with its own arguments and two hidden ones; its stdout is
// the pipe's write end, every other descriptor of ours is close-on-exec.
absl::StatusOr<pid_t> Spawn(std::vector<std::string> argv, int stdout_fd) {
  std::vector<char*> arguments;
  for (std::string& argument : argv) arguments.push_back(argument.data());
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, stdout_fd, STDOUT_FILENO);
  pid_t pid = 0;
  const int error =
      posix_spawn(&pid, "/proc/self/exe", &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return SystemError("posix_spawn", error);
  return pid;
}

class WorkerProcess {
 public:
  WorkerProcess(uint64_t number, uint64_t next) : number_(number), next_(next) {}

  absl::Status Start(std::vector<std::string> argv) {
    argv.push_back(absl::StrCat("--as-worker=", number_));
    argv.push_back(absl::StrCat("--resume-at=", next_));
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return SystemError("pipe2", errno);
    read_end_ = UniqueFd(ends[0]);
    const UniqueFd write_end(ends[1]);
    fcntl(read_end_.get(), F_SETFL, O_NONBLOCK);
    absl::StatusOr<pid_t> pid = Spawn(std::move(argv), write_end.get());
    if (!pid.ok()) return pid.status();
    pid_ = *pid;
    return absl::OkStatus();
  }

  int fd() const { return read_end_.get(); }
  uint64_t number() const { return number_; }
  uint64_t next() const { return next_; }
  // Where a successor begins: after the request that this one was in.
  void SkipCurrent(const ReplayFlags& flags) { next_ += flags.workers; }
  bool failed() const { return failed_; }

  // Hands on the complete lines that have arrived. False at the end of the pipe.
  bool Read(const ReplayFlags& flags, const std::function<void(const WorkerLine&)>& on_line) {
    char bytes[1 << 16];
    const ssize_t n = read(read_end_.get(), bytes, sizeof(bytes));
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    pending_.append(bytes, n);
    size_t start = 0;
    for (size_t end = 0; (end = pending_.find('\n', start)) != std::string::npos; start = end + 1) {
      absl::StatusOr<WorkerLine> line =
          ParseLine(std::string_view(pending_).substr(start, end - start));
      if (!line.ok())
        line = WorkerFailed{line.status().code(), std::string(line.status().message())};
      if (const auto* record = std::get_if<RequestRecord>(&*line)) {
        next_ = record->index + flags.workers;
      }
      failed_ = failed_ || std::holds_alternative<WorkerFailed>(*line);
      on_line(*line);
    }
    pending_.erase(0, start);
    return n > 0;
  }

  // Reaps it; answers its wait status.
  int Wait() {
    read_end_.Reset();
    pending_.clear();  // a line that a kill cut short
    int status = 0;
    while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    return status;
  }

 private:
  const uint64_t number_;
  uint64_t next_;  // index of the request it is in, or will be
  pid_t pid_ = 0;
  UniqueFd read_end_;
  std::string pending_;
  bool failed_ = false;
};

}  // namespace

absl::StatusOr<WorkerFates> RunWorkers(const std::vector<std::string>& argv,
                                       const ReplayFlags& flags, uint64_t requests_end,
                                       const std::function<void(const WorkerLine&)>& on_line) {
  WorkerFates fates;
  std::vector<std::unique_ptr<WorkerProcess>> running;
  for (uint64_t number = 0; number < flags.workers; ++number) {
    running.push_back(std::make_unique<WorkerProcess>(number, flags.skip + number));
    if (absl::Status started = running.back()->Start(argv); !started.ok()) return started;
  }
  const auto note = [&](const WorkerLine& line) {
    if (const auto* failed = std::get_if<WorkerFailed>(&line)) fates.failed.push_back(*failed);
    on_line(line);
  };
  while (!running.empty()) {
    std::vector<pollfd> polled;
    for (const auto& worker : running) polled.push_back({worker->fd(), POLLIN, 0});
    if (poll(polled.data(), polled.size(), -1) < 0 && errno != EINTR) {
      return SystemError("poll", errno);
    }
    for (size_t i = running.size(); i-- > 0;) {
      WorkerProcess& worker = *running[i];
      if (polled[i].revents == 0 || worker.Read(flags, note)) continue;
      const int status = worker.Wait();
      const bool killed = WIFSIGNALED(status);
      fates.killed += killed;
      if (!killed && WEXITSTATUS(status) != kOk && !worker.failed()) {
        note(WorkerFailed{
            absl::StatusCode::kUnknown,
            absl::StrCat("worker ", worker.number(), " exited with ", WEXITSTATUS(status))});
      }
      worker.SkipCurrent(flags);
      const bool nothing_left = worker.next() >= requests_end;
      fates.killed_in_last += killed && flags.respawn && nothing_left;
      if (killed && flags.respawn && fates.respawned < kRespawnsMax && !nothing_left) {
        ++fates.respawned;
        if (absl::Status started = worker.Start(argv); !started.ok()) return started;
      } else {
        running.erase(running.begin() + i);
      }
    }
  }
  return fates;
}

}  // namespace larder::cli
