// larderd: reads its configuration, starts the daemon and waits for a signal.
#include <cstdio>

#include "server/config.h"
#include "server/daemon.h"
#include "server/log.h"
#include "storage/standard_files.h"

int main(int argc, char** argv) {
  const larder::CommandLine command_line = larder::ParseCommandLine(argc, argv);
  std::fputs(command_line.out.c_str(), stdout);
  std::fputs(command_line.err.c_str(), stderr);
  if (!command_line.config) {
    if (std::fflush(stdout) == 0) return command_line.exit_code;
    std::perror("larderd: stdout");
    return 1;
  }
  larder::InitLog(command_line.config->log_level, command_line.config->log_json);
  return larder::RunDaemon(*command_line.config);
}
