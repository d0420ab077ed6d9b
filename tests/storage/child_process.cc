#include "tests/storage/child_process.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <vector>

#include "storage/check.h"

extern char** environ;

namespace larder::testing {
namespace {

constexpr int kSayFd = 99;

}  // namespace

ChildProcess::ChildProcess(const std::string& test,
                           const std::map<std::string, std::string>& environment) {
  int ends[2];
  LARDER_CHECK(::pipe2(ends, O_CLOEXEC) == 0, "pipe2");
  pipe_ = UniqueFd(ends[0]);
  UniqueFd write_end(ends[1]);
  const std::string filter = "--gtest_filter=" + test;
  std::vector<std::string> words = {"/proc/self/exe", filter, "--gtest_also_run_disabled_tests",
                                    "--gtest_brief=1"};
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  std::vector<std::string> variables;
  for (char** e = environ; *e != nullptr; ++e) variables.emplace_back(*e);
  for (const auto& [name, value] : environment) variables.push_back(name + "=" + value);
  std::vector<char*> envp;
  for (std::string& variable : variables) envp.push_back(variable.data());
  envp.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, write_end.get(), kSayFd);
  LARDER_CHECK(
      ::posix_spawn(&pid_, "/proc/self/exe", &actions, nullptr, argv.data(), envp.data()) == 0,
      "posix_spawn");
  ::posix_spawn_file_actions_destroy(&actions);
}

std::optional<std::string> ChildProcess::ReadLine() {
  while (true) {
    if (const size_t end = buffer_.find('\n'); end != std::string::npos) {
      std::string line = buffer_.substr(0, end);
      buffer_.erase(0, end + 1);
      return line;
    }
    char chunk[4096];
    const ssize_t n = ::read(pipe_.get(), chunk, sizeof(chunk));
    if (n <= 0) return std::nullopt;
    buffer_.append(chunk, static_cast<size_t>(n));
  }
}

void ChildProcess::Kill() {
  if (pid_ < 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

bool ChildProcess::Join() {
  int status = 0;
  ::waitpid(pid_, &status, 0);
  pid_ = -1;
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

std::string ChildParameter(const char* name) {
  const char* const value = std::getenv(name);
  LARDER_CHECK(value != nullptr, "this is a child's part; the parent's test starts it");
  return value;
}

void Say(const std::string& line) {
  const std::string text = line + "\n";
  LARDER_CHECK(::write(kSayFd, text.data(), text.size()) == static_cast<ssize_t>(text.size()),
               "the parent is gone");
}

}  // namespace larder::testing
