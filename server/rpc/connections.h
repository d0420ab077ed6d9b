// Connections: what was accepted at a server's addresses, for when gRPC does not end it.
//
// gRPC's Shutdown cancels calls at its deadline but then waits, without a bound, until every
// connection is closed; one whose peer does not read keeps the goodbye in the socket's buffer.
// gRPC gives out no connection, so they are found among the descriptors of the process by the
// name they were accepted at.
//
// Thread safety: a function.
#pragma once

#include <string>
#include <vector>

namespace larder {

// Ends, for both sides, all connections of this process that were accepted at one of
// `addresses`, each as in RpcServer::Start; of HOST:PORT, `ports[i]` is the port. The
// descriptors stay their owner's, who learns of it as of a peer that is gone. How many.
int EndConnections(const std::vector<std::string>& addresses, const std::vector<int>& ports);

}  // namespace larder
