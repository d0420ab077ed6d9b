#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/connect.h"
#include "client/replay.h"
#include "client/replay_request.h"

namespace larder::cli {
namespace {

constexpr absl::Duration kBackoffMin = absl::Milliseconds(50);
constexpr absl::Duration kBackoffMax = absl::Milliseconds(400);

// One write a line; a parent that is gone ends this process by SIGPIPE.
void Tell(const WorkerLine& line) {
  const std::string text = FormatLine(line) + "\n";
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = write(STDOUT_FILENO, text.data() + done, text.size() - done);
    if (n < 0 && errno != EINTR) return;
    done += std::max<ssize_t>(n, 0);
  }
}

class Worker {
 public:
  Worker(const Invocation& invocation, const ReplayFlags& flags)
      : invocation_(invocation), flags_(flags) {}

  absl::Status Run() {
    absl::StatusOr<std::vector<TraceRequest>> requests =
        ReadTrace(flags_.trace, {flags_.skip, flags_.limit});
    if (!requests.ok()) return requests.status();
    if (absl::Status attached = Attach(); !attached.ok()) return attached;
    uint64_t done = 0;
    for (const TraceRequest& request : *requests) {
      if (!IsShareOf(request.index, flags_, flags_.as_worker)) continue;
      if (request.index < flags_.resume_at) continue;
      ++done;
      const bool flush = flags_.flush_every != 0 && done % flags_.flush_every == 0;
      if (absl::Status replayed = Replay(request, flush); !replayed.ok()) return replayed;
    }
    return absl::OkStatus();
  }

 private:
  // An error only when the daemon went away and did not come back in time.
  absl::Status Replay(const TraceRequest& request, bool flush) {
    RequestRecord record;
    record.index = request.index;
    record.boot_id = session_->boot_id();
    record.microseconds[static_cast<size_t>(Call::kAttach)] = std::exchange(attach_us_, {});
    const absl::Status replayed = ReplayRequest(*session_, model_, flags_, request, flush, record);
    record.interrupted = !replayed.ok() && !session_->Alive();
    Tell(record);
    if (session_->Alive() && !session_->Draining()) return absl::OkStatus();
    session_.reset();  // a daemon that drains waits for its workers to leave
    if (absl::Status attached = AttachAgain(); !attached.ok()) return attached;
    Tell(Reconnected());
    return absl::OkStatus();
  }

  absl::Status Attach() {
    if (!client_.has_value()) {
      absl::StatusOr<Client> client = ConnectTo(invocation_);
      if (!client.ok()) return client.status();
      client_ = *std::move(client);
    }
    const absl::Time start = absl::Now();
    absl::StatusOr<Session> session = client_->NewSession(absl::StrCat(
        "replay worker ", flags_.as_worker, " of ", flags_.workers, ", pid ", getpid()));
    if (!session.ok()) return session.status();
    attach_us_.push_back(static_cast<uint32_t>(absl::ToInt64Microseconds(absl::Now() - start)));
    absl::StatusOr<v1::Model> model = flags_.model.Resolve(*client_);
    if (!model.ok()) return model.status();
    session_ = *std::move(session);
    model_ = *std::move(model);
    return absl::OkStatus();
  }

  absl::Status AttachAgain() {
    const absl::Time give_up = absl::Now() + flags_.reconnect_timeout;
    absl::Duration backoff = kBackoffMin;
    while (true) {
      const absl::Status attached = Attach();
      if (attached.ok() || absl::Now() + backoff > give_up) return attached;
      absl::SleepFor(backoff);
      backoff = std::min(backoff * 2, kBackoffMax);
    }
  }

  const Invocation& invocation_;
  const ReplayFlags& flags_;
  std::optional<Client> client_;
  std::optional<Session> session_;
  v1::Model model_;
  std::vector<uint32_t> attach_us_;
};

}  // namespace

int RunReplayWorker(const Invocation& invocation, const ReplayFlags& flags) {
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  const absl::Status status = Worker(invocation, flags).Run();
  if (status.ok()) return kOk;
  Tell(WorkerFailed{status.code(), std::string(status.message())});
  return ExitCodeOf(status);
}

}  // namespace larder::cli
