// larder: the command line of a larderd.
#include <cstdio>
#include <string>

#include "CLI/CLI.hpp"
#include "client/commands.h"
#include "client/flags.h"
#include "client/output.h"
#include "storage/standard_files.h"

namespace {

constexpr char kFooter[] =
    "Exit codes:\n"
    "  0  done, and the answer is what was asked for\n"
    "  1  a call failed, a block that was asked for is not there, or a byte is wrong\n"
    "  2  a flag or a value is not allowed\n"
    "  3  no daemon answers, or it is stopping\n"
    "\n"
    "Flags of every subcommand: --address, --timeout, --json; see larder --help.\n"
    "Environment:\n"
    "  LARDER_ADDRESS  where --address is not given\n";

void AddCommonFlags(CLI::App& app, larder::cli::Invocation& invocation) {
  app.add_option("--address", invocation.address,
                 "unix:PATH or HOST:PORT of the daemon (default $LARDER_ADDRESS, else "
                 "unix:/run/larder/larderd.sock)")
      ->type_name("ADDRESS");
  larder::cli::AddDuration(app, "--timeout", invocation.timeout,
                           "Deadline of the connection and of each call (default 5s)");
  app.add_flag("--json", invocation.json, "One JSON object instead of tables");
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Looks into a larderd, feeds it and drives it.", "larder");
  app.set_version_flag("--version", std::string("larder ") + LARDER_VERSION);
  app.require_subcommand(1);
  app.fallthrough();
  app.footer(kFooter);

  larder::cli::Invocation invocation;
  invocation.argv.assign(argv, argv + argc);
  AddCommonFlags(app, invocation);
  larder::cli::RegisterStatus(app, invocation);
  larder::cli::RegisterLookup(app, invocation);
  larder::cli::RegisterPut(app, invocation);
  larder::cli::RegisterGet(app, invocation);
  larder::cli::RegisterPrefetch(app, invocation);
  larder::cli::RegisterReplay(app, invocation);
  larder::cli::RegisterNvme(app, invocation);
  larder::cli::RegisterSimulate(app, invocation);
  larder::cli::RegisterSize(app, invocation);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error) == 0 ? larder::cli::kOk : larder::cli::kUsage;
    return larder::cli::FlushOutput("larder", code);
  }
  return larder::cli::FlushOutput("larder", invocation.run());
}
