#include "child.h"

#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "storage/check.h"
#include "storage/unique_fd.h"

extern char** environ;

namespace larder::bench {

TemporaryFolder::TemporaryFolder(const std::string& parent) : path_(parent + "/bench.XXXXXX") {
  LARDER_CHECK(::mkdtemp(path_.data()) != nullptr, "cannot make a temporary folder");
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

absl::StatusOr<std::unique_ptr<Child>> Child::Start(const std::vector<std::string>& arguments) {
  int ends[2];
  LARDER_CHECK(::pipe(ends) == 0);
  const UniqueFd out(ends[0]);
  UniqueFd in(ends[1]);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addclose(&actions, out.get());
  posix_spawn_file_actions_adddup2(&actions, in.get(), STDOUT_FILENO);
  posix_spawn_file_actions_addclose(&actions, in.get());
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  pid_t pid = -1;
  const int error = ::posix_spawn(&pid, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    return absl::UnavailableError(absl::StrCat(arguments[0], ": cannot be started, error ", error));
  }
  std::unique_ptr<Child> child(new Child(pid));
  in.Reset();
  char letter = 0;
  while (letter != '\n') {
    if (::read(out.get(), &letter, 1) != 1) {
      return absl::UnavailableError(absl::StrCat(arguments[0], ": ended before it was ready"));
    }
  }
  return child;
}

void Child::Kill() const {
  ::kill(pid_, SIGKILL);
  siginfo_t ended;
  ::waitid(P_PID, static_cast<id_t>(pid_), &ended, WEXITED | WNOWAIT);
}

Child::~Child() {
  ::kill(pid_, SIGTERM);
  ::waitpid(pid_, nullptr, 0);
}

}  // namespace larder::bench
