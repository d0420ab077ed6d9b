// One request of a replay, done as an inference worker does it:
//
//   1. LookupPrefix.  2. Prefetch what is not in the highest tier, and wait.
//   3. Truncate to the first block that cannot be read.  4. Read the hits.
//   5. Reserve, fill and Put what is missing, as far as there is room.
//   6. Hold.  7. With --verify, read everything again: no pinned slot may have changed.
//   8. Release.
//
// Thread safety: none.
#pragma once

#include "absl/status/status.h"
#include "client/client.h"
#include "client/replay.h"
#include "client/replay_record.h"
#include "client/trace.h"

namespace larder::cli {

// Adds to `record` what was done. The error is the one that ended the request early; it is
// in record.errors too.
absl::Status ReplayRequest(const Session& session, const v1::Model& model, const ReplayFlags& flags,
                           const TraceRequest& request, bool flush, RequestRecord& record);

}  // namespace larder::cli
