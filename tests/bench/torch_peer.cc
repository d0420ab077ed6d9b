#include "torch_peer.h"

#include <sys/wait.h>
#include <unistd.h>

#include <memory>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "storage/check.h"

namespace larder::bench {

absl::StatusOr<std::unique_ptr<TorchPeer>> TorchPeer::Start(const std::string& script,
                                                            int threads) {
  int input[2];
  int output[2];
  LARDER_CHECK(::pipe(input) == 0 && ::pipe(output) == 0);
  const std::string count = std::to_string(threads);
  const pid_t pid = ::fork();
  LARDER_CHECK(pid >= 0);
  if (pid == 0) {
    ::dup2(input[0], STDIN_FILENO);
    ::dup2(output[1], STDOUT_FILENO);
    for (const int fd : {input[0], input[1], output[0], output[1]}) ::close(fd);
    ::execl("/usr/bin/python3", "python3", script.c_str(), count.c_str(), nullptr);
    ::_exit(127);
  }
  ::close(input[0]);
  ::close(output[1]);
  std::unique_ptr<TorchPeer> peer(new TorchPeer(pid, input[1], output[0]));
  peer->variant_ = peer->Line();
  if (peer->variant_ == "no torch") return absl::NotFoundError("/usr/bin/python3 has no torch");
  if (peer->variant_.empty()) return absl::UnavailableError(absl::StrCat(script, " failed"));
  return peer;
}

TorchPeer::~TorchPeer() {
  ::close(input_);
  ::close(output_);
  ::waitpid(pid_, nullptr, 0);
}

absl::StatusOr<double> TorchPeer::Run() {
  double seconds = 0;
  if (::write(input_, "\n", 1) != 1 || !absl::SimpleAtod(Line(), &seconds)) {
    return absl::UnavailableError("torch_sdpa.py ended");
  }
  return seconds;
}

std::string TorchPeer::Line() const {
  std::string line;
  char c;
  while (::read(output_, &c, 1) == 1 && c != '\n') line += c;
  return line;
}

}  // namespace larder::bench
