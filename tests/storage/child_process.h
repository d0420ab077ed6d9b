// ChildProcess: this test program once more, running one "test" as a process of its own.
//
// The child's part is a TEST whose name begins with DISABLED_, which the parent starts by name;
// its parameters travel in the environment, what it has to say over a pipe.
//
// Thread safety: none.
#pragma once

#include <sys/types.h>

#include <map>
#include <optional>
#include <string>

#include "storage/unique_fd.h"

namespace larder::testing {

class ChildProcess {
 public:
  ChildProcess(const std::string& test, const std::map<std::string, std::string>& environment);
  ~ChildProcess() { Kill(); }
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  pid_t pid() const { return pid_; }
  // The next line that the child said, waiting for it; nullopt: it has ended.
  std::optional<std::string> ReadLine();
  // SIGKILL, and waits until the process is reaped.
  void Kill();
  // Waits for its own end; true when its test passed.
  bool Join();

 private:
  pid_t pid_ = -1;
  UniqueFd pipe_;
  std::string buffer_;
};

// In the child.
std::string ChildParameter(const char* name);
void Say(const std::string& line);  // one write, so that a line is whole or not there

}  // namespace larder::testing
