// larder-worker bench: the experiments (bench.h), as a command.
#pragma once

#include "CLI/CLI.hpp"
#include "client/worker/worker_flags.h"

namespace larder::worker {

void RegisterBench(CLI::App& app, Command& command);

}  // namespace larder::worker
