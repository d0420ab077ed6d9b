// The limit of Download: a gRPC server that only sends bytes.
#pragma once

#include <string>

namespace larder::bench {

// Serves KvCache.Download at `address`, in a process of its own: every call gets kBlocks chunks of
// kBlockBytes, encoded beforehand and sent from where they lie, with nothing looked up, pinned or
// copied. Prints a line when it serves; returns main's exit code after SIGTERM.
int ServeBareStream(const std::string& address);

}  // namespace larder::bench
