// Connect: from the flags of every subcommand to a client.
//
// Thread safety: free functions.
#pragma once

#include "absl/status/statusor.h"
#include "client/client.h"
#include "client/commands.h"

namespace larder::cli {

// --timeout bounds both the connection and each call.
absl::StatusOr<Client> ConnectTo(const Invocation& invocation);

}  // namespace larder::cli
