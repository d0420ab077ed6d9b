// larder-worker: a small inference server's insides, as commands.
#include <string>

#include "CLI/CLI.hpp"
#include "client/commands.h"
#include "client/output.h"
#include "client/worker/bench_command.h"
#include "client/worker/worker_flags.h"
#include "storage/standard_files.h"

namespace {

constexpr char kFooter[] =
    "Exit codes:\n"
    "  0  done; a cache that was away or lost on the way changes nothing in the answer\n"
    "  1  something failed\n"
    "  2  a flag, a value or a file is not allowed\n";

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Runs a language model on the CPU or a GPU, with its K/V in a larderd or without.",
               "larder-worker");
  app.set_version_flag("--version", std::string("larder-worker ") + LARDER_VERSION);
  app.require_subcommand(1);
  app.fallthrough();
  app.footer(kFooter);

  larder::worker::Command command;
  app.add_flag("--json", command.json, "JSON on stdout instead of text");
  larder::worker::RegisterGenerate(app, command);
  larder::worker::RegisterBench(app, command);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error) == 0 ? larder::cli::kOk : larder::cli::kUsage;
    return larder::cli::FlushOutput("larder-worker", code);
  }
  return larder::cli::FlushOutput("larder-worker", command.run());
}
