// Commands: the shape every subcommand of `larder` has. A Register function adds subcommands to
// the parser; the callback of the one that was chosen puts what is to be done into
// Invocation::run, and main calls it after parsing.
//
// Thread safety: none; parsing and running happen on the main thread.
//
// Invariants:
//   1. Parsing touches no daemon and no file; a bad value ends it with kUsage and a message
//      that names the key, the value and what is allowed.
//   2. Results go to stdout (with --json as exactly one object), everything else to stderr.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace CLI {  // its own header takes longer to compile than all of ours
class App;
}  // namespace CLI

namespace larder::cli {

enum ExitCode : int {
  kOk = 0,
  kFailed = 1,       // a call failed, or the answer is not what was asked for
  kUsage = 2,        // a bad flag or value, refused here or by the daemon
  kUnreachable = 3,  // no daemon answers, or it is stopping
};

struct Invocation {
  // Flags of every subcommand.
  std::string address;  // empty: $LARDER_ADDRESS, else the default socket
  absl::Duration timeout = absl::Seconds(5);
  bool json = false;

  std::vector<std::string> argv;
  std::function<int()> run;  // answers an ExitCode
};

// `app` and `invocation` outlive the parse and the run.
void RegisterStatus(CLI::App& app, Invocation& invocation);    // status, models, sessions
void RegisterLookup(CLI::App& app, Invocation& invocation);    // lookup, explain
void RegisterPut(CLI::App& app, Invocation& invocation);       // put
void RegisterGet(CLI::App& app, Invocation& invocation);       // get
void RegisterPrefetch(CLI::App& app, Invocation& invocation);  // prefetch, evict
void RegisterReplay(CLI::App& app, Invocation& invocation);    // replay
void RegisterNvme(CLI::App& app, Invocation& invocation);      // nvme, without a daemon
void RegisterSimulate(CLI::App& app, Invocation& invocation);  // simulate, without a daemon
void RegisterSize(CLI::App& app, Invocation& invocation);      // size, without a daemon

// Says what went wrong on stderr (and, with --json, as {"error": ..} on stdout), and answers the
// exit code for it.
int Fail(const Invocation& invocation, std::string_view command, const absl::Status& error);

// OK: kOk. UNAVAILABLE: kUnreachable. INVALID_ARGUMENT: kUsage. Anything else: kFailed.
ExitCode ExitCodeOf(const absl::Status& status);

}  // namespace larder::cli
