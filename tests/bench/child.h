// A temporary folder, and a server process that lives as long as an object.
//
// Thread safety: none.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace larder::bench {

class TemporaryFolder {
 public:
  // In `parent`; CHECK: it can be made.
  explicit TemporaryFolder(const std::string& parent);
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

class Child {
 public:
  // Starts the program and waits until it has printed a line, which says that it serves.
  // UNAVAILABLE when it ends before.
  static absl::StatusOr<std::unique_ptr<Child>> Start(const std::vector<std::string>& arguments);
  // SIGTERM, and waits for its end.
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  pid_t pid() const { return pid_; }
  // SIGKILL, as in a crash, and waits for its end.
  void Kill() const;

 private:
  explicit Child(pid_t pid) : pid_(pid) {}
  const pid_t pid_;
};

}  // namespace larder::bench
