// larder-worker bench: the experiments (bench.h), as a command.
#pragma once

#include "client/worker/worker_flags.h"

namespace CLI {  // its own header takes longer to compile than all of ours
class App;
}  // namespace CLI

namespace larder::worker {

void RegisterBench(CLI::App& app, Command& command);

}  // namespace larder::worker
